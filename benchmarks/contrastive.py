"""Contrastive training steps beside open_clip's, on the same towers, weights and images; memory of gradient caching.

    python benchmarks/contrastive.py step [--precision bf16] [--batch 16] [--rounds 5]
    python benchmarks/contrastive.py caching [--batch 256] [--micro 4 8 16 32 64]
    python benchmarks/contrastive.py gpu      # ViT-B/16 and BERT-base, 224 pixels, 4096 pairs by gradient caching

Needs `pip install open_clip_torch` and a torchvision that belongs to the installed PyTorch: an environment of its own.

step: open_clip's model from the same configuration with the same weights, its ClipLoss, its optimizer settings and its
own ``train_one_epoch`` (``--accum-freq`` where there are micro-batches); our passes on DeepSpeed's ZeRO-1 and, without
its partitions, on a plain engine (fp32) or ZeRO-0 (bf16). The first losses must agree. They take turns in one process
of one thread. Texts fill the context, so that neither side gains by padding less; images are decoded. Peak memory is of
a process each, less imports.
In bf16 open_clip runs ``amp_bf16`` (fp32 weights, autocast), ours bf16 weights with an fp32 copy in the optimizer.
"""

import argparse
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from dual_toy import make_bert_tokenizer
from towers import SHAPES, Shape, open_clip_model, sections
from toy import make_recipe

from medvlm.config.load import load_recipe
from medvlm.config.schema import RunConfig
from medvlm.data.pairs import PairBatch
from medvlm.models.dual_encoder import DualEncoderModel
from medvlm.training import distributed
from medvlm.training.families import Pass, family_of
from medvlm.training.optimizer import make_optimizer
from medvlm.training.setup import deepspeed_config, precision, prepare

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Step = Callable[[], float]


def recipe(folder: Path, shape: Shape, batch: int, micro: int, kind: str, zero: str = "zero1") -> RunConfig:
    make_bert_tokenizer(folder / "tokenizer")
    training = {"zero": zero, "precision": kind, "global_batch_size": batch, "micro_batch_size": micro, "steps": 9}
    training |= {"weight_decay": 0.2, "gradient_clipping": None}
    model = sections(shape, str(folder / "tokenizer"))
    return load_recipe(str(make_recipe(folder, model=model, objective={"kind": "info_nce"}, training=training)))


def batches_of(shape: Shape, batch: int, micro: int) -> list[PairBatch]:
    """Grey images and texts that fill the context, the same every time."""
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (batch, 1, shape.image, shape.image), dtype=torch.uint8, generator=draw)
    ids = torch.randint(5, shape.vocabulary, (batch, shape.length), generator=draw)
    ids[:, 0], ids[:, -1] = 3, 4
    rows = [slice(n, n + micro) for n in range(0, batch, micro)]
    return [PairBatch(ids[r], torch.ones_like(ids[r]), pixels[r], micro, micro) for r in rows]


class Plain:
    """An engine without DeepSpeed."""

    def __init__(self, model: DualEncoderModel, optimizer: torch.optim.Optimizer, accumulation: int):
        self.module, self.optimizer, self.accumulation, self.calls = model, optimizer, accumulation, 0

    def __call__(self, **inputs: Any) -> Any:
        return self.module(**inputs)

    def backward(self, loss: torch.Tensor) -> None:
        (loss / self.accumulation).backward()

    def step(self) -> None:
        self.calls += 1
        if self.calls % self.accumulation == 0:
            self.optimizer.step()
            self.optimizer.zero_grad()


def ours(config: RunConfig, batches: list[PairBatch], plain: bool, update: bool = True) -> Step:
    family = family_of(config.model)
    parts = family.components(config)
    model = family.build(config, parts, precision(config), None).train().to(DEVICE)
    _, groups = prepare(model, config, parts)
    optimizer = make_optimizer(groups, config, 1)
    engine: Any = Plain(model, optimizer, len(batches))
    if not plain:
        distributed.start()
        engine, *_ = distributed.deepspeed.initialize(
            model=model, optimizer=optimizer, config=deepspeed_config(config, 1)
        )
    pairs = sum(b.targets for b in batches)
    given = Pass(config, engine, DEVICE, pairs, {}, 1, len(batches), 0, lambda _: nullcontext())

    def step() -> float:
        outcome = family.passes(given, batches)
        if update:
            engine.step()
        return float(outcome.share)

    return step


def theirs(shape: Shape, source: DualEncoderModel, batches: list[PairBatch], kind: str) -> Step:
    from open_clip.loss import ClipLoss
    from open_clip_train import train

    model = open_clip_model(shape, source).to(DEVICE)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    vectors = [p for n, p in named if p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n or "logit_scale" in n]
    known = set(map(id, vectors))
    groups = [
        {"params": vectors, "weight_decay": 0.0},
        {"params": [p for _, p in named if id(p) not in known], "weight_decay": 0.2},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.999), eps=1e-8)
    given = [(source.pixels(b.pixel_values.to(DEVICE)).float().cpu(), b.input_ids) for b in batches]
    count = sum(len(ids) for _, ids in given)

    class Loader(list):
        num_batches, num_samples = len(given), count

    losses = []

    class Loss(ClipLoss):
        def forward(self, *args: Any, **options: Any) -> Any:
            found = super().forward(*args, **options)
            losses.append(found["contrastive_loss"])
            return found

    amp = "amp_bf16" if kind == "bf16" else "fp32"
    switches = {"device": str(DEVICE), "precision": amp, "accum_freq": len(batches), "distill": False, "horovod": False}
    switches |= {"skip_scheduler": True, "grad_clip_norm": None, "world_size": 1, "rank": 0, "local_rank": 0}
    switches |= {"log_every_n_steps": 10**9, "batch_size": count, "wandb": False, "log_local": False}
    args = SimpleNamespace(**switches)
    data = {"train": SimpleNamespace(set_epoch=lambda _: None, dataloader=Loader(given))}

    def step() -> float:
        losses.clear()
        train.train_one_epoch(model, data, Loss(), 0, optimizer, None, None, None, args)
        return float(losses[0].detach())

    return step


