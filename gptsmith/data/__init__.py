"""From text to tokens on disk, and from those to batches. In reading order: shakespeare, sources,
documents, tokenfile, shards, encode, prepare, batches.
"""
