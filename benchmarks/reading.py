"""Reading shards: samples per second beside other readers, resuming beside skipping, and ranges over HTTP.

    python benchmarks/reading.py [rates] [resume] [http]      all by default; about ten minutes

Readers that do not import are named and left out. mosaicml-streaming pins transformers<5, so all readers together need
an environment of their own:

    python -m venv peers && peers/bin/pip install mosaicml-streaming litdata webdataset pyarrow pydantic pillow \\
        braceexpand psutil urllib3 fsspec aiohttp && peers/bin/python benchmarks/reading.py rates resume
"""

import argparse
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).parent.parent))
from medvlm.data.schema import Sample
from medvlm.data.shards import ShardReader, merge_index, write_shards

BATCH = 32


def table(*rows: tuple) -> None:
    print("| " + " | ".join(map(str, rows[0])) + " |\n|" + "---|" * len(rows[0]))
    for row in rows[1:]:
        print("| " + " | ".join(map(str, row)) + " |", flush=True)
    print()


def in_a_fresh_process(work: Callable, *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def samples(count: int, size: int) -> Iterator[tuple[Sample, dict[str, bytes]]]:
    """A question about an image of ``size`` random bytes, or about none where 0."""
    rng = np.random.default_rng(0)
    images = [{"file": "0.jpg", "width": 336, "height": 336}] if size else []
    for n in range(count):
        content = ("<image>\n" if size else "") + "Is there a pleural effusion on the left?"
        talk = [{"role": "user", "content": content}, {"role": "assistant", "content": "No."}]
        sample = {"key": f"study{n:08d}", "source": "demo", "license": "CC0-1.0", "split": "train"}
        yield (
            Sample.model_validate({**sample, "patient_id": f"p{n // 3}", "images": images, "messages": talk}),
            {"0.jpg": rng.bytes(size)} if size else {},
        )


# Samples per second


class Loaded(Dataset):
    """Lists of sample numbers in, samples out: their images after validation, or the bytes of all members."""

    def __init__(self, reader: ShardReader, validate: bool = True):
        self.reader, self.validate = reader, validate

    def __getitem__(self, numbers: list[int]) -> list[Any]:
        if self.validate:
            return [(sample.key, images) for sample, images in map(self.reader.load, numbers)]
        return [self.reader.members(i) for i in numbers]


def loader_of(dataset: Dataset, order: Any, workers: int) -> DataLoader:
    return DataLoader(
        dataset,
        sampler=order,
        batch_size=None,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
    )


class Ours:
    name = "medvlm, crc32 checked, sample validated"
    validate = True

    def write(self, folder: Path, count: int, size: int) -> None:
        write_shards(samples(count, size), folder, "x")
        merge_index(folder)

    def read(self, folder: Path, count: int, workers: int) -> Iterator:
        reader = ShardReader(folder)
        order = np.random.default_rng(0).permutation(count).tolist()
        return iter(
            loader_of(Loaded(reader, self.validate), [order[i : i + BATCH] for i in range(0, count, BATCH)], workers)
        )

    def resume(self, folder: Path, count: int, at: int) -> Any:
        order = np.random.default_rng(0).permutation(count).tolist()
        return Loaded(ShardReader(folder), self.validate)[order[at : at + BATCH]]


class OurBytes(Ours):
    name = "medvlm, crc32 checked, bytes as the others"
    validate = False


class WebDataset:
    name = "webdataset"

    def write(self, folder: Path, count: int, size: int) -> None:
        write_shards(samples(count, size), folder, "x")

    def _dataset(self, folder: Path) -> Any:
        import webdataset

        urls = sorted(map(str, folder.glob("*.tar")))
        return webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0, workersplitter=webdataset.split_by_worker)

    def read(self, folder: Path, count: int, workers: int) -> Iterator:
        dataset = self._dataset(folder).shuffle(1000).batched(BATCH, collation_fn=list)
        return iter(DataLoader(dataset, batch_size=None, num_workers=workers))

    def resume(self, folder: Path, count: int, at: int) -> Any:
        stream = iter(self._dataset(folder).shuffle(1000))
        for _ in range(at):  # there is no other way
            next(stream)
        return [next(stream) for _ in range(BATCH)]


