"""``medvlm shards label``: what the rule-based labeler reads in the reports of shards, beside the labels they have."""

import json
from collections import Counter
from typing import Any

import numpy as np

from medvlm.data.labeler import LABELS, label_report
from medvlm.data.shards import ShardReader
from medvlm.data.statistics import LABEL_VALUES, Paths
from medvlm.errors import UserError


def compare(paths: Paths, limit: int | None = None) -> dict[str, Any]:
    """Read reports and count their labels, per class, as ``text``; as ``shards`` the labels of the same samples.

    Of at most ``limit`` samples, evenly spaced (None: all). A sample without any of CheXpert's labels counts as not
    labelled: ``compared`` is how many are labelled. ``same`` is the share of those with equal values, None (not
    mentioned) included, and ``f1`` that of the positives, None where there are none. Raises UserError where no sample
    has a report.
    """
    reader = ShardReader(paths)
    chosen = np.linspace(0, len(reader) - 1, min(len(reader), limit or len(reader))).astype(np.int64)
    pairs: dict[str, Counter[tuple[int | None, int | None]]] = {name: Counter() for name in LABELS}
    text: dict[str, Counter[int | None]] = {name: Counter() for name in LABELS}
    reports = compared = 0
    for number in chosen.tolist():
        sample = reader.sample(number)
        if not sample.has_report:
            continue
        reports += 1
        found = label_report(sample.report)
        labelled = any(sample.labels.get(name) is not None for name in LABELS)
        compared += labelled
        for name, value in found.items():
            text[name][value] += 1
            if labelled:
                pairs[name][sample.labels.get(name), value] += 1
    if not reports:
        raise UserError(f"{paths}: none of {len(chosen)} samples has a report to label")
    rows = {name: {"text": _counts(text[name]), **_agreement(pairs[name])} for name in LABELS}
    return {"read": len(chosen), "samples": len(reader), "reports": reports, "compared": compared, "labels": rows}


def _counts(values: Counter[int | None]) -> dict[str, int]:
    return {word: values[value] for value, word in LABEL_VALUES.items()}


def _agreement(pairs: Counter[tuple[int | None, int | None]]) -> dict[str, Any]:
    if not (total := sum(pairs.values())):
        return {"shards": None, "same": None, "f1": None}
    given: Counter[int | None] = Counter()
    for (value, _), count in pairs.items():
        given[value] += count
    positive = sum(count for pair, count in pairs.items() if 1 in pair)
    hit = pairs[1, 1]
    return {
        "shards": _counts(given),
        "same": sum(count for (a, b), count in pairs.items() if a == b) / total,
        "f1": 2 * hit / (positive + hit) if positive else None,
    }


def print_compare(report: dict[str, Any], as_json: bool = False) -> None:
    """Print a report of `compare` as JSON or as a table."""
    if as_json:
        print(json.dumps(report, indent=2))
        return
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    title = "{reports} reports of {read} samples read (of {samples}); {compared} of them have labels".format(**report)
    table = Table("label", "text + / - / ?", "shards + / - / ?", "same", "F1", title=title, box=SIMPLE)
    for name, row in report["labels"].items():
        counts = (" / ".join(map(str, row[place].values())) if row[place] else "" for place in ("text", "shards"))
        table.add_row(name, *counts, *("" if row[k] is None else f"{row[k]:.3f}" for k in ("same", "f1")))
    Console().print(table)
