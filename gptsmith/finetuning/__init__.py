"""From examples to a model that follows them: chat, classify and preference, on training's loop."""
