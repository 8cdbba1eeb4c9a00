"""What a Hugging Face folder says about using a model, beside its tensors and its vocabulary.

That is: special tokens, chat templates and defaults for generating text. Most of them are for other
tools, and all travel with the tokenizer. Knows nothing of what tokens stand for.
"""

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..machine.files import read_json

MODEL, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer_config.json"
SPECIALS = "special_tokens_map.json"  # of older folders
TEMPLATE, MORE_TEMPLATES = "chat_template.jinja", "additional_chat_templates"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
# Fields of tokenizer_config.json that we carry; the others describe files and classes.
CARRIED = (
    *(*ROLES, "additional_special_tokens", "extra_special_tokens", "add_bos_token"),
    *("add_eos_token", "padding_side", "truncation_side", "clean_up_tokenization_spaces"),
)
# What transformers' pipeline generates unless told otherwise, whatever the context.
PIPELINE_TOKENS = 256


@dataclass(frozen=True)
class Usage:
    """The special tokens, chat templates and defaults in a folder, as its files have them."""

    tokenizer: Mapping[str, Any] = field(default_factory=dict)  # of tokenizer_config.json
    generation: Mapping[str, Any] = field(default_factory=dict)  # of generation_config.json
    templates: Mapping[str, str] = field(default_factory=dict)  # by name: "default" and others

    def tokenizer_config(
        self, vocab: Container[str], *, end: str | None, context_length: int | None
    ) -> dict[str, Any]:
        """Return the tokenizer_config.json; special tokens that `vocab` lacks are left out.

        `end` is the end of text, or None if there is none.
        """
        known = {
            name: [text for text in value if text in vocab] if isinstance(value, list) else value
            for name, value in self.tokenizer.items()
            if name not in ROLES or value in vocab
        }
        return {
            # With GPT2Tokenizer, transformers 5 would load GPT-2's own tokenizer.
            "tokenizer_class": "PreTrainedTokenizerFast",
            # Otherwise transformers 4 adds token types, which GPT-2 takes for tokens.
            "model_input_names": ["input_ids", "attention_mask"],
            **({} if context_length is None else {"model_max_length": context_length}),
            # As in GPT-2, and for padding too. A char tokenizer has none to spare: readers that
            # skip special tokens would drop that character from texts.
            **({} if end is None else dict.fromkeys(ROLES, end)),
            "clean_up_tokenization_spaces": False,
            **known,
        }

    def generation_config(
        self, *, end: int | None, vocab_size: int, context_length: int
    ) -> dict[str, Any]:
        """Return the generation_config.json; ids that are not in the vocabulary are left out."""
        found = dict(self.generation)
        for name in IDS:
            value = found.get(name)
            listed = value if isinstance(value, list) else [value]
            known = [id for id in listed if type(id) is int and 0 <= id < vocab_size]
            found[name] = (known[0] if len(known) == 1 else known) if known else end
        # Where a pipeline's own number leaves too little room, half the context is the prompt's.
        if context_length < 2 * PIPELINE_TOKENS and "max_length" not in found:
            found = {"max_new_tokens": max(1, context_length // 2)} | found
        return found


def read_usage(folder: Path) -> Usage:
    """Read what a folder says about its use; whatever it does not say is left to us."""
    names = (MODEL, GENERATION, SPECIALS, TOKENIZER)
    files = [read_json(folder / name) if (folder / name).is_file() else {} for name in names]
    model, generation, specials, settings = files
    settings = specials | settings
    listed = settings.get("chat_template")
    if isinstance(listed, str):
        listed = [{"name": "default", "template": listed}]
    templates = {
        str(each.get("name")): str(each.get("template"))
        for each in (listed if isinstance(listed, list) else [])
        if isinstance(each, dict)
    }
    for path in [folder / TEMPLATE, *sorted((folder / MORE_TEMPLATES).glob("*.jinja"))]:
        if path.is_file():
            name = "default" if path.name == TEMPLATE else path.stem
            templates[name] = path.read_text(encoding="utf-8")
    generation = {name: model.get(name) for name in IDS} | generation
    for name in ("_from_model_config", "transformers_version"):
        generation.pop(name, None)
    carried = dict[str, Any]()
    for name in CARRIED:
        value = plain(settings.get(name))
        if isinstance(value, str if name in ROLES else str | bool | list):
            carried[name] = value
    said = {name: value for name, value in generation.items() if value is not None}
    return Usage(carried, said, templates)


def plain(value: Any) -> Any:
    """Return a setting with the text of special tokens in place of their descriptions."""
    if isinstance(value, list):
        return [plain(each) for each in value]
    return value.get("content") if isinstance(value, dict) else value


def write_templates(templates: Mapping[str, str], folder: Path) -> None:
    """Write chat templates where transformers looks for them."""
    for name, source in templates.items():
        safe = re.sub(r"\W", "_", name)  # it is a stranger's, so it could name another folder
        path = folder / (TEMPLATE if name == "default" else f"{MORE_TEMPLATES}/{safe}.jinja")
        path.parent.mkdir(exist_ok=True)
        path.write_text(source, encoding="utf-8", newline="\n")
