"""Fine-tune a model on examples: the settings of such a run, and `gptsmith.finetune`.

Knows nothing of what the tasks do. The run itself is training's, by the tasks of `tasks.py`.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..checkpoint.finding import find_model
from ..config.fields import SettingError
from ..config.finetune import EXAMPLE_KINDS, Task, check_meaning
from ..config.model import GPTConfig, current_names
from ..config.recipe import read_toml, recipes, short_name, types_of, with_overrides
from ..config.settings import RunSettings
from ..data.encoded import Examples, is_examples
from ..data.examples import recognised_task
from ..machine.environment import rank
from ..machine.terminal import Display
from ..training.train import (
    continue_run,
    folder_unless_stopped,
    train_fresh,
)
from .report import summary, test_run
from .tasks import open_task

FRESH = "fresh"  # in place of a model: random weights
LORA_RATE = 10  # times a recipe's learning rate: adapters begin as nothing, and are small


def finetune(
    model: str | Path | None = None,
    data: str | Path | None = None,
    *,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    show: bool = False,
    **choices: Any,
) -> Path:
    """Fine-tune a model as `gptsmith finetune` does; return the folder of the run.

    `model` is any MODEL, or "fresh" for random weights; `data` has the examples. Give single
    settings by name, as in `finetune("gpt2/", "spam.csv", lora=16, epochs=3)`. `out` is the new
    folder (default: runs/NAME-N). `resume` is the folder of a run to resume. At the end the best
    checkpoint is tested on the examples kept for it; test.json says how well it did. Writes to the
    terminal only with `show`.

    ValueError or FileNotFoundError where the settings or the data cannot be used. On Ctrl-C,
    SIGTERM or SIGHUP the run is saved, and then the signal is raised again.
    """
    display = Display(quiet=not show or rank() != 0)
    if resume is not None:
        if model is not None or data is not None or out is not None:
            raise ValueError("resume names the run and its settings: leave the others out")
        run = continue_run(Path(resume), display, choices, open_task)
    elif model is None or data is None:
        raise ValueError("a model (or fresh) and data with examples are needed")
    else:
        settings, name = finetune_settings(str(model), {**choices, "data": str(data)})
        run = train_fresh(settings, out, name, display, open_task)
    if run.signal is None and rank() == 0:
        for line in summary(test_run(run.folder, display)):
            display.say(line)
    return folder_unless_stopped(run)


def finetune_settings(model: str, choices: Mapping[str, Any]) -> tuple[RunSettings, str]:
    """Return the settings of a fresh run, and a name for it.

    They are those of the recipe for the task, which the data tells unless it is chosen. `choices`
    replace single settings, by name; "data" is one of them.
    """
    choices = current_names(choices)
    if choices.get("data") is None:
        raise ValueError("no data is given: add --data with rows of examples")
    asked = with_overrides(RunSettings(), {**choices, "task": choices.get("task")})
    task: Task
    if asked.finetune.task is None and is_examples(Path(choices["data"])):
        task = Examples.open(Path(choices["data"])).task
    else:
        task = recognised_task([choices["data"]], asked.prepare, asked.finetune)
    begin = "fresh" if model == FRESH else "finetune"
    recipe = f"{begin}-{task}"
    if recipe not in recipes():  # that of the task which learns from the same examples
        recipe = f"{begin}-{EXAMPLE_KINDS.get(task, task)}"
    if recipe not in recipes():
        better = "gptsmith train" if task == "text" else "a model that answers already"
        raise ValueError(f"there is nothing to fine-tune in fresh weights on {task}: use {better}")
    check_meaning(task, choices)
    settings = read_toml(recipes()[recipe])
    if "steps" in choices and "epochs" not in choices:
        choices = {**choices, "epochs": None}
    if asked.finetune.lora is not None and "learning_rate" not in choices:
        choices = {**choices, "learning_rate": LORA_RATE * settings.training.learning_rate}
    start_from = None if model == FRESH else str(find_model(model).resolve())
    if start_from is not None:
        for choice in choices:
            if choice in types_of(GPTConfig) and choice != "dropout":
                raise SettingError(choice, f"cannot go with {model}, which brings its own model")
        settings = replace(settings, model=GPTConfig(dropout=settings.model.dropout))
    choices = {**choices, "task": task, "start_from": start_from}
    return with_overrides(settings, choices), f"{short_name(model)}-{task}"
