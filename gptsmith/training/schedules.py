"""The learning rate schedule.

Pure arithmetic, without PyTorch; knows nothing of optimizers.
"""

import math

from ..config.settings import TrainingSettings


def learning_rate(step: int, settings: TrainingSettings) -> float:
    """Return the learning rate of a step, counted from 0.

    It rises linearly over the warmup, from above 0 so that the first step counts. Then `cosine`
    decays to the minimum along half a cosine wave, `wsd` stays constant and decays linearly over
    the last `decay_fraction` of the steps, and `constant` stays. Unless the minimum is set, it is a
    tenth of the peak, or 0 with wsd.
    """
    peak, lowest = settings.learning_rate, settings.min_learning_rate
    if lowest is None:
        lowest = 0.0 if settings.schedule == "wsd" else peak / 10
    if step < settings.warmup_steps:
        return peak * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return peak
    if settings.schedule == "cosine":
        whole = settings.steps - settings.warmup_steps
        progress = min(1.0, (step - settings.warmup_steps) / max(1, whole))
        return lowest + (peak - lowest) * (1 + math.cos(math.pi * progress)) / 2
    decay = max(1.0, settings.steps * settings.decay_fraction)
    left = (settings.steps - step) / decay
    return lowest + (peak - lowest) * min(1.0, max(0.0, left))
