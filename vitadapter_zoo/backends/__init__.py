"""Other frameworks that can run the checkpoints: mmdet 2.x. Imported only on request."""
