"""Pairs per second from tar to batch, images and texts, with two loader workers: this loader beside open_clip's.

    python benchmarks/contrastive_input.py [--rounds 3] [--images 128] [--side 224]

Same shards, same run, in turn. Theirs are the stages of its ``get_wds_dataset`` with its ``image_transform`` and its
tokenizer; ours crops the same way, hands over uint8 and tokenises by a WordPiece tokenizer of a toy vocabulary.
Rates are of wall time after the first batch, and per second of processor time of all processes; medians of the rounds.
"""

import argparse
import itertools
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
import webdataset
from decode import BATCH, WORKERS, jpeg, make_shards, measure, one_thread, radiograph
from transformers import AutoTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from dual_toy import make_bert_tokenizer

from medvlm.data.images import ImageTransform
from medvlm.data.loader import MicroBatches, load_batches
from medvlm.data.pairs import PairEncoder, collate_pairs
from medvlm.data.shards import ShardReader


def theirs(shards: Path, side: int) -> Iterator[torch.Tensor]:
    transform, tokenizer = open_clip.image_transform(side, is_train=False), open_clip.get_tokenizer("ViT-B-32")

    def tokens(sample: dict[str, Any]) -> torch.Tensor:
        return tokenizer(" ".join(part["text"] for part in sample["messages"][1]["content"]))[0]

    pipeline = webdataset.DataPipeline(
        webdataset.ResampledShards(sorted(map(str, shards.glob("*.tar"))), deterministic=True),
        webdataset.split_by_worker,
        webdataset.tarfile_to_samples(),
        webdataset.decode("pilrgb"),
        webdataset.rename(image="0.jpg", text="json"),
        webdataset.map_dict(image=transform, text=tokens),
        webdataset.to_tuple("image", "text"),
        webdataset.batched(BATCH),
    )
    for images, _ in webdataset.WebLoader(pipeline, batch_size=None, num_workers=WORKERS, worker_init_fn=one_thread):
        yield images


def ours(shards: Path, side: int, tokenizer: Any) -> Iterator[torch.Tensor]:
    processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    encoder = PairEncoder(tokenizer, ImageTransform(processor), 77, sections=["answers"])
    reader = ShardReader(shards)
    order = itertools.cycle(torch.randperm(len(reader)).tolist())
    draws = ([(number, 0) for number in itertools.islice(order, BATCH)] for _ in itertools.count())
    data = MicroBatches(reader, encoder, partial(collate_pairs, pad_id=0, image_size=side, max_length=77))
    for batch in load_batches(data, draws, WORKERS):
        assert not batch.quarantined, batch.quarantined[0]
        yield batch.pixel_values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=128, help="originals per round; four times as many small ones")
    parser.add_argument("--side", type=int, default=224)
    options = parser.parse_args()
    one_thread(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder, sets = Path(temporary), {}
        tokenizer = AutoTokenizer.from_pretrained(make_bert_tokenizer(folder / "tokenizer"))
        for name, size in {"2048 x 2500": (2048, 2500), "512 x 512": (512, 512)}.items():
            images = [radiograph(*size, seed) for seed in range(8)]
            encoded = [(jpeg(image), image.size) for image in images]
            sets[name] = make_shards(folder / name.replace(" ", ""), encoded, 240)
        makers = {"ours": partial(ours, tokenizer=tokenizer), f"open_clip {open_clip.__version__}": theirs}
        rates: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for _ in range(options.rounds):
            for (name, shards), (who, make) in itertools.product(sets.items(), makers.items()):
                count = options.images * (1 if name.startswith("2048") else 4)
                rates.setdefault((name, who), []).append(measure(make(shards, options.side), count))
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{os.cpu_count()} cores, load {load}, Python {platform.python_version()}, torch {torch.__version__}\n")
    print("| images | loader | pairs/s | per CPU-s |\n|---|---|---|---|")
    for (name, who), values in rates.items():
        wall, cpu = (statistics.median(column) for column in zip(*values, strict=True))
        print(f"| {name} | {who} | {wall:.1f} | {cpu:.1f} |")


if __name__ == "__main__":
    main()
