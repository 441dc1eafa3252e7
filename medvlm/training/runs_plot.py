"""Curves of several runs side by side, as a picture."""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from medvlm.errors import UserError
from medvlm.training.runs import CURVES, SPACE, TITLES, curves

SMOOTHING = 50  # steps of the moving average, at most; a tenth of a short run


def plot(runs: list[Path], out: Path) -> None:
    """Write a PNG (or what the ending of ``out`` says) with one panel per curve and one colour per run; those of joint
    spaces are there if a run has one."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("matplotlib is not installed; pip install 'medvlm[eval]', or leave out --out") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = [curves(run) for run in runs]
    names = [*CURVES, *(name for name in SPACE if any(name in one for one in found))]
    rows = -(-(len(names) + 1) // 3)
    figure, grid = pyplot.subplots(rows, 3, figsize=(15, 4 * rows), layout="constrained")
    axes = dict(zip(names, grid.flat, strict=False))
    labels = _labels(runs)
    for n, one in enumerate(found):
        for name, points in one.items():
            _draw(axes[name], name, points, f"C{n}")
    for name, axis in axes.items():
        axis.set(title=TITLES[name], xlabel="step")
        axis.grid(alpha=0.3)
        if not axis.lines:
            axis.text(0.5, 0.5, "none recorded", ha="center", va="center", transform=axis.transAxes, color="grey")
    axes["grad_norm"].set_yscale("log")
    for empty in grid.flat[len(names) :]:
        empty.axis("off")
    legend = grid.flat[-1]
    handles = [pyplot.Line2D([], [], color=f"C{n}", linewidth=2) for n in range(len(runs))]
    legend.legend(handles, labels, loc="center", frameon=False, title="runs", fontsize=11)
    try:
        figure.savefig(out, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(f"--out {out}: {error}") from error
    finally:
        pyplot.close(figure)


def _draw(axis: Any, name: str, points: list[tuple[int, float]], color: str) -> None:
    if not points:
        return
    steps, values = zip(*points, strict=True)
    if name in ("loss", "grad_norm", "tokens_per_second"):
        window = max(1, min(SMOOTHING, len(values) // 10))
        axis.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        axis.plot(steps, moving_average(values, window), color=color, linewidth=1.6)
    else:
        marker = "o" if name.startswith("eval_") else None
        axis.plot(steps, values, color=color, linewidth=1.6, marker=marker, markersize=4)


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """Of ``window`` values around each (one more if that is even), of fewer at both ends."""
    half = window // 2
    sums = [0.0, *accumulate(values)]
    bounds = [(max(0, n - half), min(len(values), n + half + 1)) for n in range(len(values))]
    return [(sums[stop] - sums[start]) / (stop - start) for start, stop in bounds]


def _labels(runs: list[Path]) -> list[str]:
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]
