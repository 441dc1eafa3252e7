"""Packing: several samples into one row of bounded length, decided before training from their lengths.

Each pack holds the oldest waiting sample and the subset of the next few that leaves the least room, found exactly: the
sums that subsets can reach are the bits of one integer. It packs tighter than best fit with a hundred open packs and
than best-fit decreasing, keeps the shuffled order nearly as it was, and needs nothing but the lengths.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packing:
    """Bounds of a pack: ``tokens`` (text and image tokens together) and ``images``.

    ``lookahead`` samples wait to be chosen from, and as many more as two packs can hold.
    """

    tokens: int
    images: int
    lookahead: int = 32


@dataclass(frozen=True)
class Packs:
    """Pack p holds the draws ``members[starts[p]:starts[p + 1]]``."""

    members: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1


def pack(tokens: np.ndarray, images: np.ndarray, packing: Packing) -> Packs:
    """Every draw into one pack. tokens, images: integers [n], of each draw in order.

    A draw that exceeds a bound gets a pack of its own: nothing is lost here. No draw is overtaken for long, as each
    pack begins with the oldest one that waits.
    """
    sizes, pictures = tokens.tolist(), images.tolist()
    members: list[int] = []
    starts = [0]
    waiting: list[int] = []
    held = following = 0
    while waiting or following < len(sizes):
        while following < len(sizes) and (len(waiting) < packing.lookahead or held < 2 * packing.tokens):
            waiting.append(following)
            held += sizes[following]
            following += 1
        room, most = packing.tokens - sizes[waiting[0]], packing.images - pictures[waiting[0]]
        chosen = _fullest([sizes[n] for n in waiting[1:]], room)
        if sum(pictures[waiting[1 + i]] for i in chosen) > most:  # rarely: choose again among what any choice may hold
            some = []
            for i, n in enumerate(waiting[1:]):
                if pictures[n] <= most:
                    some.append(i)
                    most -= pictures[n]
            chosen = [some[i] for i in _fullest([sizes[waiting[1 + i]] for i in some], room)]
        for place in [0, *(1 + i for i in chosen)]:
            members.append(waiting[place])
            held -= sizes[waiting[place]]
        for place in [*(1 + i for i in reversed(chosen)), 0]:
            del waiting[place]
        starts.append(len(members))
    return Packs(np.asarray(members, np.int64), np.asarray(starts, np.int64))


def _fullest(sizes: list[int], room: int) -> list[int]:
    """Ascending places of a subset of ``sizes`` whose sum is the largest that does not exceed ``room``.

    Bit s of ``sums`` says whether the sizes so far have a subset that sums to s. Earlier places are preferred.
    """
    if room <= 0:
        return []
    mask, top, sums = (1 << (room + 1)) - 1, 1 << room, 1
    history = []
    for size in sizes:
        history.append(sums)
        sums = (sums | sums << size) & mask
        if sums & top:
            break
    total = sums.bit_length() - 1
    chosen = []
    for place in range(len(history) - 1, -1, -1):
        if not history[place] >> total & 1:
            chosen.append(place)
            total -= sizes[place]
    return chosen[::-1]


def fill(tokens: np.ndarray, packs: Packs, capacity: int) -> float:
    """The share of the rows that holds tokens."""
    return float(tokens.sum()) / (max(len(packs), 1) * capacity)


def suggest(tokens: np.ndarray, images: np.ndarray, packing: Packing, step: int = 128) -> dict[int, float]:
    """Capacity -> fill, tried on the first 5,000 draws, from three to five quarters of the capacity asked for.

    Many samples of about one length fill some capacities badly: 2048 tokens hold three questions about images of 576
    tokens and leave a tenth of the row empty, whoever packs.
    """
    tokens, images = tokens[:5000], images[:5000]
    low = max(int(tokens.max(initial=1)), packing.tokens * 3 // 4)
    sizes = sorted({packing.tokens, *range(-(-low // step) * step, packing.tokens * 5 // 4 + 1, step)})
    fills = {}
    for size in sizes:
        packs = pack(tokens, images, Packing(size, packing.images, packing.lookahead))
        last = packs.starts[-2] if len(packs) > 1 else packs.starts[-1]  # few draws say nothing about the last pack
        whole = Packs(packs.members[:last], packs.starts[:-1]) if len(packs) > 1 else packs
        fills[size] = fill(tokens[whole.members], whole, size)
    return fills
