"""The verb that looks inside a trained model: inspect."""

import json
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..checkpoint.finding import checkpoints, is_run, step_of
from ..config.fields import SettingError, setting
from ..config.settings import InferenceSettings
from ..machine.files import write_text
from ..machine.terminal import Display, size, tell
from .flags import Parser, add_flags, chosen
from .opening import MODEL_HELP, open_model

UNUSED = ("dtype", "compile", "attention")  # everything is computed in float32, by the definition
REPEATED = 16  # random tokens, which are read twice
LARGE_PAGE = 20 << 20  # bytes; browsers become slow


@dataclass(frozen=True, kw_only=True)
class InspectSettings:
    """What to look at, and where the page goes."""

    prompt: str | None = setting(
        None,
        "text to look at what the model does with (needed, unless --over-checkpoints has its own: "
        "random tokens, repeated)",
    )
    out: Path = setting(Path("report.html"), "write the page to this file", metavar="FILE.html")
    target: str | None = setting(
        None, "token whose logit after the prompt is explained (default: the most likely one)"
    )
    instead: str | None = setting(
        None,
        "token whose logit is subtracted from the target's (default: none, or with --corrupt the "
        "most likely one after that text)",
    )
    corrupt: str | None = setting(
        None,
        "another text of as many tokens: show which activations of the prompt, put into the pass "
        "over this text, bring the target back",
        metavar="TEXT",
    )
    over_checkpoints: bool = setting(
        False, "also show how heads and layers changed over the checkpoints of a run"
    )
    json: bool = setting(False, "write the data as JSON to standard output, in place of a page")

    def __post_init__(self) -> None:
        if self.prompt is None and not self.over_checkpoints:
            raise SettingError("prompt", "is missing: give the text to look at, as --prompt TEXT")
        if self.prompt == "":
            raise SettingError("prompt", "is empty: give a text of at least one token")
        if not self.out.parent.is_dir():
            raise SettingError("out", f"is {self.out}: create the folder {self.out.parent} first")
        if self.out.is_dir():
            raise SettingError("out", f"is {self.out}, a folder: name a file")


def arguments(parser: Parser) -> None:
    """Add the arguments of `gptsmith inspect`."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    add_flags(parser, InspectSettings)
    add_flags(parser, InferenceSettings, without=UNUSED)


def run(options: Namespace) -> None:
    """Look inside a model: what its parts do with a text, as an HTML page or as JSON."""
    settings = chosen(options, InspectSettings)
    if not settings.json:
        check_out(settings.out)
    if settings.over_checkpoints and not is_run(Path(options.model)):
        raise SettingError(
            "over_checkpoints", f"needs a run with checkpoints, which {options.model} is not"
        )
    _, model, tokenizer = open_model(options, options.model)
    if tokenizer is None:
        raise ValueError(f"{options.model} has no tokenizer.json, which a text needs: add one")
    facts = inspected(options, settings, model, tokenizer)
    if settings.json:
        print(json.dumps(facts))
        return
    from ..inspection.page import page

    text = page(facts)
    write_text(settings.out, text)
    note = "" if len(text) < LARGE_PAGE else ": a browser takes long to draw it"
    tell(f"wrote {settings.out} ({size(len(text))}){note}")


def check_out(path: Path) -> None:
    """Raise SettingError if a file is in the way that `inspect` did not write."""
    from ..inspection.page import is_page

    if path.exists() and not is_page(path):
        raise SettingError("out", f"is {path}, which is something else: name another file")


def inspected(
    options: Namespace, settings: InspectSettings, model: Any, tokenizer: Any
) -> dict[str, Any]:
    """Return what the flags ask for, as plain values."""
    from ..inspection.attribution import Question
    from ..inspection.heads import repeated_tokens
    from ..inspection.patching import likeliest
    from ..inspection.report import about, inspect, to_json
    from ..inspection.words import prompt_tokens, single_token

    V, context = tokenizer.vocab_size, model.config.context_length
    if settings.prompt is None:
        tokens = repeated_tokens(V, min(REPEATED, context // 2), rows=1)[0].tolist()
    else:
        tokens = prompt_tokens(tokenizer, settings.prompt, context)
    target, instead = (
        None if text is None else single_token(tokenizer, text, name)
        for name, text in (("target", settings.target), ("instead", settings.instead))
    )
    more: dict[str, Any] = {}
    if settings.corrupt is not None:
        other = prompt_tokens(tokenizer, settings.corrupt, context, "corrupt")
        more = patched(model, tokens, other, target, instead)
    elif target is not None or instead is not None:
        target = likeliest(model, tokens) if target is None else target
        if target == instead:
            raise SettingError("instead", "is the target itself: name another token")
        more = {"question": Question(target, instead)}
    if settings.over_checkpoints:
        more["training"] = through_training(options, tokens, V)
    found = inspect(model, tokens, vocab_size=V, **more)
    return to_json(found, tokenizer, about(model, options.model))


def patched(
    model: Any, tokens: list[int], other: list[int], target: int | None, instead: int | None
) -> dict[str, Any]:
    """Return the question, the corrupted prompt (T,) and what patching it restores."""
    from ..inspection.patching import complete, patch

    question = complete(model, tokens, other, target, instead)
    display = Display()
    display.open_bar("patching", 100)
    try:
        for done in patch(model, tokens, other, question):
            if isinstance(done, float):
                display.move_bar(round(100 * done), "")
    finally:
        display.close_bar()
    return {"question": question, "corrupt": other, "patching": done}


def through_training(options: Namespace, tokens: list[int], vocab_size: int) -> Any:
    """Return what the model was like at each checkpoint of its run, the oldest first."""
    from ..inspection.over_training import moments

    folders = checkpoints(Path(options.model))[::-1]
    if len(folders) == 1:
        tell("the run has one checkpoint: train with --keep all to see how it became what it is")

    def models() -> Iterator[tuple[int, Any]]:
        display = Display()
        display.open_bar("checkpoints", len(folders))
        try:
            for number, folder in enumerate(folders):
                display.move_bar(number, folder.name)
                here = Namespace(**{**vars(options), "model": str(folder)})
                yield step_of(folder), open_model(here, str(folder))[1]
        finally:
            display.close_bar()

    return list(moments(models(), tokens, vocab_size=vocab_size))


def inspector_page() -> Path:
    """Return the page that shows what a server's model does with a prompt."""
    from ..inspection.page import TEMPLATE

    return TEMPLATE


def looker(model: Any, tokenizer: Any, name: str) -> Callable[[Sequence[int]], dict[str, Any]]:
    """Return a function that looks at what a served model does with tokens (T,).

    The heads' scores are measured once, when it is first called.
    """
    from ..inspection.heads import head_scores
    from ..inspection.recording import apart
    from ..inspection.report import about, inspect, to_json

    own, V = apart(model), tokenizer.vocab_size  # since the engine uses the model meanwhile
    scores = cache(lambda: head_scores(own, vocab_size=V))

    def look(tokens: Sequence[int]) -> dict[str, Any]:
        found = inspect(own, tokens, vocab_size=V, scores=scores())
        return to_json(found, tokenizer, about(own, name))

    return look
