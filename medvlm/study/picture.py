"""The comparison of a study as a picture: a point with its interval for each entry and measure."""

from pathlib import Path
from typing import Any

from medvlm.data.page import require

CONTROL = "#8a8f98"


def draw(results: dict[str, Any], out: Path) -> None:
    """Write a PNG: a panel for each evaluation and unit; grey marks are chance, or another control.

    Raises UserError without matplotlib.
    """
    figures = require("matplotlib.figure")
    panels = [
        (f"{key}{' (%)' if not number else ''}", lines, number)
        for key, found in results["evaluations"].items()
        for number in (False, True)
        if (lines := _measures(found["lines"], number))
    ]
    if not panels:
        return
    entries = list(dict.fromkeys(name for _, lines, _ in panels for m, _ in lines for name in m["entries"]))
    heights = [0.6 + len(lines) * (0.22 * len(entries) + 0.25) for _, lines, _ in panels]
    figure = figures.Figure(figsize=(8, sum(heights) + 0.8), layout="constrained")
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (title, lines, number) in zip(grid, panels, strict=True):
        _panel(axis, lines, entries, 1 if number else 100)
        axis.set_title(title, loc="left", fontsize=10)
    handles, names = grid[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper left", ncols=min(4, len(names)), frameon=False, fontsize=9)
    figure.savefig(out, dpi=150)


def _measures(lines: list[dict[str, Any]], number: bool) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Measures of one unit, each with the controls that follow it."""
    found: list[tuple[dict[str, Any], list[dict[str, Any]]]] = []
    for line in lines:
        if not line["control"]:
            found.append((line, []))
        elif found:
            found[-1][1].append(line)
    return [(m, controls) for m, controls in found if m["number"] == number]


def _panel(axis: Any, lines: list[tuple[dict[str, Any], list[dict[str, Any]]]], entries: list[str], scale: int) -> None:
    step = 0.8 / max(1, len(entries))
    for row, (measure, controls) in enumerate(lines):
        for n, name in enumerate(entries):
            given = measure["entries"].get(name)
            y = row + (n - (len(entries) - 1) / 2) * step
            label = name if row == 0 else None
            if given is None or given["value"] is None:
                axis.plot([], [], "o", color=f"C{n}", label=label)
                continue
            value = given["value"] * scale
            low, high = (scale * v for v in given["ci95"]) if given["ci95"] else (value, value)
            # a percentile interval need not hold the value itself
            spread = [[max(0, value - low)], [max(0, high - value)]]
            axis.errorbar(value, y, xerr=spread, fmt="o", color=f"C{n}", capsize=3, markersize=5, label=label)
            for control in controls:
                other = control["entries"].get(name)
                if other and other["value"] is not None:
                    axis.plot(other["value"] * scale, y, "|", color=CONTROL, markersize=11, markeredgewidth=2)
    axis.plot([], [], "|", color=CONTROL, markersize=11, markeredgewidth=2, label="chance or control")
    axis.set_yticks(range(len(lines)), [measure["label"].strip() for measure, _ in lines], fontsize=9)
    axis.set_ylim(len(lines) - 0.5, -0.5)
    axis.grid(axis="x", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
