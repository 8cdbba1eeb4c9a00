"""Training a model: optimizers, schedules, the loop, and the run around it."""
