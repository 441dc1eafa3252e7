"""One GPU: a LLaVA-7B trained end to end, the same by transformers' Trainer, LoRA on a Llama-3-8B, and a profile.

    bash benchmarks/gpu.sh [--out DIR] [--minutes 9]

Weights are random, shapes are real: CLIP-L/14 at 336 with Llama-2-7B, bf16, ZeRO-3 (which builds the model on the
GPU), the mixture of `mixture.py`. A GPU with less than 120 GiB trains the first 16 of 32 layers, and the table says so.
LoRA is on text alone, packs of 4096, as the published figures it stands beside. Each case has its share of the
minutes and is skipped, in the table, when its time is gone. ``--tiny`` runs the same code on a CPU.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mixture import make_recipe, make_shards, make_tokenizer
from training import WARM_UP, launch

HERE = Path(__file__).parent


def clip_large(tiny: bool) -> dict[str, Any]:
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14, **(small if tiny else shape)}


def llama(tiny: bool, layers: int, three: bool) -> dict[str, Any]:
    """Llama-2-7B's shapes, or Llama-3-8B's."""
    values = {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336 if three else 11008,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8 if three else 32,
        "vocab_size": 128256 if three else 32064,
        "max_position_embeddings": 8192 if three else 4096,
        "rope_theta": 500000.0 if three else 10000.0,
        "tie_word_embeddings": False,
    }
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 640}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1 if three else 2}
    return {**values, **small, **heads} if tiny else values


def cases(folder: Path, tiny: bool, memory: float) -> dict[str, Callable[[], list[dict[str, Any]]]]:
    layers = 32 if memory >= 120 else 16
    steps = {"steps": 4 if tiny else 10, "checkpoint_every": 10**6, "zero": "zero3"}
    precision = {"precision": "fp32" if tiny else "bf16"}
    batch = 2 if tiny else 16

    def recipe(name: str, model: dict[str, Any], packs: int, micro: int, packed: bool, where: Path) -> Path:
        packing = {"packing": {"tokens": 4096, "images": 12}} if packed else {}
        data = {"workers": 2 if tiny else 12, "cache_dir": str(folder / "cache"), **packing}
        training = {**steps, **precision, "global_batch_size": packs, "micro_batch_size": micro}
        return make_recipe(where, name, model, data, training)

    def llava() -> dict[str, Any]:
        language = {"config": llama(tiny, layers, False), "learning_rate": 2e-5, "gradient_checkpointing": True}
        tower = {"config": clip_large(tiny), "learning_rate": 2e-6, "gradient_checkpointing": True}
        return {"vision_tower": tower, "language_model": language}

    def lora() -> dict[str, Any]:
        tower = {"config": clip_large(True), "train": "frozen"}
        language = {"config": llama(tiny, 32, True), "train": "lora", "lora": {"rank": 16, "alpha": 32}}
        return {"vision_tower": tower, "multi_modal_projector": {"train": "frozen"}, "language_model": language}

    def ours(path: Path, *more: str) -> list[dict[str, Any]]:
        name = path.stem
        launch(1, ["-m", "medvlm.cli", "train", str(path), *more], folder / f"{name}.log")
        lines = (path.parent / "runs" / name / "metrics.jsonl").read_text().splitlines()
        return [row for row in map(json.loads, lines) if "seconds" in row]

    def trainer(path: Path, count: int) -> list[dict[str, Any]]:
        out = folder / f"{path.stem}.json"
        script = [str(HERE / "hf_trainer.py"), str(path), str(out), "--steps", str(count), "--order", "grouped"]
        launch(1, script, folder / f"{path.stem}.log")
        return json.loads(out.read_text())["rows"]

    mixed, text = folder / "mixed", folder / "text"
    shapes = f"LLaVA-7B{'' if layers == 32 else ', 16 of 32 layers'}"
    return {
        f"{shapes}, ours, packs of 4096": lambda: ours(recipe("packed", llava(), batch, 1, True, mixed)),
        f"{shapes}, Trainer, padded, grouped by modality and length": lambda: trainer(
            recipe("padded", llava(), 4 * batch, 4, False, mixed), steps["steps"]
        ),
        "LoRA on Llama-3-8B, ours, text, packs of 4096": lambda: ours(recipe("lora", lora(), batch, 2, True, text)),
        f"{shapes}, ours, profiled": lambda: ours(
            recipe("profile", llava(), batch, 1, True, mixed), "--profile", f"training.steps={WARM_UP + 3}"
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-gpu"), help="for the table, logs and trace")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a GPU; --tiny runs its code on a CPU")
    started, folder = time.monotonic(), options.out
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else 0.0
    for name, count, side in (("mixed", 1200, 336), ("text", 1200, 0)):
        make_tokenizer(folder / name / "tokenizer")
        make_shards(folder / name / "shards", 150 if options.tiny else count, side)
    lines = [f"{hardware()}, commit {commit()}", ""]
    lines += ["| case | tokens/s | samples/s | MFU | memory, GiB |", "|---|---|---|---|---|"]
    for name, run in cases(folder, options.tiny, memory).items():
        left = options.minutes * 60 - (time.monotonic() - started)
        lines.append(f"| {name} | {row(run()) if left > 60 else 'skipped: no time left'} |")
        print(lines[-1], flush=True)
        (folder / "table.md").write_text("\n".join(lines) + "\n")  # what there is, should the time run out
    print((folder / "table.md").read_text())


def row(rows: list[dict[str, Any]]) -> str:
    timed = rows[WARM_UP:]
    seconds = sum(r["seconds"] for r in timed)
    tokens, samples = (sum(r[name] for r in timed) / seconds for name in ("tokens", "samples"))
    mfu = f"{sum(r['mfu'] * r['seconds'] for r in timed) / seconds:.1%}" if "mfu" in timed[0] else ""
    return f"{tokens:,.0f} | {samples:.1f} | {mfu} | {max(r.get('memory_gib') or 0 for r in timed):.1f}"


def hardware() -> str:
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
    return f"{device}, Python {platform.python_version()}, torch {torch.__version__}"


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
