"""Results of several models side by side, with differences from a baseline on the same queries."""

import json
import re
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

from medvlm.evaluation import TASKS, Row
from medvlm.evaluation.metrics import bootstrap_interval

Values = dict[tuple, tuple[float, str]]
"""By query, its value and the patient (or study) that it is of."""


def compare(task: str, measures: list[str], found: dict[str, Path], baseline: str | None, seed: int) -> dict[str, Any]:
    """Lines of the task's table: a measure's ``entries`` (by name: value, ci95, n), then its controls.

    ``difference`` is the mean of the paired differences from the baseline, where the measure is a mean over queries;
    its interval is a bootstrap over patients.
    """
    results = {
        name: json.loads((folder / "results.json").read_text(encoding="utf-8")) for name, folder in found.items()
    }
    tables = {name: TASKS[task].table(values) for name, values in results.items()}
    lines: dict[str, dict[str, Any]] = {}
    for name, table in tables.items():
        measure = ""
        for row in table:
            if not row.control:
                measure = row.label
            if not any(fnmatch(measure.strip(), pattern) for pattern in measures):
                continue
            key = row.label if not row.control else f"{measure}/{row.label}"
            line = lines.setdefault(
                key, {"label": row.label, "control": row.control, "number": row.number, "entries": {}}
            )
            line["entries"][name] = {"value": row.value, "ci95": row.interval, "n": row.n}
    if baseline in found:
        for label, line in lines.items():
            query = _of_queries(task, label)
            if query is None or line["control"]:
                continue
            base = _read(found[baseline], query)
            line["difference"] = {
                name: _difference(_read(folder, query), base, seed)
                for name, folder in found.items()
                if name != baseline
            }
    return {"task": task, "baseline": baseline if baseline in found else None, "lines": list(lines.values())}


def shown(line: dict[str, Any], entry: str) -> str:
    """``41.2 (37.0 to 45.6)`` of an entry, or nothing where it has no such line."""
    given = line["entries"].get(entry)
    return "" if given is None else _shown(given["value"], given["ci95"], line["number"])


def shown_difference(line: dict[str, Any], entry: str) -> str:
    given = line.get("difference", {}).get(entry)
    return "" if given is None else _shown(given["value"], given["ci95"], line["number"], signed=True)


def _shown(value: float | None, interval: Any, number: bool, signed: bool = False) -> str:
    row = Row("", value, interval, 0, number=number)
    sign = "+" if signed and value is not None and value > 0 else ""
    return f"{sign}{row.shown}" + (f" ({row.interval_shown})" if interval else "")


def _of_queries(task: str, label: str) -> Callable[[dict[str, Any]], tuple[tuple, float] | None] | None:
    """For a measure that is a mean over lines of ``predictions.jsonl``: line -> query and value."""
    if task == "retrieval" and (match := re.fullmatch(r"(\w+) to (\w+): (?:recall at (\d+)|(mrr))", label)):
        direction, k = f"{match[1]}_to_{match[2]}", match[3]

        def rank(line: dict[str, Any]) -> tuple[tuple, float] | None:
            if line["direction"] != direction:
                return None
            return (line["key"], line["image"]), float(line["rank"] <= int(k)) if k else 1 / line["rank"]

        return rank
    if task == "grounding" and label == "CNR":
        return lambda line: ((line["key"], line["image"], line["label"]), line["cnr"])
    return None


def _read(folder: Path, query: Callable[[dict[str, Any]], tuple[tuple, float] | None]) -> Values:
    found = {}
    with (folder / "predictions.jsonl").open(encoding="utf-8") as file:
        for text in file:
            line = json.loads(text)
            if (one := query(line)) is not None:
                found[one[0]] = (one[1], line["group"])
    return found


def _difference(values: Values, base: Values, seed: int) -> dict[str, Any]:
    """Over the queries that both were asked."""
    common = [key for key in values if key in base]
    if not common:
        return {"value": None, "ci95": None, "n": 0}
    change = np.array([values[key][0] - base[key][0] for key in common])
    interval = bootstrap_interval(change, [values[key][1] for key in common], seed)
    return {"value": float(change.mean()), "ci95": interval, "n": len(common)}
