"""Bootstrap intervals of any statistic, by patient: rows of one patient are not independent."""

from collections.abc import Callable, Hashable, Sequence

import numpy as np

RESAMPLES = 1000


def resampled(
    statistic: Callable[[np.ndarray], float | None],
    groups: Sequence[Hashable],
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> tuple[float, float] | None:
    """95 % percentile interval of a statistic of row numbers [M], where whole groups are drawn with replacement.

    ``statistic`` may return None for a draw on which it is not defined, such as an AUROC without positives. Returns
    None where that is half of the draws or more. Raises ValueError without rows.
    """
    if not len(groups):
        raise ValueError("no rows to resample")
    number: dict[Hashable, int] = {}
    member = np.array([number.setdefault(group, len(number)) for group in groups])
    rows = np.split(np.argsort(member, kind="stable"), np.cumsum(np.bincount(member))[:-1])
    random = np.random.default_rng(seed)
    drawn = (np.concatenate([rows[g] for g in random.integers(0, len(rows), len(rows))]) for _ in range(resamples))
    found = [value for value in map(statistic, drawn) if value is not None]
    if 2 * len(found) <= resamples:
        return None
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)
