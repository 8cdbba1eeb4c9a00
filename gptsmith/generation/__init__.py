"""Prompt to tokens to text."""
