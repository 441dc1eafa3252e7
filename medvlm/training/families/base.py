"""The interface of a family."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from medvlm.config.schema import RunConfig
from medvlm.data.loader import MicroBatches
from medvlm.training.flops import Unit

Phase = Callable[[str], AbstractContextManager[Any]]


@dataclass
class Pass:
    """What a family's forward and backward passes of one update are given.

    ``targets`` and ``counts`` are sums over the global batch; ``world`` ranks hold a part of it each, and each takes
    ``accumulation`` micro-batches. ``seed`` differs by step and rank.
    """

    config: RunConfig
    engine: Any
    device: torch.device
    targets: int
    counts: Mapping[str, int]
    world: int
    accumulation: int
    seed: int
    phase: Phase

    def backward(self, share: Tensor) -> None:
        """Of this rank's share of the global loss: DeepSpeed divides by the accumulation steps and averages over ranks,
        and both are undone."""
        with self.phase("backward"):
            self.engine.backward(share * (self.world * self.accumulation))


@dataclass
class Outcome:
    """This rank's share of the global loss, the same by component where there are several, and which of its
    micro-batches gave numbers that are not finite. ``values`` are the same on all ranks, for the step's line."""

    share: Tensor
    finite: list[bool]
    components: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)


class Family(ABC):
    targets: str
    """What the loss is averaged over, as `Batch.targets` counts it: the name of its column in ``metrics.jsonl``."""
    counted: tuple[str, ...] = ()
    """Further numbers of a batch, attributes of it, whose sums over the global batch the passes need."""
    image_parts: tuple[str, ...]
    """Parts of the model that work on images; the others work on tokens."""

    @abstractmethod
    def components(self, config: RunConfig) -> Any:
        """Everything but the weights. Raises UserError where a folder lacks it."""

    @abstractmethod
    def build(self, config: RunConfig, parts: Any, dtype: torch.dtype, ds_config: dict[str, Any] | None) -> Any:
        """The model; born sharded if ``ds_config`` says ZeRO-3."""

    @abstractmethod
    def dataset(self, config: RunConfig, parts: Any, paths: list[str], *, training: bool) -> MicroBatches:
        """What makes batches of shards."""

    @abstractmethod
    def check_memory(self, config: RunConfig, parts: Any, data: MicroBatches, ds_config: dict[str, Any]) -> None:
        """Before the model is made: warn where a step is not likely to fit, raise UserError where it cannot."""

    @abstractmethod
    def passes(self, given: Pass, batches: Sequence[Any]) -> Outcome:
        """Forward and backward of all micro-batches of this rank, ``engine.step`` between them but not after."""

    @abstractmethod
    def validate(self, session: Any) -> dict[str, float]:
        """Over the validation shards; ``eval_loss`` among the results. All ranks call this."""

    @abstractmethod
    def unit(self, model: nn.Module, part: str, module: nn.Module, rows: Tensor) -> str:
        """Of what a layer's work is counted: ``images``, or a name for which a step has a count and of which ``rows``,
        the layer's input, holds one per row."""

    def repeated(self, config: RunConfig, accumulation: int, unit: Unit) -> float:
        """The share of the forward work that is counted by ``unit`` which a step does twice."""
        return 0.0

    def text_passes(self, config: RunConfig) -> int:
        """How often a step's tokens go through the model."""
        return 1

    @abstractmethod
    def save_processor(self, parts: Any, folder: Any) -> None:
        """Tokenizer and image processor into a folder."""
