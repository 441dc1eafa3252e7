"""What an evaluation task is: three functions. It has its own file so that tasks need not import their registry."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Row(NamedTuple):
    """One line of a table of results. ``value`` is a share in [0, 1], or None where it is not defined."""

    label: str
    value: float | None
    interval: tuple[float, float] | list[float] | None
    n: int
    control: bool = False  # what a model that does not look scores; printed beside the model's number

    @property
    def shown(self) -> str:
        return "–" if self.value is None else f"{100 * self.value:.1f}"

    @property
    def interval_shown(self) -> str:
        return "" if self.interval is None else f"{100 * self.interval[0]:.1f} to {100 * self.interval[1]:.1f}"


class Task(NamedTuple):
    """``load(reader, limit, seed) -> questions``; ``evaluate(generator, questions, *, batch_size, max_new_tokens, seed,
    train_reader) -> (results, one dict per question)``; ``table(results) -> rows``. Both results are written as JSON.
    """

    load: Callable[..., list[Any]]
    evaluate: Callable[..., tuple[dict[str, Any], list[dict[str, Any]]]]
    table: Callable[[dict[str, Any]], list[Row]]
