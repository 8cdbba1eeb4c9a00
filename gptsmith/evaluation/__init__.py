"""How well a model predicts text, and what quantizing costs."""
