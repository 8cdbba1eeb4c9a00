"""From a prompt to generated tokens and text."""
