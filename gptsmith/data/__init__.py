"""Text to tokens on disk, and these to batches. In reading order: shakespeare, sources,
documents, split, encode, tokenfile, shards, prepare, batches.
"""
