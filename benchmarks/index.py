"""The index of ten million samples: time to open it, memory of the process and of loader workers, rows per second.

    python benchmarks/index.py [--rows 10000000]      about two minutes and 2 GB of disk

One real tar of 1000 short conversations lies under 10,000 names, so that samples are really read; every row has a key
of its own. The first run has the index out of the page cache.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
from reading import BATCH, Loaded, in_a_fresh_process, loader_of, samples, table

from medvlm.data.index import MERGED, Tar, read_index
from medvlm.data.merged import Merger
from medvlm.data.shards import ShardReader, index_path, write_shards


def drop_from_memory(*paths: Path) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def make_large_index(folder: Path, rows: int) -> list[tuple]:
    """One real tar of 1000 samples under many names, with an index in which every sample has a key of its own."""
    tar = write_shards(samples(1000, 0), folder / "one", "x")[0]
    part, (described,) = read_index(index_path(tar), "")
    (folder / "many").mkdir()
    merger, spent, before = Merger(folder / "many"), 0.0, uss()
    for n in range(rows // described.samples):
        os.link(tar, folder / "many" / f"x-{n:06d}.tar")
        keys, table = pa.array([f"study{n * 1000 + i:08d}-train" for i in range(1000)], pa.large_string()), part
        for name in ("key", "group"):
            table = table.set_column(table.schema.get_field_index(name), name, keys)
        start = time.process_time()
        merger.add(table, [Tar(f"x-{n:06d}.tar", described.size, described.samples, described.digest)])
        spent += time.process_time() - start
    start = time.process_time()
    merger.write(folder / "many" / MERGED)
    spent += time.process_time() - start
    return [("merge", f"{spent:.1f} CPU-s"), ("memory of the process that merges", f"+{uss() - before:.0f} MiB")]


def uss(process: psutil.Process | None = None) -> float:
    """Memory that a process has for itself, in MiB: not what it shares, such as a mapped index."""
    return (process or psutil.Process()).memory_full_info().uss / 2**20


def open_large_index(folder: Path) -> list[tuple]:
    before, start = uss(), time.perf_counter()
    reader = ShardReader(folder)
    opened = time.perf_counter() - start
    resident = psutil.Process().memory_info().rss / 2**20
    rows: list[tuple] = [("open", f"{opened:.2f} s"), ("memory of the process", f"+{uss() - before:.0f} MiB")]
    rows.append(("resident, mapped pages and libraries included", f"{resident:.0f} MiB"))

    def timed(what: str, work: Callable[[], Any], per: int = 0) -> None:
        clock = time.process_time if per else time.perf_counter
        start = clock()
        work()
        spent = clock() - start
        rows.append((what, f"{per / spent / 1e3:.0f} k per CPU-second" if per else f"{spent * 1e3:.1f} ms"))

    picks = np.random.default_rng(0).integers(0, len(reader), 100_000).tolist()
    timed("index_hash", lambda: reader.index_hash)
    timed("column('turns')", lambda: reader.column("turns"))
    timed("lists('widths')", lambda: reader.lists("widths"))
    timed("rows at random, cold pages", lambda: [reader.row(i) for i in picks], len(picks))
    timed("rows at random, again", lambda: [reader.row(i) for i in picks], len(picks))
    timed("keys at random", lambda: reader.keys(picks), len(picks))
    timed("samples at random (read, crc32, validated)", lambda: [reader.load(i) for i in picks[:20_000]], 20_000)
    dataset = Loaded(reader)
    order = np.random.default_rng(1).integers(0, len(reader), (3000, BATCH)).tolist()
    loader = iter(loader_of(dataset, order, 2))
    sizes = {}
    for n in range(len(order)):
        next(loader)
        if n in (20, 2900):
            sizes[n] = [uss(child) for child in psutil.Process().children() if "resource" not in child.name()]
    rows += [
        (f"own memory of each of 2 workers, batch {n}", ", ".join(f"{s:.0f} MiB" for s in sizes[n])) for n in sizes
    ]
    return rows


def bench_index(folder: Path, rows: int) -> None:
    merged = in_a_fresh_process(make_large_index, folder, rows)
    large = folder / "many"
    size = (large / "index.arrow").stat().st_size / 2**20
    drop_from_memory(large / "index.arrow")
    cold = in_a_fresh_process(open_large_index, large)
    warm = in_a_fresh_process(open_large_index, large)
    print(f"### An index of {rows / 1e6:g} M samples in {rows // 1000} tars, {size:.0f} MiB\n")
    table(("", ""), *merged)
    table(("", "first", "again"), *((what, a, b) for (what, a), (_, b) in zip(cold, warm, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    rows = parser.parse_args().rows
    print(f"{os.cpu_count()} cores, Python {sys.version.split()[0]}, pyarrow {pa.__version__}\n")
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        bench_index(Path(name), rows)


if __name__ == "__main__":
    main()
