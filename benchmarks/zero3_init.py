"""Memory of each rank while a model is made under ZeRO-3: from a configuration, and from sharded pretrained weights.

    python benchmarks/zero3_init.py [--ranks 2 4] [--shape small|7b]

The language model has Llama's shapes at width 1536, or is Llama-2-7B, in bf16. Ranks are forked and talk over gloo;
memory is that of the process beyond what it had before the model was built: the peak of what it allocated (RssAnon,
sampled every 2 ms) and of its resident set (VmHWM), which also counts pages of the weights' files, mapped, that may be
dropped at any time.
"""

import argparse
import ctypes
import multiprocessing
import os
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import torch
from toy import CLIP, make_tokenizer

from medvlm.config.model import Llava
from medvlm.models.build import build_components, build_model

SMALL = {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 20, "num_attention_heads": 12}
LLAMA_2_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
SHAPES = {"small": SMALL, "7b": LLAMA_2_7B}


def language(shape: str) -> dict[str, Any]:
    return {
        "model_type": "llama",
        **SHAPES[shape],
        "num_key_value_heads": SHAPES[shape]["num_attention_heads"],
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    }


def status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


class Sampler(threading.Thread):
    """The largest RssAnon since it was started."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.done = 0, False

    def run(self) -> None:
        while not self.done:
            self.peak = max(self.peak, status("RssAnon"))
            time.sleep(0.002)


def build(values: dict[str, Any]) -> tuple[Any, int, int]:
    """The model on this rank of a started process group; bytes allocated and resident at the peak of making it."""
    libc = ctypes.CDLL("libc.so.6")
    for option, value in ((-3, 65536), (-1, 0), (-8, 1)):  # mmap threshold, trim threshold, one arena
        libc.mallopt(option, value)
    torch.set_num_threads(1)
    config = Llava.model_validate(values)
    parts = build_components(config)
    zero = {"stage": 3, "memory_efficient_linear": False, "stage3_param_persistence_threshold": 100000}
    batch = {"train_micro_batch_size_per_gpu": 1, "train_batch_size": int(os.environ["WORLD_SIZE"])}
    libc.malloc_trim(0)
    before, resident = status("RssAnon"), status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    sampler = Sampler()
    sampler.start()
    model = build_model(config, parts, torch.bfloat16, {"zero_optimization": zero, "bf16": {"enabled": True}, **batch})
    sampler.done = True
    sampler.join()
    return model, sampler.peak - before, status("VmHWM") - resident


def run_rank(values: dict[str, Any], rank: int, world: int, port: int, out: Any) -> None:
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ |= {k: str(v) for k, v in places.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    from medvlm.training import distributed

    distributed.start()
    started = time.perf_counter()
    model, allocated, resident = build(values)
    seconds = time.perf_counter() - started
    numel = sum(p.ds_numel for p in model.parameters())
    shard = sum(p.ds_tensor.numel() * p.ds_tensor.element_size() for p in model.parameters())
    largest = max(p.ds_numel for p in model.parameters()) * 2
    out.put((rank, allocated, resident, numel, shard, largest, seconds))
    distributed.barrier()
    distributed.stop()


def measure(values: dict[str, Any], world: int) -> list[tuple]:
    context = multiprocessing.get_context("fork")
    out = context.SimpleQueue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [context.Process(target=run_rank, args=(values, rank, world, port, out)) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert not any(process.exitcode for process in ranks)
    return sorted(out.get() for _ in range(world))


def save_pretrained(folder: Path, shape: dict[str, Any]) -> Path:
    """Random weights in about five shards, and a tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("llama", **{k: v for k, v in shape.items() if k != "model_type"})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=model.num_parameters() * 2 // 5)
    return make_tokenizer(folder)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    options = parser.parse_args()
    from medvlm.training import distributed  # noqa: F401  (once, before forking)

    mib = 2**20
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        context = multiprocessing.get_context("fork")
        saver = context.Process(target=save_pretrained, args=(folder / "llm", language(options.shape)))
        saver.start()
        saver.join()
        tower = {"config": CLIP, "feature_layer": -1, "select_strategy": "full"}
        scratch = {"config": language(options.shape), "tokenizer": str(folder / "llm")}
        origins = {"from a configuration": scratch, "from sharded weights": {"path": str(folder / "llm")}}
        columns = ["origin", "ranks", "whole model MiB", "shard of a rank", "largest tensor"]
        print(f"| {' | '.join([*columns, 'peak allocated by rank', 'peak resident', 'seconds'])} |")
        print("|---|---|---|---|---|---|---|---|")
        for world in options.ranks:
            for origin, values in origins.items():
                rows = measure({"vision_tower": tower, "language_model": values}, world)
                _, _, _, numel, shard, largest, _ = rows[0]
                allocated = ", ".join(f"{row[1] / mib:.0f}" for row in rows)
                resident = ", ".join(f"{row[2] / mib:.0f}" for row in rows)
                print(
                    f"| {origin} | {world} | {numel * 2 / mib:.0f} | {shard / mib:.0f} | {largest / mib:.0f} | "
                    f"{allocated} | {resident} | {max(row[-1] for row in rows):.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
