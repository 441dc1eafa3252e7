"""The plan: which samples, in which packs, make up each global batch, and how ranks share it.

A pure function of (index, mixture, seed, packing, lengths). A position in it is one step number; another number of
ranks or of loader workers changes who reads a sample, never what is in a step.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np

from medvlm.data.order import Order, Segment, micro_batches
from medvlm.data.packing import Packing, Packs, pack, suggest

VERSION = 1  # of what this module and those it uses compute; another version refuses older positions
Draw = tuple[int, int]  # a sample's number, and how often it had been drawn before


@dataclass(frozen=True)
class Lengths:
    """Of every sample: text tokens, and images; each image takes ``image_tokens``. Both arrays are [samples]."""

    text: np.ndarray
    images: np.ndarray
    image_tokens: int

    @property
    def tokens(self) -> np.ndarray:
        return self.text.astype(np.int64) + self.images.astype(np.int64) * self.image_tokens


class Plan:
    """Global batches of ``global_batch`` packs; without ``packing`` a pack is one sample.

    ``lengths`` are needed for packing and for ``length_grouped``, which deals the samples of a global batch to
    micro-batches by length. The last global batch of a segment (see `Order`) is smaller where its packs are not a
    multiple: nothing is dropped or doubled, and every rank takes every step. ``volume_slices`` enters the hash, as it
    changes what the model sees. ``cache`` is a folder for packed segments,
    so that a resume does not pack again.
    """

    def __init__(
        self,
        order: Order,
        global_batch: int,
        *,
        index_hash: str,
        packing: Packing | None = None,
        lengths: Lengths | None = None,
        length_grouped: bool = False,
        volume_slices: int | None = None,
        cache: Path | None = None,
    ):
        assert lengths is not None or not (packing or length_grouped)
        self.order, self.global_batch, self.packing = order, global_batch, packing
        self.lengths, self.length_grouped, self.cache = lengths, length_grouped, cache
        what = {
            "version": VERSION,
            "index": index_hash,
            "order": {**asdict(order), "sources": hashlib.sha256(repr(order.sources).encode()).hexdigest()},
            "global_batch": global_batch,
            "packing": asdict(packing) if packing else None,
        }
        if volume_slices is not None:
            what["volume_slices"] = volume_slices
        digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode())
        if packing:
            assert lengths is not None
            digest.update(lengths.tokens.tobytes())
        self.hash = digest.hexdigest()[:16]
        self._segments: list[tuple[Segment, int, int]] = []  # segment, its first step, its steps
        self._generator = order.segments()
        self._packed = lru_cache(maxsize=2)(self._load)

    def total_steps(self, epochs: float) -> int:
        """Steps of that many epochs (an epoch is as many draws as there are samples)."""
        left, steps = round(epochs * self.order.samples), 0
        for n in range(10**9):
            segment, _, count = self._segment(n)
            if segment.samples >= left:
                return steps + -(-count * left // segment.samples)
            left, steps = left - segment.samples, steps + count
        raise AssertionError

    def locate(self, step: int) -> tuple[int, int]:
        """The segment of a step, and the step's place in it."""
        for n in range(10**9):
            _, first, count = self._segment(n)
            if step < first + count:
                return n, step - first
        raise AssertionError

    def epoch(self, step: int) -> int:
        return self.locate(step)[0]

    def global_batch_at(self, step: int) -> list[list[Draw]]:
        """The packs of one step, in the plan's order."""
        segment, place = self.locate(step)
        numbers, repeats, starts = self._packed(segment)
        first = place * self.global_batch
        last = min(first + self.global_batch, len(starts) - 1)
        edges = starts[first : last + 1].tolist()
        low, high = edges[0], edges[-1]
        draws = list(zip(numbers[low:high].tolist(), repeats[low:high].tolist(), strict=True))
        return [draws[a - low : b - low] for a, b in pairwise(edges)]

    def global_batches(self, start: int, stop: int) -> Iterator[list[list[Draw]]]:
        """The packs of steps ``start`` (inclusive) to ``stop`` (exclusive)."""
        return (self.global_batch_at(step) for step in range(start, stop))

    def share(
        self, packs: list[list[Draw]], rank: int, world: int, micro: int, accumulation: int
    ) -> list[list[list[Draw]]]:
        """Rank's packs of a global batch: ``accumulation`` lists of at most ``micro`` packs, empty past the end.

        Packs are dealt by their number of images, so that at each micro-step the vision towers of all ranks have
        about the same work (the others wait for the slowest); grouped batches by length, against padding.
        """
        if self.lengths is not None:
            weight = self.lengths.images if self.packing else self.lengths.tokens
            load = [sum(int(weight[number]) for number, _ in p) for p in packs]
            packs = [packs[i] for i in sorted(range(len(packs)), key=lambda i: (-load[i], i))]
        return micro_batches(packs, rank, world, micro, accumulation)

    def describe(self, step: int, keys: Callable, world: int, micro: int, accumulation: int) -> dict:
        """``{"step", "ranks": [[[keys of a pack], ...], ...]}``; ``keys`` gives the keys of sample numbers."""
        packs = self.global_batch_at(step)
        shares = [self.share(packs, rank, world, micro, accumulation) for rank in range(world)]
        ranks = [[keys([number for number, _ in p]) for part in share for p in part] for share in shares]
        return {"step": step, "ranks": ranks}

    def advice(self) -> str:
        """How full the packs are, and a capacity that would suit these lengths better, if there is one."""
        assert self.packing and self.lengths
        fills = suggest(self.lengths.tokens, self.lengths.images, self.packing)
        now = fills[self.packing.tokens]
        best = max(fills, key=lambda size: (round(fills[size], 2), size))
        text = f"packs of {self.packing.tokens} tokens are {now:.1%} full"
        return (
            f"{text}; data.packing.tokens={best} would make it {fills[best]:.1%}" if fills[best] > now + 0.01 else text
        )

    def _segment(self, n: int) -> tuple[Segment, int, int]:
        while len(self._segments) <= n:
            segment = next(self._generator)
            first = sum(self._segments[-1][1:]) if self._segments else 0
            self._segments.append((segment, first, -(-self._count(segment) // self.global_batch)))
        return self._segments[n]

    def _count(self, segment: Segment) -> int:
        """Packs of a segment; remembered in the cache, as packing all earlier segments would delay a resume."""
        if self.packing is None:
            return segment.samples
        path = self._path(segment.number, "count")
        if path and path.exists():
            return int(path.read_text())
        count = len(self._pack(segment)[2]) - 1
        if path:
            _write(path, str(count).encode())
        return count

    def _load(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A segment's sample numbers and repeats in the order of its packs, and where each pack starts."""
        return self._pack(self._segment(number)[0])

    def _pack(self, segment: Segment) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        paths = [self._path(segment.number, f"{name}.npy") for name in ("numbers", "repeats", "starts")]
        if all(p is not None and p.exists() for p in paths):
            numbers, repeats, starts = (np.load(p, mmap_mode="r") for p in paths)  # type: ignore[arg-type]
            return numbers, repeats, starts
        numbers, repeats = self.order.draws(segment)
        if self.packing is None:
            return numbers, repeats, np.arange(len(numbers) + 1)
        assert self.lengths is not None
        packs: Packs = pack(self.lengths.tokens[numbers], self.lengths.images[numbers], self.packing)
        arrays = numbers[packs.members], repeats[packs.members], packs.starts
        for path, array in zip(paths, arrays, strict=True):
            if path is not None:
                _write(path, array)
        return arrays

    def _path(self, segment: int, name: str) -> Path | None:
        return self.cache / f"{self.hash}-{segment:05d}.{name}" if self.cache and self.packing else None


def _write(path: Path, data: bytes | np.ndarray) -> None:
    """Atomically: ranks that share a file system may write the same file at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with part.open("wb") as file:
        if isinstance(data, bytes):
            file.write(data)
        else:
            np.save(file, data)
    os.replace(part, path)
