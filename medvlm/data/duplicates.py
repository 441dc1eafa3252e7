"""Near-duplicate images and texts in sets of hundreds of thousands, without comparing all pairs.

Images: a 256-bit perceptual hash (DCT). On 240 chest X-rays half the size and re-encoding moved it by at most 8 bits,
another contrast by 8 (median) to 24, and different images were at least 56 apart; 64 bits do not separate X-rays.
Texts: MinHash over word triples with locality-sensitive hashing.
"""

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from medvlm.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

BITS = 256
THRESHOLD = 12  # bits; a starting point, not measured on every kind of image
SIMILARITY = 0.9  # Jaccard index of the word triples
SHORTEST_TEXT = 20  # words: short answers and "no acute findings" are alike without being copies
PERMUTATIONS = 64
_ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1)  # bits set in a byte


def image_hash(image: "Image") -> np.ndarray:
    """The phash256 of an image: uint8 [32]. An inverted image has about the inverted hash; mirrored or cropped not."""
    try:
        import imagehash
    except ImportError:
        raise UserError("imagehash: is not installed, near duplicates need it; pip install 'medvlm[prep]'") from None
    return np.packbits(imagehash.phash(image.convert("L"), hash_size=16).hash.reshape(-1))


def near_images(
    hashes: np.ndarray, threshold: int = THRESHOLD, inverted: bool = True
) -> Iterator[tuple[int, int, int]]:
    """Pairs (i, j, distance in bits) with i < j and distance <= ``threshold``; ``hashes`` is uint8 [N, 32].

    Exact: the bits are cut into ``threshold + 1`` bands, and of two hashes that differ in at most ``threshold`` bits at
    least one band is equal, so only hashes that share a band are compared. N log N for each band, and then the pairs
    that share one: of X-rays about 1 in 10 000 of all pairs. ``inverted`` also finds copies with black and white
    swapped. Identical hashes are paired with the first of their kind, which alone stands for them in other pairs.
    """
    packed = np.ascontiguousarray(hashes, np.uint8)
    if len(packed) < 2:
        return
    unique, group = np.unique(packed, axis=0, return_inverse=True)
    members: dict[int, list[int]] = {}
    for i, g in enumerate(group.reshape(-1).tolist()):
        members.setdefault(g, []).append(i)
    for rows in members.values():
        yield from ((rows[0], row, 0) for row in rows[1:])
    for a, b, distance in _near_rows(unique, threshold, inverted):
        i, j = sorted((members[a][0], members[b][0]))
        yield i, j, distance


def _near_rows(rows: np.ndarray, threshold: int, inverted: bool) -> Iterator[tuple[int, int, int]]:
    both = np.concatenate([rows, ~rows]) if inverted else rows
    bits = np.unpackbits(both, axis=1)
    count, bands = len(rows), threshold + 1
    seen: set[tuple[int, int]] = set()
    for band in range(bands):
        # every 13th bit: low frequencies, alike in all X-rays, are shared out among the bands
        for left, right in _same_band(np.packbits(bits[:, band::bands], axis=1)):
            distances = _ONES[both[left] ^ both[right]].sum(axis=1)
            near = distances <= threshold
            for a, b, distance in zip(left[near].tolist(), right[near].tolist(), distances[near].tolist(), strict=True):
                low, high = min(a, b), max(a, b)
                if low >= count or high - count == low:
                    continue  # two inverted rows are the pair of the rows themselves
                pair = (min(low, high % count), max(low, high % count))
                if pair not in seen:
                    seen.add(pair)
                    yield *pair, int(distance)


def _same_band(band: np.ndarray, longest: int | None = None, block: int = 1 << 18) -> Iterator[tuple[np.ndarray, ...]]:
    """Pairs of rows that are equal in uint8 [N, bytes], in blocks; each row with its ``longest`` next at most."""
    padded = np.zeros((len(band), -(-band.shape[1] // 8) * 8), np.uint8)
    padded[:, : band.shape[1]] = band
    keys = padded.view(np.uint64)
    order = np.lexsort(keys.T)
    ends = np.flatnonzero(np.append((keys[order[1:]] != keys[order[:-1]]).any(axis=1), True))  # of each run of equals
    run_end = ends[np.searchsorted(ends, np.arange(len(order)))]
    lag, alive = 1, np.arange(len(order))
    while len(alive := alive[alive + lag <= run_end[alive]]) and lag <= (longest or lag):
        for start in range(0, len(alive), block):
            part = alive[start : start + block]
            yield order[part], order[part + lag]
        lag += 1


def text_hash(text: str) -> np.ndarray | None:
    """The MinHash of a text's word triples: uint32 [64]; None for texts under 20 words."""
    try:
        from datasketch import MinHash
    except ImportError:
        raise UserError("datasketch: is not installed, near duplicates need it; pip install 'medvlm[prep]'") from None
    words = re.findall(r"\w+", text.lower())
    if len(words) < SHORTEST_TEXT:
        return None
    sketch = MinHash(num_perm=PERMUTATIONS, seed=1)
    sketch.update_batch([" ".join(words[i : i + 3]).encode() for i in range(len(words) - 2)])
    return sketch.hashvalues.astype(np.uint32)


def near_texts(hashes: np.ndarray, similarity: float = SIMILARITY) -> Iterator[tuple[int, int, float]]:
    """Pairs (i, j, estimated Jaccard index) with i < j, of MinHashes uint32 [N, 64].

    Probabilistic: 8 bands of 8 values find a pair of similarity 0.9 with 99 % and of 0.95 with 99.9 %; the estimate's
    standard error is at most 0.063. In a band at most the 64 next of equal texts are compared, since thousands of
    reports may share a template. Identical hashes are paired with the first of their kind.
    """
    values, group = np.unique(np.ascontiguousarray(hashes, np.uint32), axis=0, return_inverse=True)
    first = np.full(len(values), -1)
    for i, g in enumerate(group.reshape(-1).tolist()):
        if first[g] < 0:
            first[g] = i
        else:
            yield int(first[g]), i, 1.0
    seen: set[tuple[int, int]] = set()
    for band in range(0, PERMUTATIONS, 8):
        for left, right in _same_band(np.ascontiguousarray(values[:, band : band + 8]).view(np.uint8), longest=64):
            estimates = (values[left] == values[right]).mean(axis=1)
            near = estimates >= similarity
            for a, b, estimate in zip(first[left[near]], first[right[near]], estimates[near], strict=True):
                pair = (int(min(a, b)), int(max(a, b)))
                if pair not in seen:
                    seen.add(pair)
                    yield *pair, float(estimate)


def clusters(count: int, pairs: Iterable[tuple[int, int, float]]) -> dict[int, list[int]]:
    """Connected components of more than one member, by their smallest member."""
    parent = list(range(count))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for i, j, _ in pairs:
        a, b = sorted((root(i), root(j)))
        parent[b] = a
    found: dict[int, list[int]] = {}
    for i in range(count):
        found.setdefault(root(i), []).append(i)
    return {i: members for i, members in found.items() if len(members) > 1}
