"""Evaluation of any Hugging Face image-text-to-text model on shards.

A new task is one file and one line in ``TASKS``.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medvlm.errors import UserError
from medvlm.evaluation import vqa
from medvlm.evaluation.task import Row, Task

__all__ = ["TASKS", "Row", "Task", "run"]

TASKS: dict[str, Task] = {"vqa": vqa.TASK}


def run(
    folder: str | Path,
    task: str,
    data: Sequence[str | Path],
    out: Path,
    *,
    limit: int | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 32,
    seed: int = 0,
    as_json: bool = False,
    train_data: Sequence[str | Path] | None = None,
) -> dict[str, Any]:
    """Evaluate a model folder (or hub name) on shards; writes ``results.json`` and ``predictions.jsonl`` into ``out``.

    ``train_data`` are the shards that the model was trained on, for baselines that need them. Returns the results.
    Raises UserError for an unknown task, a folder that does not load, or data without anything to evaluate.
    """
    if task not in TASKS:
        raise UserError(f"unknown task {task!r}; there is {', '.join(sorted(TASKS))}")
    from medvlm.data.shards import ShardReader
    from medvlm.inference.generate import Generator

    chosen = TASKS[task]
    questions = chosen.load(ShardReader(list(data)), limit, seed)
    generator = Generator(folder)
    train_reader = ShardReader(list(train_data)) if train_data else None
    start = time.monotonic()
    results, predictions = chosen.evaluate(
        generator,
        questions,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        seed=seed,
        train_reader=train_reader,
    )
    results = {
        "task": task,
        "model": str(folder),
        "data": [str(path) for path in data],
        **results,
        "settings": {
            "limit": limit,
            "seed": seed,
            "max_new_tokens": max_new_tokens,
            "batch_size": batch_size,
            "device": generator.device.type,
            "dtype": str(generator.dtype).removeprefix("torch."),
        },
        "seconds": round(time.monotonic() - start, 2),
    }
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in predictions)
    (out / "predictions.jsonl").write_text(lines, encoding="utf-8")
    (out / "results.json").write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if as_json:
        print(json.dumps(results, ensure_ascii=False))
    else:
        _print_table(chosen.table(results), f"{task}: {folder}", out)
    return results


def _print_table(rows: list[Row], title: str, out: Path) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("measure", title=escape(title))
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right")
    table.add_column("n", justify="right")
    for row in rows:
        table.add_row(row.label, row.shown, row.interval_shown, str(row.n))
    console = Console()
    console.print(table)
    console.print(f"written: {out / 'results.json'}, {out / 'predictions.jsonl'}", markup=False, highlight=False)
