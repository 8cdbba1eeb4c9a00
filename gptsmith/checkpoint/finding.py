"""Find the folder that MODEL names, verified: a model, a checkpoint of a run, or a base."""

import warnings
from pathlib import Path

from ..config.fields import suggestion
from ..machine.files import DamagedError
from ..machine.shell import typed
from .adapter_json import is_adapter, read_adapter_config
from .verifying import verify
from .whole import whole_description


def checkpoints(run: Path) -> list[Path]:
    """Return a run's checkpoints, newest first."""
    return sorted((run / "checkpoints").glob("step-*"), reverse=True)


def step_of(checkpoint: Path) -> int:
    """Return the step that a run's checkpoint was saved at."""
    return int(checkpoint.name.removeprefix("step-"))


def is_run(folder: Path) -> bool:
    """Return whether a folder is a training run, not a single model."""
    return (folder / "checkpoints").is_dir()


def pointed_to(run: Path, pointer: str) -> Path | None:
    """Return the checkpoint that a run's `best` or `last` names; None if there is none yet."""
    path = run / pointer
    if not path.is_file():
        return None
    return run / "checkpoints" / path.read_text(encoding="utf-8").strip()


def find_checkpoint(run: Path, pointer: str, *, training: bool) -> Path:
    """Return the checkpoint that `pointer` names, verified; if damaged, the newest intact one.

    A warning reports the fallback. FileNotFoundError if no checkpoint is intact.
    """
    first = pointed_to(run, pointer)
    candidates = [first] if first else []
    candidates += [path for path in checkpoints(run) if path != first]
    problems = []
    for path in candidates:
        try:
            verify(path, training=training)
            if is_adapter(path):
                read_adapter_config(path)  # its base is looked for later, as it may be named
            else:
                whole_description(path)
        except (DamagedError, FileNotFoundError) as error:
            problems.append(str(error))
            continue
        if problems:
            warnings.warn(f"{problems[0]}; using {path} instead", stacklevel=2)
        return path
    why = f": {problems[0]}" if problems else ""
    raise FileNotFoundError(f"{run} has no intact checkpoint{why}")


def find_model(name: str | Path) -> Path:
    """Return the folder of MODEL, verified: a run's best checkpoint, or the folder itself."""
    folder = Path(name)
    if not folder.exists():
        beside = folder.parent.glob("*") if folder.parent.is_dir() else []
        hint = suggestion(folder.name, [path.name for path in beside])
        raise FileNotFoundError(f"no model at {folder}{hint}")
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is a file: a run, a checkpoint or a Hugging Face folder is needed"
        )
    if is_run(folder):
        return find_checkpoint(folder, "best", training=False)
    verify(folder, training=False)
    return folder


def find_base(folder: Path, base: str | Path | None = None) -> Path:
    """Return the folder of an adapter's base, verified: `base`, or as the adapter names it.

    The name is a path, also from the adapter's folder on; or the base has its last word as its name
    and is beside the adapter, or beside a folder that the adapter is in.
    """
    named = str(base or read_adapter_config(folder).base)
    places = [Path(named), folder / named]
    places += [parent / Path(named).name for parent in folder.resolve().parents[:4]]
    here = folder.resolve()
    found = [place for place in places if named and place.is_dir() and place.resolve() != here]
    if base is None and not found:
        raise FileNotFoundError(
            f"{folder} is an adapter, and its base '{named}' is not there: name it with --base, as "
            f"in `gptsmith merge {typed(folder)} OUT --base MODEL`"
        )
    model = find_model(base or found[0])
    if is_adapter(model):
        raise ValueError(
            f"the base of {folder}, {model}, is an adapter itself: "
            f"`gptsmith merge {typed(model)} OUT` makes it a whole model, which can be a base"
        )
    return model


def best_of(name: str) -> str:
    """Return the best checkpoint of a run by its name, or any other word as it is."""
    return str(find_model(name)) if is_run(Path(name)) else name
