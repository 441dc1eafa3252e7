"""The global order: a pure function of (shard sizes, mixture, seed). No state, hence nothing to lose on resume.

Samples are numbered through all shards of all sources. An epoch is as many draws as there are samples. Where nothing is
weighted, every sample is drawn once in it; else each source gives its exact share, going on where it stopped in the
epoch before, so that its own samples are all seen before any is seen again.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Stage:
    """A part of the curriculum: ``epochs`` long (None: to the end), sources drawn by ``weights`` (None: each once)."""

    epochs: float | None = None
    weights: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Segment:
    """An epoch, or the rest of a stage. ``counts`` are the draws from each source, ``before`` those already made."""

    number: int
    counts: tuple[int, ...]
    before: tuple[int, ...]

    @property
    def samples(self) -> int:
        return sum(self.counts)


@dataclass(frozen=True)
class Order:
    """``sources`` holds the number of samples of each shard of each source.

    ``window`` 0 shuffles each source as a whole. A window of n shuffles the shards, then the samples within each n
    neighbours, so that reads stay local on storage that dislikes random access.
    """

    sources: tuple[tuple[int, ...], ...]
    seed: int
    window: int = 0
    stages: tuple[Stage, ...] = (Stage(),)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(map(sum, self.sources))

    @property
    def samples(self) -> int:
        return sum(self.sizes)

    def segments(self) -> Iterator[Segment]:
        """All segments, without end."""
        number, before = 0, [0] * len(self.sources)
        for n, stage in enumerate(self.stages):
            last = n == len(self.stages) - 1 or stage.epochs is None
            left = np.inf if last else round(stage.epochs * self.samples)  # type: ignore[operator]
            while left > 0:
                draws = int(min(left, self.samples))
                weights = self.sizes if stage.weights is None else stage.weights
                counts = apportion(draws, weights)
                yield Segment(number, tuple(counts), tuple(before))
                number, left = number + 1, left - draws
                before = [b + c for b, c in zip(before, counts, strict=True)]

    def draws(self, segment: Segment) -> tuple[np.ndarray, np.ndarray]:
        """The sample numbers of a segment in order, and how often each had been drawn before: both [samples]."""
        parts = [self._stream(s, b, c) for s, (b, c) in enumerate(zip(segment.before, segment.counts, strict=True))]
        numbers, repeats = (_joined([part[i] for part in parts]) for i in range(2))
        if len(parts) > 1:  # spread each source evenly: its j-th draw of c falls at random into the j-th of c strata
            rng = np.random.default_rng([self.seed, segment.number, len(parts)])
            place = np.concatenate([(np.arange(c) + rng.random(c)) / c for c in segment.counts if c])
            mixed = np.argsort(place, kind="stable")
            numbers, repeats = numbers[mixed], repeats[mixed]
        return numbers, repeats

    def _stream(self, source: int, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """``count`` draws of a source from position ``start`` of its endless sequence of permutations."""
        size, first = self.sizes[source], sum(self.sizes[:source])
        numbers: list[np.ndarray] = []
        repeats: list[np.ndarray] = []
        while count > 0:
            repeat, offset = divmod(start, size)
            taken = self._permutation(source, repeat)[offset : offset + count]
            numbers.append(taken + taken.dtype.type(first) if first else taken)
            repeats.append(np.full(len(taken), repeat, np.int32))
            start, count = start + len(taken), count - len(taken)
        return _joined(numbers), _joined(repeats)

    def _permutation(self, source: int, repeat: int) -> np.ndarray:
        shards = np.asarray(self.sources[source])
        rng = np.random.default_rng([self.seed, repeat, source])
        kind = np.int32 if self.samples < 2**31 else np.int64  # half the memory, and quicker to shuffle
        if not self.window:
            numbers = np.arange(shards.sum(), dtype=kind)
            rng.shuffle(numbers)
            return numbers
        starts = np.cumsum(shards) - shards
        order = rng.permutation(len(shards))
        windows = [order[i : i + self.window] for i in range(0, len(order), self.window)]
        parts = []
        for window in windows:
            part = np.concatenate([np.arange(starts[s], starts[s] + shards[s], dtype=kind) for s in window])
            rng.shuffle(part)
            parts.append(part)
        return np.concatenate(parts)


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    if not arrays:
        return np.empty(0, np.int32)
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """``total`` divided in proportion to the weights, in whole numbers that sum to it (largest remainders)."""
    exact = np.asarray(weights, float) / np.sum(weights) * total
    counts = np.floor(exact + 1e-9).astype(int)
    for i in np.argsort(counts - exact, kind="stable")[: total - counts.sum()]:
        counts[i] += 1
    return counts.tolist()


def temperature_weights(sizes: Sequence[int], temperature: float) -> tuple[float, ...]:
    """Size to the power 1/T: T = 1 keeps the proportions of the data, a large T draws all sources alike."""
    return tuple(float(size) ** (1 / temperature) for size in sizes)


def micro_batches(batch: Sequence, rank: int, world: int, micro: int, accumulation: int) -> list[list]:
    """Rank's share of a global batch: ``accumulation`` lists of at most ``micro`` entries, empty past its end."""
    starts = [(j * world + (rank if j % 2 == 0 else world - 1 - rank)) * micro for j in range(accumulation)]
    return [list(batch[s : s + micro]) for s in starts]


def digest(keys: Sequence[str]) -> str:
    """Of a global batch's sample keys, in order; independent of how ranks share it."""
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()[:16]
