"""Whether each recipe of a dual encoder learns: ``medvlm study phantom_pairs``, its numbers beside goals.

    python benchmarks/phantom_pairs.py [section.key=value ...] [--out studies/phantom_pairs]

Goals, on held-out phantoms: R@1 of retrieval at least ten times chance in both directions, mean zero-shot AUROC of 0.9,
grounding CNR of 1, by patches or by occlusion. Prints a Markdown table; the exit status is 1 where a goal is missed.
Options of the study, such as ``ranks=1`` or ``entries.X=...``, may be given.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from medvlm.study import picture
from medvlm.study.compare import shown
from medvlm.study.run import run_study
from medvlm.study.schema import load_study

TIMES_CHANCE, AUROC, CNR = 10, 0.9, 1.0
R1 = ("image to text: recall at 1", "text to image: recall at 1")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--out", type=Path, default=Path("studies/phantom_pairs"))
    given = parser.parse_args()
    progress = Console(stderr=True)
    study = load_study("phantom_pairs", given.overrides)
    results = run_study(study, "phantom_pairs", given.out, tell=lambda line: progress.print(line, soft_wrap=True))
    picture.draw(results, given.out / "comparison.png")
    heads = (
        "recipe",
        *(f"{R1[n]}, % | times chance" for n in (0, 1)),
        "AUROC, %",
        "CNR of patches",
        "CNR by occlusion",
        "goals missed",
    )
    print(f"| {' | '.join(heads)} |")
    print("|---" * len(heads) + "|")
    failed = bool(results["failed"])
    for entry in results["models"]:
        cells, missed = row(results, entry)
        print(f"| `{entry}` | {' | '.join(cells)} | {', '.join(missed) or 'none'} |")
        failed |= bool(missed)
    for entry, why in results["failed"].items():
        print(f"{entry}: {why}")
    return int(failed)


def row(results: dict[str, Any], entry: str) -> tuple[list[str], list[str]]:
    """Cells of a recipe, and the goals it misses."""
    cells, missed = [], []
    retrieval = results["evaluations"]["retrieval"]["lines"]
    for name in R1:
        place = next(i for i, line in enumerate(retrieval) if line["label"] == name)
        measure, chance = retrieval[place], retrieval[place + 1]
        times = measure["entries"][entry]["value"] / chance["entries"][entry]["value"]
        cells += [shown(measure, entry), f"{times:.0f}"]
        if times < TIMES_CHANCE:
            missed.append(name)
    auroc, *cnr = (
        next(line for line in results["evaluations"][task]["lines"] if line["label"] == label)
        for task, label in (("zero_shot", "AUROC, mean of labels"), ("grounding", "CNR"), ("occlusion", "CNR"))
    )
    cells += [shown(line, entry) for line in (auroc, *cnr)]
    if auroc["entries"][entry]["value"] < AUROC:
        missed.append("AUROC")
    if max(line["entries"][entry]["value"] for line in cnr) < CNR:
        missed.append("CNR")
    return cells, missed


if __name__ == "__main__":
    sys.exit(main())
