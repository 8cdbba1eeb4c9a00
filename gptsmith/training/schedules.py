"""The learning rate of a step.

Pure arithmetic, without torch; knows nothing of optimizers.
"""

import math

from ..config.settings import TrainingSettings


def learning_rate(step: int, settings: TrainingSettings) -> float:
    """The learning rate of the step that comes after `step` steps.

    It rises in a line over the warm-up, so that even the first step learns, and then: `cosine`
    falls in half a wave to the minimum, `wsd` stays and falls in a line over the last
    `decay_fraction` of the steps, `constant` stays.
    """
    highest = settings.learning_rate
    if step < settings.warmup_steps:
        return highest * (step + 1) / settings.warmup_steps
    lowest = lowest_learning_rate(settings)
    if settings.schedule == "constant":
        return highest
    if settings.schedule == "cosine":
        whole = settings.steps - settings.warmup_steps
        progress = min(1.0, (step - settings.warmup_steps) / max(1, whole))
        return lowest + (highest - lowest) * (1 + math.cos(math.pi * progress)) / 2
    decay = max(1.0, settings.steps * settings.decay_fraction)
    left = (settings.steps - step) / decay
    return lowest + (highest - lowest) * min(1.0, max(0.0, left))


def lowest_learning_rate(settings: TrainingSettings) -> float:
    """Where the schedule ends: as set, else a tenth of the highest, or 0 with wsd."""
    if settings.min_learning_rate is not None:
        return settings.min_learning_rate
    return 0.0 if settings.schedule == "wsd" else settings.learning_rate / 10