class Mosaic:
    name = "mosaicml-streaming"

    def write(self, folder: Path, count: int, size: int) -> None:
        from streaming import MDSWriter

        columns = {"json": "bytes", **({"jpg": "bytes"} if size else {})}
        with MDSWriter(out=str(folder), columns=columns, size_limit=1 << 26) as out:
            for sample, members in samples(count, size):
                jpg = {"jpg": members["0.jpg"]} if size else {}
                out.write({"json": sample.model_dump_json(exclude_defaults=True).encode(), **jpg})

    def _dataset(self, folder: Path) -> Any:
        from streaming import StreamingDataset
        from streaming.base.util import clean_stale_shared_memory

        clean_stale_shared_memory()
        return StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH, num_canonical_nodes=1)

    def read(self, folder: Path, count: int, workers: int) -> Iterator:
        dataset = self._dataset(folder)
        return iter(DataLoader(dataset, batch_size=BATCH, num_workers=workers, collate_fn=list))

    def resume(self, folder: Path, count: int, at: int) -> Any:
        dataset = self._dataset(folder)
        state = {"epoch": 0, "sample_in_epoch": at, "num_canonical_nodes": 1, "shuffle_seed": 9176}
        dataset.load_state_dict({**state, "initial_physical_nodes": 1})
        stream = iter(dataset)
        return [next(stream) for _ in range(BATCH)]


def litdata_sample(job: tuple[str, int, int]) -> Iterator[dict[str, bytes]]:
    """What litdata's optimize calls for each input."""
    _, count, size = job
    for sample, members in samples(count, size):
        jpg = {"jpg": members["0.jpg"]} if size else {}
        yield {"json": sample.model_dump_json(exclude_defaults=True).encode(), **jpg}


class LitData:
    name = "litdata"

    def write(self, folder: Path, count: int, size: int) -> None:
        from litdata import optimize

        job = (str(folder), count, size)
        optimize(litdata_sample, [job], output_dir=str(folder), num_workers=1, chunk_bytes="64MB", verbose=False)

    def _dataset(self, folder: Path) -> Any:
        from litdata import StreamingDataset

        return StreamingDataset(str(folder), shuffle=True, seed=0)

    def read(self, folder: Path, count: int, workers: int) -> Iterator:
        from litdata import StreamingDataLoader

        return iter(StreamingDataLoader(self._dataset(folder), batch_size=BATCH, num_workers=workers, collate_fn=list))

    def resume(self, folder: Path, count: int, at: int) -> Any:
        from litdata import StreamingDataLoader

        loader = StreamingDataLoader(self._dataset(folder), batch_size=BATCH, num_workers=0, collate_fn=list)
        stream = iter(loader)
        next(stream)
        state = loader.state_dict()
        state["num_samples_yielded"] = at
        state["dataset"] |= {"num_samples_yielded": at, "sample_in_epoch": at}
        again = StreamingDataLoader(self._dataset(folder), batch_size=BATCH, num_workers=0, collate_fn=list)
        again.load_state_dict(state)
        return next(iter(again))


PEERS: dict[str, Any] = {"medvlm": Ours, "medvlm.data": OurBytes}
PEERS |= {"webdataset": WebDataset, "streaming": Mosaic, "litdata": LitData}


def available() -> Iterator[Any]:
    for module, peer in PEERS.items():
        try:
            importlib.import_module(module)
        except ImportError as error:
            print(f"LEFT OUT: {peer.name} does not import here ({error}); see this script's first lines\n", flush=True)
            continue
        yield peer()


def rate(peer: str, folder: Path, count: int, workers: int) -> tuple[float, int]:
    """Samples per second of one pass over data in the page cache, first batch excluded, and how many came."""
    stream = PEERS[peer]().read(folder, count, workers)
    total = len(next(stream))
    start = time.perf_counter()
    first = total
    for batch in stream:
        total += len(batch)
    return (total - first) / (time.perf_counter() - start), total


