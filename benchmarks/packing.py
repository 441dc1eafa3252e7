"""Fill and speed of packing beside TRL's best-fit decreasing and the greedy knapsack of the `binpacking` package.

    python benchmarks/packing.py [--samples 200000]

Peers are measured where they can be imported (`pip install trl binpacking`). Lengths: 60 % questions about an image of
576 tokens (20 to 60 tokens of text), 25 % reports of one (about 200), 15 % text (20 to 760); 622 tokens on average.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from medvlm.data.packing import Packing, pack


def mix(n: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    kind = rng.random(n)
    report = np.clip(rng.normal(200, 60, n), 50, 500)
    text = np.where(kind < 0.6, rng.integers(20, 61, n), np.where(kind < 0.85, report, rng.integers(20, 760, n)))
    return text.astype(np.int64) + 576 * (kind < 0.85), (kind < 0.85).astype(np.int64)


def timed(call: Callable) -> tuple[float, Any]:
    started = time.process_time()
    result = call()
    return time.process_time() - started, result


def ours(tokens: np.ndarray, images: np.ndarray, capacity: int) -> tuple[float, list]:
    seconds, packs = timed(lambda: pack(tokens, images, Packing(capacity, 64)))
    return seconds, np.split(packs.members, packs.starts[1:-1])


def trl(tokens: np.ndarray, _: np.ndarray, capacity: int) -> tuple[float, list]:
    """Its time holds the moving of the tokens, as it packs a table and not lengths."""
    import pyarrow as pa
    from trl.data_utils import _pack_bfd  # what SFTConfig(packing=True) calls

    offsets = np.concatenate([[0], np.cumsum(tokens)]).astype(np.int32)
    ids = pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.repeat(np.arange(len(tokens)), tokens)))
    seconds, table = timed(lambda: _pack_bfd(pa.table({"input_ids": ids}), capacity, "truncate"))
    return seconds, [np.unique(row.values) for row in table["input_ids"]]


def knapsack(tokens: np.ndarray, _: np.ndarray, capacity: int) -> tuple[float, list]:
    import binpacking

    numbered = list(enumerate(tokens.tolist()))
    windows = [numbered[i : i + 1000] for i in range(0, len(numbered), 1000)]  # as ms-swift calls it
    seconds, packed = timed(lambda: [binpacking.to_constant_volume(w, capacity, weight_pos=1) for w in windows])
    return seconds, [[n for n, _ in p] for window in packed for p in window]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=200_000)
    tokens, images = mix(parser.parse_args().samples)
    packers: dict[str, Callable] = {
        "medvlm": ours,
        "TRL best-fit decreasing": trl,
        "greedy knapsack, windows of 1000": knapsack,
    }
    print("| packer | capacity | full | thousand samples/s | images per pack, mean and s.d. |\n|---|---|---|---|---|")
    for capacity in (2048, 4096, 8192):
        for name, packer in packers.items():
            try:
                seconds, packs = packer(tokens, images, capacity)
            except ImportError as error:
                print(f"| {name} | {capacity} | not measured: {error} | | |")
                continue
            assert sorted(n for p in packs for n in p) == list(range(len(tokens)))
            full = tokens.sum() / (len(packs) * capacity)
            held = np.array([images[np.asarray(p)].sum() for p in packs])
            rate = len(tokens) / seconds / 1000
            print(f"| {name} | {capacity} | {full:.2%} | {rate:.0f} | {held.mean():.1f} ± {held.std():.1f} |")


if __name__ == "__main__":
    main()
