"""Text to tokens on disk, and these to batches. In reading order: shakespeare, sources,
documents, tokenfile, shards, encode, prepare, batches.
"""
