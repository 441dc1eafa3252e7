"""Images/s from tar to batch with two workers: this loader beside LLaVA's pipeline and open_clip's.

    python benchmarks/decode.py [--rounds 3] [--images 128] [--side 336] [--workers 2]

Peers are measured in the same run, in turn, on the same shards:
- LLaVA: full decode to RGB, padding to a square with the mean colour, transformers' image processor (Pillow's backend,
  and torchvision's where it imports), float32; read by ``webdataset``.
- open_clip: its own ``image_transform`` in its own order of ``webdataset`` stages (``pip install open_clip_torch``).
Ours pads to a square like LLaVA, or crops like open_clip; it also renders and tokenises the conversation, which the
peers' pipelines here do not. Its batches are uint8 and are normalised on the accelerator; theirs are float32.
"JPEG alone" reads the same members and decodes them at the scale that ours takes, with nothing after it: no loader that
decodes with libjpeg-turbo is quicker.

Rates are of wall time after the first batch, and per second of processor time of all processes; the best of the rounds,
since whatever else the machine does can only slow them down. Workers decode ahead of the clock, so that few images on a
busy machine give uneven rates; without workers (0) nothing is ahead.
Images are synthetic radiographs: 2048 x 2500 JPEG at quality 95, the same shrunk to a short side of 672, and 512 x 512.
"""

import argparse
import functools
import io
import itertools
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from transformers import AutoTokenizer, LlavaImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from toy import TEMPLATE, make_tokenizer

from medvlm.data.conversation import ConversationEncoder, multimodal_template
from medvlm.data.images import ImageTransform
from medvlm.data.loader import MicroBatches, SampleEncoder, collate, load_batches
from medvlm.data.schema import Sample
from medvlm.data.shards import ShardReader, write_shards

BATCH, WORKERS = 16, 2


def radiograph(width: int, height: int, seed: int) -> Image.Image:
    """Two dark lungs, a spine and ribs under detector noise, whose size as JPEG at quality 95 is that of real films."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    u, v = x / width - 0.5 + 0.02 * (seed % 5), y / height - 0.5
    grey = 60 + 90 * np.exp(-3 * (u * u + v * v)) + 25 * np.exp(-((u / 0.06) ** 2))
    for side in (-0.2, 0.2):
        lung = np.exp(-((((u - side) / 0.13) ** 2 + ((v + 0.02) / 0.28) ** 2) ** 2))
        grey += lung * (8 * np.sin(60 * v + 14 * abs(u)) - 70)
    grey += np.random.default_rng(seed).normal(0, 2.6, grey.shape)
    return Image.fromarray(grey.clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", quality=95)
    return buffer.getvalue()


def make_shards(folder: Path, images: list[tuple[bytes, tuple[int, int]]], count: int) -> Path:
    def items() -> Iterator[tuple[Sample, dict[str, bytes]]]:
        for n in range(count):
            data, (width, height) = images[n % len(images)]
            fields = {
                "key": f"s{n:05d}",
                "source": "synthetic",
                "license": "CC0-1.0",
                "split": "train",
                "images": [{"file": "0.jpg", "width": width, "height": height}],
                "messages": [
                    {"role": "user", "content": "<image>\nWrite the findings of this radiograph."},
                    {"role": "assistant", "content": "The heart is normal in size. No effusion on the left. " * 4},
                ],
            }
            yield Sample.model_validate(fields), {"0.jpg": data}

    write_shards(items(), folder, "train", 100)
    return folder


def ours(shards: Path, processor, tokenizer) -> Iterator[torch.Tensor]:
    conversation = ConversationEncoder(tokenizer, multimodal_template(TEMPLATE), 576)
    encoder = SampleEncoder(conversation, ImageTransform(processor), 2048)
    reader = ShardReader(shards)
    order = itertools.cycle(np.random.default_rng(0).permutation(len(reader)).tolist())
    draws = ([(number, 0) for number in itertools.islice(order, BATCH)] for _ in itertools.count())
    rows = functools.partial(collate, pad_id=0, image_size=1, padding_free=False)
    for batch in load_batches(MicroBatches(reader, encoder, rows), draws, WORKERS):
        assert not batch.quarantined, batch.quarantined[0]
        yield batch.pixel_values


class JpegAlone(Dataset):
    """What is left of a batch where images are decoded and thrown away."""

    def __init__(self, reader: ShardReader, transform: ImageTransform):
        self.reader, self.transform = reader, transform

    def __getitem__(self, numbers: list[int]) -> torch.Tensor:
        for number in numbers:
            self.transform.decode_jpeg(self.reader.member(number, "0.jpg"))
        return torch.empty(len(numbers), 0)


def jpeg_alone(shards: Path, processor) -> Iterator[torch.Tensor]:
    reader = ShardReader(shards)
    order = itertools.cycle(np.random.default_rng(0).permutation(len(reader)).tolist())
    batches = (list(itertools.islice(order, BATCH)) for _ in itertools.count())
    dataset = JpegAlone(reader, ImageTransform(processor))
    yield from DataLoader(dataset, sampler=batches, batch_size=None, num_workers=WORKERS)  # type: ignore[arg-type]


def through_webdataset(shards: Path, transform: Callable) -> Iterator[torch.Tensor]:
    """The stages of open_clip's ``get_wds_dataset``, less its text: shards, workers, tar, decode, map, batch."""
    pipeline = webdataset.DataPipeline(
        webdataset.ResampledShards(sorted(map(str, shards.glob("*.tar"))), deterministic=True),
        webdataset.split_by_worker,
        webdataset.tarfile_to_samples(),
        webdataset.decode("pilrgb"),
        webdataset.rename(image="0.jpg"),
        webdataset.map_dict(image=transform),
        webdataset.to_tuple("image"),
        webdataset.batched(BATCH),
    )
    loader = webdataset.WebLoader(pipeline, batch_size=None, num_workers=WORKERS, worker_init_fn=one_thread)
    for (images,) in loader:
        yield images