def bench_rates(folder: Path, repeats: int) -> None:
    rows: list[tuple] = [("reader", "samples", "0 workers", "2 workers", "order")]
    order = {Ours.name: "every sample at random", OurBytes.name: "every sample at random"}
    order["webdataset"] = "buffer of 1000"
    for label, count, size in (("40 kB", 8000, 40_000), ("tiny (0.3 kB)", 60_000, 0)):
        for peer in available():
            data = folder / f"{type(peer).__name__}-{size}"
            data.mkdir()
            peer.write(data, count, size)
            module = next(m for m, p in PEERS.items() if type(peer) is p)
            cells = []
            for workers in (0, 2):
                runs = [in_a_fresh_process(rate, module, data, count, workers) for _ in range(repeats)]
                assert all(total == count for _, total in runs), (peer.name, runs)
                cells.append(f"{max(r for r, _ in runs):,.0f}/s")
            rows.append((peer.name, label, *cells, order.get(peer.name, "shuffled by chunk")))
            shutil.rmtree(data)
    print(f"### Samples per second, page cache warm, batches of {BATCH}, best of {repeats}\n")
    table(*rows)


# Resuming


def resume_time(peer: str, folder: Path, count: int, at: int) -> float:
    start = time.perf_counter()
    assert len(PEERS[peer]().resume(folder, count, at)) == BATCH
    return time.perf_counter() - start


def bench_resume(folder: Path) -> None:
    count, size = 20_000, 40_000
    places = (0, 5_000, 19_000)
    rows: list[tuple] = [("reader", *(f"from sample {at:,}" for at in places))]
    for peer in available():
        data = folder / f"resume-{type(peer).__name__}"
        data.mkdir()
        peer.write(data, count, size)
        module = next(m for m, p in PEERS.items() if type(peer) is p)
        cells = [f"{in_a_fresh_process(resume_time, module, data, count, at):.3f} s" for at in places]
        rows.append((peer.name, *cells))
        shutil.rmtree(data)
    print(f"### Seconds to the first batch of {BATCH} after a restart, {count:,} samples of 40 kB, imports excluded\n")
    table(*rows)


# HTTP


def http_rate(url: str, how: str, size: int, count: int) -> float:
    from medvlm.data.storage import read_range

    if how == "fsspec":
        import fsspec

        fs = fsspec.filesystem("http")
    start = 0.0
    for n in range(-5, count):
        if n == 0:
            start = time.perf_counter()
        at = (n % 50) * size
        data = fs.cat_file(url, start=at, end=at + size) if how == "fsspec" else read_range(url, at, size)[0]
        assert len(data) == size
    return count / (time.perf_counter() - start)


def serve_forever(folder: Path, port: Any) -> None:
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from web import Web

    server = Web(folder)
    port.send(server.server_port)
    server.serve_forever()


def bench_http(folder: Path) -> None:
    (folder / "x.tar").write_bytes(os.urandom(64 << 20))
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    server = context.Process(target=serve_forever, args=(folder, there), daemon=True)
    server.start()
    url = f"http://127.0.0.1:{here.recv()}/x.tar"
    rows: list[tuple] = [("range", "urllib3 (ours)", "fsspec over aiohttp")]
    for size, count in ((40_000, 1000), (1_200_000, 200)):
        rates = [in_a_fresh_process(http_rate, url, how, size, count) for how in ("ours", "fsspec")]
        rows.append((f"{size / 1000:g} kB", *(f"{r:,.0f}/s" for r in rates)))
    server.terminate()
    print("### Ranges per second of one process from a local HTTP server (Python's, which is the limit)\n")
    table(*rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["rates", "resume", "http"])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    names = ("torch", "pyarrow", "webdataset", "mosaicml-streaming", "litdata")
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    print(f"{os.cpu_count()} cores, Python {sys.version.split()[0]}, {json.dumps(versions)}\n")
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        folder = Path(name)
        if "rates" in options.parts:
            bench_rates(folder, options.repeats)
        if "resume" in options.parts:
            bench_resume(folder)
        if "http" in options.parts:
            bench_http(folder)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
