"""A model on disk, and back."""
