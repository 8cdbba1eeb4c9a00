"""What can be chosen, and what it costs: the model, the settings, recipes. Needs no PyTorch."""
