"""Predicted beside measured memory of one rank, on CPU: `medvlm plan`'s rehearsal against the real training step.

    python benchmarks/memory.py [--small] [CASE ...]    # all cases: about ten minutes and 6 GB

Each case trains three steps on two real ranks (forked, gloo) with the model, optimizer and DeepSpeed engine of a run,
on batches of the planned shape. Measured is the largest resident set of rank 0 (VmHWM) less that before the model is
built and less the program's own pages read since (RssFile), with glibc told to return what is freed.
"""

import ctypes
import gc
import json
import multiprocessing
import os
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import torch
import yaml
from toy import make_tokenizer

from medvlm.config.load import load_recipe
from medvlm.models.build import build_components
from medvlm.planning.batch import make_batch
from medvlm.planning.rehearsal import Job, rehearse, steps_needed
from medvlm.planning.shape import BatchShape

STEPS, WORLD = 3, 2
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "image_size": 128,
    "patch_size": 16,
    "vision_use_head": False,
}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "vocab_size": 8192,
}
SMALL = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 8}
FROZEN = {"model.language_model.train": "frozen", "model.vision_tower.train": "frozen"}
CHECKPOINTED = {"model.language_model.gradient_checkpointing": "true"}
CASES: dict[str, tuple[str, int, int, dict[str, str]]] = {  # ZeRO, precision and rows, tokens of a row, overrides
    "zero0 fp32": ("zero0", 2, 256, {}),
    "zero1 fp32": ("zero1", 2, 256, {}),
    "zero2 fp32": ("zero2", 2, 256, {}),
    "zero3 fp32": ("zero3", 2, 256, {}),
    "zero0 bf16": ("zero0", 2, 256, {"training.precision": "bf16"}),
    "zero1 bf16": ("zero1", 2, 256, {"training.precision": "bf16"}),
    "zero2 bf16": ("zero2", 2, 256, {"training.precision": "bf16"}),
    "zero3 bf16": ("zero3", 2, 256, {"training.precision": "bf16"}),
    "zero3 fp32, 8 rows": ("zero3", 8, 256, {}),
    "zero3 fp32, 8 rows, checkpointing": ("zero3", 8, 256, CHECKPOINTED),
    "zero3 fp32, 8 rows, eager attention": ("zero3", 8, 256, {"model.attention": "eager"}),
    "zero3 fp32, accumulation 2": ("zero3", 2, 256, {"training.global_batch_size": "8"}),
    "zero2 fp32, accumulation 2": ("zero2", 2, 256, {"training.global_batch_size": "8"}),
    "zero3 fp32, projector only": ("zero3", 2, 256, FROZEN),
}


def job(name: str, folder: Path, llama: dict[str, Any]) -> Job:
    from medvlm.training.setup import deepspeed_config

    zero, rows, tokens, more = CASES[name]
    values: dict[str, Any] = {
        "run": {"name": "memory", "root": str(folder)},
        "model": {
            "vision_tower": {"config": VISION, "feature_layer": -1, "select_strategy": "full"},
            "language_model": {"config": llama, "tokenizer": str(make_tokenizer(folder / "tokenizer"))},
        },
        "data": {"train": ["none"], "max_length": tokens},
        "training": {"zero": zero, "precision": "fp32", "micro_batch_size": rows, "global_batch_size": rows * WORLD}
        | {"steps": STEPS},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    config = load_recipe(str(folder / "recipe.yaml"), [f"{k}={v}" for k, v in more.items()])
    parts = build_components(config.model)
    shape = BatchShape(rows, tokens, 1, 64, False)
    ds_config = deepspeed_config(config, WORLD)
    return Job(config, parts, ds_config, WORLD, shape, "cpu", steps_needed(ds_config))


def status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def train(job: Job, rank: int, port: int, out: Any) -> None:
    """One rank of a real training step; puts (bytes, parameters) of rank 0 into ``out``."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD}
    os.environ |= {k: str(v) for k, v in places.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    libc = ctypes.CDLL("libc.so.6")
    for option, value in ((-3, 65536), (-1, 0), (-8, 1)):  # mmap threshold, trim threshold, one arena
        libc.mallopt(option, value)
    from medvlm.models.build import build_model
    from medvlm.training import distributed
    from medvlm.training.optimizer import make_optimizer
    from medvlm.training.setup import precision, prepare

    distributed.start()
    config = job.config
    gc.collect()
    libc.malloc_trim(0)
    before, code = status("VmRSS"), status("RssFile")
    Path("/proc/self/clear_refs").write_text("5")
    model = build_model(config.model, job.parts, precision(config), job.ds_config)
    summaries, groups = prepare(model, config, job.parts)
    stage = job.ds_config["zero_optimization"]["stage"]
    engine, *_ = distributed.deepspeed.initialize(
        model=model, optimizer=make_optimizer(groups, config, stage), config=job.ds_config
    )
    batch = make_batch(job.shape, job.parts)
    for _ in range(STEPS * job.ds_config["gradient_accumulation_steps"]):
        engine.backward(engine(**batch.inputs(torch.device("cpu"))) / (WORLD * batch.supervised_tokens))
        engine.step()
    if rank == 0:
        out.put((status("VmHWM") - before - (status("RssFile") - code), sum(s.parameters for s in summaries)))
    distributed.barrier()
    distributed.stop()


def measure(job: Job) -> tuple[int, int]:
    context = multiprocessing.get_context("fork")
    out = context.SimpleQueue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [context.Process(target=train, args=(job, rank, port, out)) for rank in range(WORLD)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert not any(process.exitcode for process in ranks)
    return out.get()


def main() -> None:
    from medvlm.training import distributed, optimizer, setup  # noqa: F401  (once, before forking)

    torch.set_num_threads(1)
    print("| case | parameters | predicted MiB | measured MiB | difference | kinds at the peak |")
    print("|---|---|---|---|---|---|")
    names = [name for name in sys.argv[1:] if name != "--small"]
    llama = {**LLAMA, **SMALL, "num_key_value_heads": 8} if "--small" in sys.argv else LLAMA
    for name in names or CASES:
        with tempfile.TemporaryDirectory() as folder:
            planned = job(name, Path(folder), llama)
            rehearsal = rehearse([planned])[0]
            measured, parameters = measure(planned)
        kinds = json.dumps({k: round(v / 2**20) for k, v in rehearsal.peak_kinds.items() if v > 2**20})
        cells = f"{rehearsal.peak / 2**20:.0f} | {measured / 2**20:.0f} | {rehearsal.peak / measured - 1:+.1%}"
        print(f"| {name} | {parameters / 1e6:.0f} M | {cells} | {kinds} |", flush=True)


if __name__ == "__main__":
    main()
