"""Other frameworks that the checkpoints run in. Nothing here is imported unless it is asked for."""
