"""Evaluation of any Hugging Face image-text-to-text model, or dual encoder, on shards.

A new task is one file and one line in ``TASKS``.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from medvlm.errors import UserError
from medvlm.evaluation import (
    embedding_space,
    grounding,
    linear_probe,
    precision_at_k,
    retrieval,
    vqa,
    zero_shot,
)
from medvlm.evaluation.task import Context, Options, Row, Task

__all__ = ["TASKS", "Row", "Task", "run"]

TASKS: dict[str, Task] = {
    "vqa": vqa.TASK,
    "retrieval": retrieval.TASK,
    "precision_at_k": precision_at_k.TASK,
    "zero_shot": zero_shot.TASK,
    "linear_probe": linear_probe.TASK,
    "grounding": grounding.TASK,
    "embedding_space": embedding_space.TASK,
}


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
    options: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Evaluate a model folder (or hub name) on shards; writes ``results.json`` and ``predictions.jsonl`` into ``out``.

    ``train_data`` are the shards that the model was trained on, for baselines that need them, or the labelled ones that
    a probe learns from. ``options`` are those of the task. Returns the results. Raises UserError for an unknown task or
    option, a folder that does not load, or data without anything to evaluate.
    """
    if task not in TASKS:
        raise UserError(f"unknown task {task!r}; there is {', '.join(sorted(TASKS))}")
    from medvlm.data.shards import ShardReader

    chosen, out = TASKS[task], Path(out)
    given = task_options(task, options or {})
    reader = ShardReader(list(data))
    train_reader = ShardReader(list(train_data)) if train_data else None
    model: Any
    if given is None:
        from medvlm.inference.generate import Generator

        questions = chosen.load(reader, limit, seed)
        model = Generator(folder, trust_remote_code=trust_remote_code)
        start = time.monotonic()
        results, predictions = chosen.evaluate(
            model,
            questions,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            seed=seed,
            train_reader=train_reader,
        )
        settings: dict[str, Any] = {"max_new_tokens": max_new_tokens}
    else:
        from medvlm.inference.embed import Embedder

        items = chosen.load(reader, limit, seed, given)
        model = Embedder(folder, trust_remote_code=trust_remote_code)
        start = time.monotonic()
        results, predictions = chosen.evaluate(model, items, given, Context(out, batch_size, seed, train_reader))
        results["n_truncated_texts"] = len(model.truncated)
        settings = {**given.model_dump(mode="json"), "logit_scale": model.logit_scale, "max_length": model.max_length}
    results = {
        "task": task,
        "model": str(folder),
        "data": [str(path) for path in data],
        **results,
        "settings": {
            "limit": limit,
            "seed": seed,
            **settings,
            "batch_size": batch_size,
            "device": model.device.type,
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        "seconds": round(time.monotonic() - start, 2),
    }
    out.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in predictions)
    (out / "predictions.jsonl").write_text(lines, encoding="utf-8")
    (out / "results.json").write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if as_json:
        print(json.dumps(results, ensure_ascii=False))
    else:
        _print_table(chosen.table(results), f"{task}: {folder}", out)
        if results.get("n_truncated_texts"):
            print(f"{results['n_truncated_texts']} text(s) were cut to {model.max_length} tokens")
    return results


def task_options(task: str, given: Mapping[str, Any]) -> Options | None:
    """The options of a task, checked; None for a task without any. Raises UserError naming the option."""
    kind = TASKS[task].options
    known = set(kind.model_fields) if kind else set()
    for name in given:
        if name not in known:
            of = [t for t, other in TASKS.items() if other.options and name in other.options.model_fields]
            raise UserError(f"{_flag(name)}: is no option of task {task}; it is one of {', '.join(of) or 'no task'}")
    if kind is None:
        return None
    try:
        return kind.model_validate(dict(given))
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{_flag(str(first['loc'][0]))}: {first['msg'].removeprefix('Value error, ')}") from None


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


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
