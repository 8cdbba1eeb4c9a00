"""Tokens to logits and loss: only mathematics."""
