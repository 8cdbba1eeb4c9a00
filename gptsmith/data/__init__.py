"""Text to tokens on disk, and these to batches. In reading order: shakespeare, sources,
documents, split, encode, tokenfile, shards, prepare, batches.

Examples to tokens and targets on disk: example_fields, examples, targets, example_writer, encoded.
"""
