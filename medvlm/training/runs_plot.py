"""Curves of several runs side by side, as a picture."""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from medvlm.errors import UserError
from medvlm.training.runs import CURVES, curves

TITLES = {
    "loss": "training loss per supervised token",
    "eval_loss": "evaluation loss",
    "grad_norm": "gradient norm",
    "lr": "learning rate (highest of the parts)",
    "tokens_per_second": "tokens per second",
}
SMOOTHING = 50  # steps of the moving average, at most; a tenth of a short run


def plot(runs: list[Path], out: Path) -> None:
    """Write a PNG (or what the ending of ``out`` says) with one panel per curve and one colour per run."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("matplotlib is not installed; pip install 'medvlm[eval]', or leave out --out") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(2, 3, figsize=(15, 8), layout="constrained")
    axes = dict(zip(CURVES, grid.flat, strict=False))
    labels = _labels(runs)
    for n, run in enumerate(runs):
        for name, points in curves(run).items():
            _draw(axes[name], name, points, f"C{n}")
    for name, axis in axes.items():
        axis.set(title=TITLES[name], xlabel="step")
        axis.grid(alpha=0.3)
        if not axis.lines:
            axis.text(0.5, 0.5, "none recorded", ha="center", va="center", transform=axis.transAxes, color="grey")
    axes["grad_norm"].set_yscale("log")
    legend = grid.flat[-1]
    legend.axis("off")
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
        axis.plot(steps, values, color=color, linewidth=1.6, marker="o" if name == "eval_loss" else None, markersize=4)


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """Of ``window`` values around each (one more if that is even), of fewer at both ends."""
    half = window // 2
    sums = [0.0, *accumulate(values)]
    bounds = [(max(0, n - half), min(len(values), n + half + 1)) for n in range(len(values))]
    return [(sums[stop] - sums[start]) / (stop - start) for start, stop in bounds]


def _labels(runs: list[Path]) -> list[str]:
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]
