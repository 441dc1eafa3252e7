"""The global order: a pure function of (number of samples, seed, epoch). No state, hence nothing to lose on resume."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Order:
    """Which samples each optimizer step sees. The same global batches for every number of ranks and micro-batches.

    The last global batch of an epoch is smaller where ``samples`` is not a multiple of ``global_batch``: nothing is
    dropped or doubled. All ranks take the same number of (possibly empty) micro-batches in it.
    """

    samples: int
    global_batch: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.samples / self.global_batch)

    def epoch(self, step: int) -> int:
        return step // self.steps_per_epoch

    def permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.samples)

    def global_batches(self, start: int, stop: int) -> Iterator[list[int]]:
        """The sample numbers of steps ``start`` (inclusive) to ``stop`` (exclusive)."""
        epoch, order = -1, np.empty(0, int)
        for step in range(start, stop):
            if self.epoch(step) != epoch:
                epoch = self.epoch(step)
                order = self.permutation(epoch)
            first = step % self.steps_per_epoch * self.global_batch
            yield order[first : first + self.global_batch].tolist()


def micro_batches(batch: Sequence[int], rank: int, world: int, micro: int, accumulation: int) -> list[list[int]]:
    """Rank's share of a global batch: ``accumulation`` lists of at most ``micro`` samples, empty past its end."""
    starts = [(j * world + rank) * micro for j in range(accumulation)]
    return [list(batch[s : s + micro]) for s in starts]


def digest(keys: Sequence[str]) -> str:
    """Of a global batch's sample keys, in order; independent of how ranks share it."""
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()[:16]
