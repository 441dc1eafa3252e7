"""What an evaluation task is: three functions. It has its own file so that tasks need not import their registry."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from medvlm.errors import UserError
from medvlm.evaluation.questions import Reader


class Row(NamedTuple):
    """One line of a table of results. ``value`` is a share, shown in per cent, or a ``number`` that is none; None
    where it is not defined."""

    label: str
    value: float | None
    interval: tuple[float, float] | list[float] | None
    n: int
    control: bool = False  # what a model that does not look scores; printed beside the model's number
    number: bool = False

    @property
    def shown(self) -> str:
        return "–" if self.value is None else self._show(self.value)

    @property
    def interval_shown(self) -> str:
        return "" if self.interval is None else " to ".join(map(self._show, self.interval))

    def _show(self, value: float) -> str:
        return f"{value:.4g}" if self.number else f"{100 * value:.1f}"


class Options(BaseModel):
    """What a task of its own lets the user choose; the base of each task's."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    view: tuple[str, ...] = ()  # only pictures of these views, or all


class Context(NamedTuple):
    """What a task of dual encoders gets besides the model and its items. Pictures go into the folder ``out``."""

    out: Path
    batch_size: int = 32
    seed: int = 0
    train_reader: Reader | None = None


class Task(NamedTuple):
    """``load(reader, limit, seed) -> questions``; ``evaluate(generator, questions, *, batch_size, max_new_tokens, seed,
    train_reader) -> (results, one dict per question)``; ``table(results) -> rows``. Both results are written as JSON.

    A task with ``options`` asks a dual encoder instead: ``load(reader, limit, seed, options)`` and
    ``evaluate(embedder, items, options, context)``.
    """

    load: Callable[..., list[Any]]
    evaluate: Callable[..., tuple[dict[str, Any], list[dict[str, Any]]]]
    table: Callable[[dict[str, Any]], list[Row]]
    options: type[Options] | None = None


def library(name: str) -> Any:
    """A module of a library that only evaluation needs. Raises UserError that says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.split(".")[0].replace("sklearn", "scikit-learn")
        raise UserError(f"this task needs {package}: pip install 'medvlm[eval]'") from None
