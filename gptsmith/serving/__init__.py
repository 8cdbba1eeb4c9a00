"""Many callers of one model at once: an engine that batches them, and OpenAI's HTTP in front."""
