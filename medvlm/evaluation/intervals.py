"""Bootstrap intervals of any statistic, by patient: rows of one patient are not independent."""

from collections.abc import Callable, Hashable, Sequence

import numpy as np

RESAMPLES = 1000


def resampled(
    statistic: Callable[[np.ndarray], float | None], groups: Sequence[Hashable], seed: int = 0
) -> tuple[float, float] | None:
    """95 % percentile interval of a statistic of row numbers [M], where whole groups are drawn with replacement.

    ``statistic`` may return None for a draw on which it is not defined, such as an AUROC without positives. Returns
    None where that is half of the draws or more. Raises ValueError without rows.
    """

    def column(rows: np.ndarray) -> list[float]:
        value = statistic(rows)
        return [np.nan if value is None else value]

    return resampled_columns(column, groups, seed)[0]


def resampled_columns(
    statistic: Callable[[np.ndarray], Sequence[float]], groups: Sequence[Hashable], seed: int = 0
) -> list[tuple[float, float] | None]:
    """As :func:`resampled`, of several statistics of the same draws, each NaN where it is not defined."""
    if not len(groups):
        raise ValueError("no rows to resample")
    number: dict[Hashable, int] = {}
    member = np.array([number.setdefault(group, len(number)) for group in groups])
    rows = np.split(np.argsort(member, kind="stable"), np.cumsum(np.bincount(member))[:-1])
    random = np.random.default_rng(seed)
    found = np.array(
        [
            statistic(np.concatenate([rows[g] for g in random.integers(0, len(rows), len(rows))]))
            for _ in range(RESAMPLES)
        ],
        dtype=float,
    )
    out: list[tuple[float, float] | None] = []
    for column in found.T:
        defined = column[np.isfinite(column)]
        low, high = np.percentile(defined, [2.5, 97.5]) if 2 * len(defined) > len(column) else (np.nan, np.nan)
        out.append((float(low), float(high)) if np.isfinite(low) else None)
    return out
