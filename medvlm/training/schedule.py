"""Learning rates as pure functions of the step: nothing to save, nothing to restore."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from medvlm.config.schema import Training


@dataclass
class Rate:
    """Of a parameter group: ``peak`` is reached after ``warmup`` steps."""

    part: str
    peak: float
    warmup: int


def warmup_steps(training: Training, total: int) -> int:
    return math.ceil(total * training.warmup_ratio) if training.warmup_steps is None else training.warmup_steps


def learning_rate_factor(
    step: int, total: int, warmup: int, shape: str = "cosine", minimum: float = 0.0, decay_ratio: float = 0.2
) -> float:
    """Of the peak, for the update number ``step`` (from 0) of ``total``: a linear warm-up, then

    - cosine: half a cosine down to ``minimum`` (Loshchilov and Hutter, arXiv 1608.03983, without restarts);
    - linear: a line down to ``minimum``;
    - constant;
    - warmup_stable_decay: constant, and in the last ``decay_ratio`` of the steps down to ``minimum`` as one minus a
      square root (Hägele et al., arXiv 2405.18392).
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    if shape == "constant":
        left = 1.0
    elif shape == "linear":
        left = 1 - progress
    elif shape == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        length = max(1, round(total * decay_ratio))
        begin = max(warmup, total - length)
        left = 1 - math.sqrt(max(0, step - begin) / max(1, total - begin))
    return minimum + (1 - minimum) * left


def learning_rates(step: int, total: int, rates: Sequence[Rate], training: Training) -> list[float]:
    """One for each parameter group."""
    shape, minimum, decay = training.schedule, training.min_learning_rate_ratio, training.decay_ratio
    return [r.peak * learning_rate_factor(step, total, r.warmup, shape, minimum, decay) for r in rates]


def by_part(rates: Sequence[Rate], values: Sequence[float]) -> dict[str, float]:
    """The highest of each part: with layer-wise decay, that of the layers nearest the output."""
    parts: dict[str, float] = {}
    for rate, value in zip(rates, values, strict=True):
        parts[rate.part] = max(value, parts.get(rate.part, 0.0))
    return parts
