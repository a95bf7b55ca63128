"""Save models and model cards, in a folder or on the Hugging Face Hub."""