def makers(options: argparse.Namespace, folder: Path) -> dict[str, Callable[[], Step]]:
    shape = SHAPES[options.shape]
    config, whole = (
        recipe(folder, shape, options.batch, options.micro[0], options.precision, zero) for zero in ("zero1", "zero0")
    )
    batches = batches_of(shape, options.batch, options.micro[0])

    def open_clip() -> Step:
        family = family_of(config.model)
        source = family.build(config, family.components(config), torch.float32, None)
        return theirs(shape, source, batches, options.precision)

    table = {"open_clip": open_clip, "ours, ZeRO-1": lambda: ours(config, batches, False)}
    if options.precision == "fp32":
        table["ours, plain engine"] = lambda: ours(config, batches, True)
    else:
        table["ours, ZeRO-0"] = lambda: ours(whole, batches, False)
    return table


def synchronise() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def steps(options: argparse.Namespace) -> None:
    """Prints a table of seconds a step, and of peak memory."""
    with tempfile.TemporaryDirectory() as temporary:
        made = {name: make() for name, make in makers(options, Path(temporary)).items()}
        first = {name: step() for name, step in made.items()}
        assert max(first.values()) - min(first.values()) < (1e-4 if options.precision == "fp32" else 0.05), first
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in made}
        for n in range(options.rounds):
            order = list(made) if n % 2 else list(made)[::-1]
            for name in order:
                synchronise()
                wall, cpu = time.perf_counter(), time.process_time()
                made[name]()
                synchronise()
                seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    print(f"{about()}\n{vars(options)}\nfirst losses {first}\n")
    print("| step | s | CPU-s | to open_clip | CPU, to open_clip | pairs/s | peak MiB |\n|---|---|---|---|---|---|---|")
    base = seconds["open_clip"]
    for name, values in seconds.items():
        wall, cpu = (statistics.median(column) for column in zip(*values, strict=True))
        ratios = (statistics.median(b[k] / v[k] for b, v in zip(base, values, strict=True)) for k in (0, 1))
        cells = [f"{wall:.2f}", f"{cpu:.2f}", *(f"{r:.3f}" for r in ratios), f"{options.batch / wall:.1f}"]
        print(f"| {name} | {' | '.join(cells)} | {peak_of(options, name):.0f} |")


def about() -> str:
    where = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"{os.cpu_count()} cores, 1 thread"
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    return f"{where}, load {load}, Python {platform.python_version()}, torch {torch.__version__}"


def resident() -> float:
    """MiB, at most so far. ``ru_maxrss`` would begin with that of the parent."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def peak_of(options: argparse.Namespace, name: str) -> float:
    """MiB of two steps in a process of their own, which gives every freed block of 64 kB back at once."""
    flags = {"shape": options.shape, "batch": options.batch, "micro": options.micro[0], "precision": options.precision}
    words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, __file__, "peak", *words, "--only", name]
    environment = {k: v for k, v in os.environ.items() if k != "MASTER_PORT"} | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def peak(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        if options.only == "gradients":
            shape, micro = SHAPES[options.shape], options.micro[0]
            config = recipe(Path(temporary), shape, options.batch, micro, options.precision)
            step: Step = ours(config, batches_of(shape, options.batch, micro), True, update=False)
            times = 1
        else:
            make, times = makers(options, Path(temporary))[options.only], 2
            before = resident()
            step = make()
        if options.only == "gradients":
            before = resident()  # with model and batch: what is left is gradients and activations
        for _ in range(times):
            step()
    print(json.dumps(torch.cuda.max_memory_allocated() / 2**20 if DEVICE.type == "cuda" else resident() - before))


def caching(options: argparse.Namespace) -> None:
    """Peak memory of forward and backward passes by micro-batch; the last line, of one micro-batch, is uncached."""
    print(f"{about()}\n{vars(options)}\n\n| pairs a micro-batch | peak MiB above model and images |\n|---|---|")
    for micro in [*options.micro, options.batch]:
        found = argparse.Namespace(**{**vars(options), "micro": [micro]})
        print(f"| {micro} | {peak_of(found, 'gradients'):.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = {"step": steps, "peak": peak, "caching": caching, "gpu": steps}
    parser.add_argument("what", choices=commands)
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--batch", type=int, help="pairs of a step")
    parser.add_argument("--micro", type=int, nargs="+", help="pairs of a micro-batch")
    parser.add_argument("--precision", choices=("fp32", "bf16"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", help="of `peak`: which step")
    options = parser.parse_args()
    if options.what == "gpu" and DEVICE.type == "cpu":
        raise SystemExit("gpu: no GPU here; `step --shape base --batch 4 --micro 2` runs the same code on the CPU")
    usual = {"gpu": ("base", 4096, [256], "bf16"), "caching": ("small", 256, [4, 8, 16, 32, 64], "fp32")}
    shape, batch, micro, kind = usual.get(options.what, ("small", 16, None, "fp32"))
    options.shape, options.batch = options.shape or shape, options.batch or batch
    options.micro, options.precision = options.micro or micro or [options.batch], options.precision or kind
    torch.set_num_threads(1)
    torch.manual_seed(0)
    logging.disable(logging.INFO)
    commands[options.what](options)


if __name__ == "__main__":
    main()
