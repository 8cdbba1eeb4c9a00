"""Looking inside: what a model consists of, and what happens in it on the way to its logits.

Knows nothing of training, serving or foreign formats; changes nothing that it looks at.
"""
