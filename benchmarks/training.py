"""Steps of our loop beside transformers' Trainer over the same DeepSpeed configuration, on CPU ranks.

    python benchmarks/training.py [--steps 8] [--ranks 2] [--rounds 2] [--micro-batch 16]

The mixture is that of `mixture.py`. The model keeps the proportions of a LLaVA-7B: 576 image tokens, most work in the
language model, a twentieth in the tower, a fiftieth in the output layer. Rates count real tokens, no padding, over
all steps but the first two; runs take turns, and the table shows the medians of the rounds. Padded micro-batches have
16 samples by default, as in LLaVA-1.5's `scripts/v1_5/finetune.sh`.
"""

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from mixture import make_recipe, make_shards, make_tokenizer

HERE = Path(__file__).parent
WARM_UP = 2


def model(hidden: int = 320, layers: int = 6, attention: str = "auto") -> dict[str, Any]:
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 336,
        "patch_size": 14,
    }
    language = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": hidden * 11 // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "vocab_size": 640,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }
    return {"vision_tower": {"config": vision}, "language_model": {"config": language}, "attention": attention}


Rate = tuple[float, float, float]  # tokens/s, samples/s, seconds outside of steps


def rate(rows: list[dict[str, Any]], wall: float) -> Rate:
    rows = [row for row in rows if "seconds" in row]
    timed = rows[WARM_UP:]
    seconds = sum(row["seconds"] for row in timed)
    tokens, samples = (sum(row[name] for row in timed) / seconds for name in ("tokens", "samples"))
    return tokens, samples, wall - sum(row["seconds"] for row in rows)


def launch(ranks: int, command: list[str], log: Path) -> float:
    """Seconds from start to end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", port]
    with log.open("w") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE.parent)}
        started = time.perf_counter()
        done = subprocess.run([*launcher, *command], stdout=file, stderr=subprocess.STDOUT, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text()[-3000:]}")
    return time.perf_counter() - started


def ours(recipe: Path, folder: Path, ranks: int, name: str) -> Rate:
    wall = launch(ranks, ["-m", "medvlm.cli", "train", str(recipe), f"run.name={name}"], folder / f"{name}.log")
    return rate(
        [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()], wall
    )


def trainer(recipe: Path, folder: Path, ranks: int, name: str, steps: int, *more: str) -> Rate:
    out = folder / f"{name}.json"
    script = str(HERE / "hf_trainer.py")
    wall = launch(ranks, [script, str(recipe), str(out), "--steps", str(steps), *more], folder / f"{name}.log")
    return rate(json.loads(out.read_text())["rows"], wall)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--zero", default="zero2")
    options = parser.parse_args()
    micro = options.micro_batch
    with tempfile.TemporaryDirectory() as temporary:
        folder, steps, ranks = Path(temporary), options.steps, options.ranks
        make_tokenizer(folder / "tokenizer")
        make_shards(folder / "shards", 800)
        shared = {"zero": options.zero, "precision": "fp32", "steps": steps, "checkpoint_every": 10**6}
        cache = {"cache_dir": str(folder / "cache")}
        padded = {**shared, "global_batch_size": max(16, micro * ranks), "micro_batch_size": micro}
        packed = {**shared, "global_batch_size": ranks, "micro_batch_size": 1}
        packing = {**cache, "packing": {"tokens": 4096, "images": 12}}
        plain = make_recipe(folder, "padded", model(), cache, padded)
        full = make_recipe(folder, "packed", model(), packing, packed)
        runs = {
            "ours, packs of 4096": lambda n: ours(full, folder, ranks, f"packed-{n}"),
            "ours, padded, same batches as the Trainer's": lambda n: ours(plain, folder, ranks, f"padded-{n}"),
            "Trainer, padded": lambda n: trainer(plain, folder, ranks, f"trainer-{n}", steps),
            "Trainer, padded, grouped by modality and length": lambda n: trainer(
                plain, folder, ranks, f"grouped-{n}", steps, "--order", "grouped"
            ),
        }
        rates: dict[str, list[Rate]] = {name: [] for name in runs}
        for n in range(options.rounds):
            for name, run in runs.items():
                rates[name].append(run(n))
                print(f"round {n + 1}, {name}: {rates[name][-1][0]:.0f} tokens/s", file=sys.stderr, flush=True)
    report(rates, options)


def report(rates: dict[str, list[Rate]], options: argparse.Namespace) -> None:
    base = statistics.median(r[0] for r in rates["Trainer, padded"])
    print(
        f"{options.ranks} ranks, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"
    )
    how = f"{options.zero}, fp32, {options.steps} steps, padded micro-batches of {options.micro_batch}"
    print(f"transformers {transformers.__version__}, {how}\n")
    print("| loop | tokens/s | to the Trainer | samples/s | start and end, s |\n|---|---|---|---|---|")
    for name, values in rates.items():
        tokens, samples, rest = (statistics.median(column) for column in zip(*values, strict=True))
        print(f"| {name} | {tokens:.0f} | {tokens / base:.2f} | {samples:.2f} | {rest:.1f} |")


if __name__ == "__main__":
    main()
