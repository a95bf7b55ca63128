"""Saved models and their cards, in a folder or on the Hugging Face Hub."""
