"""Look inside a trained model: what its heads attend to, its layers say, and what wrote a token.

    from gptsmith.inspection import inspect, record

    model, tokenizer = gptsmith.load("runs/plays-1")
    found = inspect(model, tokenizer.encode("To be, or not to"))
    found.weights[0, 3]  # (T, T), the attention of layer 0's head 3

Everything is an array of numpy or a tensor, with its shape in the docstring.
"""

from .attribution import Attribution, Part, Question, attribute
from .heads import head_scores, pattern_scores, repeated_tokens
from .lens import Lens, Surprise, logit_lens, surprise
from .over_training import Moment, moments
from .page import page
from .patching import Patching, patch
from .recording import Recording, head_outputs, record
from .report import Inspection, about, inspect, to_json

__all__ = [
    "Attribution",
    "Inspection",
    "Lens",
    "Moment",
    "Part",
    "Patching",
    "Question",
    "Recording",
    "Surprise",
    "about",
    "attribute",
    "head_outputs",
    "head_scores",
    "inspect",
    "logit_lens",
    "moments",
    "page",
    "patch",
    "pattern_scores",
    "record",
    "repeated_tokens",
    "surprise",
    "to_json",
]
