"""Memory and file descriptors over a long run: the loader with workers, and a million samples through the reader.

    python benchmarks/soak.py [--steps 30000] [--samples 1000000] [--workers 2]

The first part takes steps through the loader of training (read, decode, tokenise, collate) as quickly as it gives
them: at an optimizer step of 0.12 s, 30,000 are an hour. The second reads single samples from 200 tars with at most 64
open. Both print own memory (USS) and descriptors at intervals. Exits with 1 where the last tenth has 8 MiB and 5 %
more memory than the second, or 16 descriptors more: tensors on their way to the main process hold some.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch
from transformers import AutoTokenizer
from transformers.models.siglip import SiglipImageProcessor

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import toy

from medvlm.data.conversation import ConversationEncoder, multimodal_template
from medvlm.data.images import ImageTransform
from medvlm.data.loader import MicroBatches, SampleEncoder, collate, load_batches
from medvlm.data.shards import ShardReader, merge_index, write_shards

INTERVALS = 10


def state(process: psutil.Process) -> tuple[float, int]:
    """Own memory in MiB, and open descriptors."""
    return process.memory_full_info().uss / 2**20, process.num_fds()


def flat(curve: list[tuple[float, int]]) -> bool:
    (memory, files), (last_memory, last_files) = curve[1], curve[-1]
    return last_memory - memory <= max(8, 0.05 * memory) and last_files <= files + 16


def show(title: str, curves: dict[str, list[tuple[float, int]]]) -> bool:
    print(f"### {title}\n")
    print("| process | " + " | ".join(f"{n}/{INTERVALS}" for n in range(1, INTERVALS + 1)) + " | flat |")
    print("|---" * (INTERVALS + 2) + "|")
    for name, curve in curves.items():
        cells = [f"{memory:.0f} MiB, {files} files" for memory, files in curve]
        print(f"| {name} | " + " | ".join(cells) + f" | {'yes' if flat(curve) else 'NO'} |")
    print(flush=True)
    return all(map(flat, curves.values()))


def soak_loader(folder: Path, steps: int, workers: int, rows: int = 4) -> bool:
    tokenizer = AutoTokenizer.from_pretrained(toy.make_tokenizer(folder / "tokenizer"))
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    conversation = ConversationEncoder(tokenizer, multimodal_template(toy.TEMPLATE), 4)
    transform = ImageTransform(SiglipImageProcessor(size={"height": 32, "width": 32}))
    reader = ShardReader(toy.make_shards(folder / "shards", 2000))
    rows = partial(collate, pad_id=3, image_size=32, padding_free=False)
    dataset = MicroBatches(reader, SampleEncoder(conversation, transform, 256), rows)

    def draws() -> Iterator[list[tuple[int, int]]]:
        rng = np.random.default_rng(0)
        for step in range(steps):
            yield [(int(n), step * rows // len(reader)) for n in rng.integers(0, len(reader), rows)]

    start, tokens = time.perf_counter(), 0
    curves: dict[str, list[tuple[float, int]]] = {}
    main = psutil.Process()
    for step, batch in enumerate(load_batches(dataset, draws(), workers), 1):
        assert not batch.quarantined, batch.quarantined
        tokens += batch.tokens
        if step * INTERVALS % steps < INTERVALS:
            # In a fixed order; the loader's helper processes, which hold no data, come after its workers.
            for n, process in enumerate([main, *sorted(main.children(), key=lambda p: p.pid)][: workers + 1]):
                curves.setdefault("main" if n == 0 else f"worker {n}", []).append(state(process))
    spent = time.perf_counter() - start
    title = f"{steps:,} steps of {rows} samples with {workers} workers: {steps / spent:.0f} steps/s, {tokens:,} tokens"
    return show(title, curves)


def soak_reader(folder: Path, count: int) -> bool:
    per, tars = 100, 200
    items = (toy.sample(i, i % 2, ["no"]) for i in range(per * tars))
    write_shards(items, folder / "many", "x", samples_per_shard=per)
    merge_index(folder / "many")
    reader = ShardReader(folder / "many")
    rng, main, curve = np.random.default_rng(0), psutil.Process(), []
    start = time.perf_counter()
    for part in range(INTERVALS):
        for i in rng.integers(0, len(reader), count // INTERVALS).tolist():
            sample, _ = reader.load(i)
            assert sample.key == reader.key(i), part
        curve.append(state(main))
    spent = time.perf_counter() - start
    return show(f"{count:,} samples at random from {tars} tars: {count / spent:,.0f} samples/s", {"reader": curve})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30_000)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, Python {sys.version.split()[0]}, torch {torch.__version__}\n")
    with tempfile.TemporaryDirectory() as name:
        good = [soak_loader(Path(name), options.steps, options.workers), soak_reader(Path(name), options.samples)]
    sys.exit(0 if all(good) else 1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