def one_thread(_: int) -> None:
    torch.set_num_threads(1)


def llava(processor) -> Callable[[Image.Image], torch.Tensor]:
    """LLaVA's ``expand2square`` and its processor call."""
    color = tuple(int(value * 255) for value in processor.image_mean)

    def transform(image: Image.Image) -> torch.Tensor:
        side = max(image.size)
        square = Image.new("RGB", (side, side), color)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return processor(square, do_pad=False, return_tensors="pt")["pixel_values"][0]

    return transform


def measure(batches: Iterator[torch.Tensor], images: int) -> tuple[float, float]:
    """Images per second of wall time, and per second of processor time, from the first batch on; ends the workers."""
    next(batches)
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]

    def used() -> float:
        return sum(p.cpu_times().user + p.cpu_times().system for p in family)

    start, cpu, seen = time.perf_counter(), used(), 0
    while seen < images:
        seen += len(next(batches))
    rates = seen / (time.perf_counter() - start), seen / (used() - cpu)
    batches.close()  # type: ignore[attr-defined]  # these are generators
    return rates


def pipelines(side: int, tokenizer) -> dict[str, Callable[[Path], Iterator[torch.Tensor]]]:
    square = {"height": side, "width": side}
    padding: Any = {"size": square, "do_center_crop": False, "do_pad": True}
    pillow = LlavaImageProcessorPil(**padding)
    crop = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=square)
    table: dict[str, Callable[[Path], Iterator[torch.Tensor]]] = {
        "LLaVA, Pillow": lambda shards: through_webdataset(shards, llava(pillow)),
        "ours, padded": lambda shards: ours(shards, pillow, tokenizer),
        "ours, cropped": lambda shards: ours(shards, crop, tokenizer),
        "JPEG alone": lambda shards: jpeg_alone(shards, pillow),
    }
    processor = LlavaImageProcessor(**padding)
    if processor.backend == "torchvision":
        table["LLaVA, torchvision"] = lambda shards: through_webdataset(shards, llava(processor))
    else:
        print("SKIPPED: transformers finds no torchvision; install the one that belongs to this torch\n")
    try:
        import open_clip

        transform = open_clip.image_transform(side, is_train=False)
        table[f"open_clip {open_clip.__version__}"] = lambda shards: through_webdataset(shards, transform)
    except (ImportError, RuntimeError) as error:
        print(f"SKIPPED: open_clip does not import ({error}); pip install open_clip_torch\n")
    return table


def main() -> None:
    global WORKERS
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", type=int, default=336)
    parser.add_argument("--images", type=int, default=128, help="originals per round; four times as many small ones")
    parser.add_argument("--workers", type=int, default=WORKERS)
    options = parser.parse_args()
    WORKERS = options.workers
    one_thread(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        originals = [radiograph(2048, 2500, seed) for seed in range(12)]
        shrunk = [image.resize((672, 820), Image.Resampling.LANCZOS) for image in originals]
        small = [radiograph(512, 512, seed) for seed in range(12)]
        sets = {}
        for name, images in {"2048 x 2500": originals, "short side 672": shrunk, "512 x 512": small}.items():
            encoded = [(jpeg(image), image.size) for image in images]
            kilobytes = statistics.mean(len(data) for data, _ in encoded) / 1000
            sets[f"{name}, {kilobytes:.0f} kB"] = make_shards(folder / name.replace(" ", ""), encoded, 240)
        tokenizer = AutoTokenizer.from_pretrained(make_tokenizer(folder / "tokenizer"))
        tokenizer.add_tokens(["<image>"], special_tokens=True)
        table = pipelines(options.side, tokenizer)
        rates: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for _ in range(options.rounds):
            for (name, shards), (who, make) in itertools.product(sets.items(), table.items()):
                images = options.images * (1 if name.startswith("2048") else 4)
                rates.setdefault((name, who), []).append(measure(make(shards), images))
    report(rates, list(sets), list(table))


def report(rates: dict[tuple[str, str], list[tuple[float, float]]], sets: list[str], names: list[str]) -> None:
    best = {key: [max(column) for column in zip(*values, strict=True)] for key, values in rates.items()}
    print(f"{os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}, {WORKERS} workers\n")
    print("| pipeline | " + " | ".join(f"{name}: /s | per CPU-s" for name in sets) + " |")
    print("|---|" + "---|" * (2 * len(sets)))
    for who in names:
        cells = (f"{value:.1f}" for name in sets for value in best[name, who])
        print(f"| {who} | " + " | ".join(cells) + " |")
    print("\n| ratio | wall | CPU |\n|---|---|---|")
    for name, peer in itertools.product(sets, names):
        who = "ours, padded" if peer.startswith("LLaVA") else "ours, cropped"
        if not peer.startswith(("ours", "JPEG")):
            wall, cpu = (a / b for a, b in zip(best[name, who], best[name, peer], strict=True))
            print(f"| {who} / {peer}, {name} | {wall:.1f} | {cpu:.1f} |")
    for who, name in [("ours, padded", sets[1]), ("ours, cropped", sets[1]), ("JPEG alone", sets[0])]:
        wall, cpu = (a / b for a, b in zip(best[name, who], best[sets[0], "LLaVA, Pillow"], strict=True))
        print(f"| {who}, {name} / LLaVA, Pillow, {sets[0]} | {wall:.1f} | {cpu:.1f} |")


if __name__ == "__main__":
    main()
