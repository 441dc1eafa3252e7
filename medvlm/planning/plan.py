"""What a recipe would need on given GPUs: memory and step time for each ZeRO stage and micro-batch, and a choice."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from medvlm.config.model import Llava
from medvlm.config.schema import RunConfig
from medvlm.errors import UserError
from medvlm.planning.families import batches_of
from medvlm.planning.rehearsal import Job, Rehearsal, rehearse, steps_needed
from medvlm.planning.shape import BatchShape
from medvlm.planning.step_time import Rates, StepTime, step_time

GIB = 2**30
MODES = ("zero0", "zero1", "zero2", "zero3", "zero3_offload")
CONTEXT = int(1.0 * GIB)  # CUDA, NCCL and cuBLAS on a GPU, outside of PyTorch's allocator: an assumption
SLACK = 1.05  # what the allocator rounds up and cannot reuse: an assumption
SCALES = (8, 64, 1024)


@dataclass(frozen=True)
class Machine:
    """``memory`` in bytes per rank; ``base`` is what a rank takes before the model is there."""

    gpus: int
    memory: int
    target: str
    rates: Rates
    base: int = CONTEXT

    def fits(self, peak: int) -> bool:
        return self.base + peak * SLACK <= self.memory


@dataclass(frozen=True)
class Option:
    zero: str
    micro_batch_size: int
    accumulation: int
    peak: int
    host: int
    fits: bool
    time: StepTime


@dataclass
class Plan:
    machine: Machine
    shape: BatchShape
    options: list[Option]
    own: Option | None
    best: Option | None
    kinds: dict[str, int]
    scaling: list[tuple[int, int, Option]]
    """GPUs, global batch, and the recommended option there."""


def make_plan(
    config: RunConfig,
    parts: Any,
    machine: Machine,
    tokens: int | None,
    images: int | None,
) -> Plan:
    """Rehearses each mode with the smallest and a large micro-batch; others lie on the line through both."""
    config = for_target(config, machine.target)
    training = config.training
    per_rank, rest = divmod(training.global_batch_size, machine.gpus)
    if rest:
        raise UserError(
            f"training.global_batch_size: {training.global_batch_size} is not a multiple of {machine.gpus} ranks"
        )
    own = training.micro_batch_size
    sizes = sorted({m for m in (1, 2, 4, 8, 16, 32, 64, own) if per_rank % m == 0})
    ends = sorted({1, max(m for m in sizes if m <= max(4, own))})
    modes = list(dict.fromkeys((*MODES, training.zero)))

    def job(zero: str, micro: int, gpus: int) -> Job:
        return make_job(config, parts, machine.target, zero, micro, gpus, tokens, images)

    todo = [(mode, micro) for mode in modes for micro in ends]
    done = dict(zip(todo, rehearse([job(*each, machine.gpus) for each in todo]), strict=True))
    known = {mode: [(micro, done[mode, micro]) for micro in ends] for mode in modes}
    options = [
        judge(machine, mode, micro, per_rank // micro, between(known[mode], micro)) for mode in modes for micro in sizes
    ]
    best = min((o for o in options if o.fits), key=lambda o: (o.time.total, modes.index(o.zero)), default=None)
    chosen = best or min(options, key=lambda o: o.peak)
    others = [n for n in SCALES if n != machine.gpus]
    exact = rehearse([job(chosen.zero, chosen.micro_batch_size, n) for n in (machine.gpus, *others)])
    scaling = []
    for gpus, rehearsal in zip((machine.gpus, *others), exact, strict=True):
        accumulation = max(1, training.global_batch_size // (chosen.micro_batch_size * gpus))
        there = dataclasses.replace(machine, gpus=gpus)
        option = judge(there, chosen.zero, chosen.micro_batch_size, accumulation, rehearsal)
        scaling.append((gpus, chosen.micro_batch_size * gpus * accumulation, option))
    own_option = next((o for o in options if (o.zero, o.micro_batch_size) == (training.zero, own)), None)
    shape = batches_of(config.model).longest(config, parts, chosen.micro_batch_size, tokens, images)
    return Plan(machine, shape, options, own_option, best, exact[0].peak_kinds, sorted(scaling, key=lambda row: row[0]))


def for_target(config: RunConfig, target: str) -> RunConfig:
    """The recipe as it would run there: bf16 on a GPU. Kernels are this machine's: what they keep is much the same."""
    training, model = config.training, config.model
    if training.precision == "auto":
        training = training.model_copy(update={"precision": "bf16" if target == "cuda" else "fp32"})
    if isinstance(model, Llava):
        attention = {} if model.attention == "eager" else {"attention": "auto"}
        model = model.model_copy(update={"kernels": "auto", **attention})
    return config.model_copy(update={"training": training, "model": model})


def make_job(
    config: RunConfig,
    parts: Any,
    target: str,
    zero: str,
    micro: int,
    gpus: int,
    tokens: int | None = None,
    images: int | None = None,
    quick: bool = False,
) -> Job:
    """Two micro-steps stand for any number of them above one. ``quick``: one, and under ZeRO-3 a single step, whose
    peak lacks what is fetched ahead."""
    from medvlm.training.setup import deepspeed_config

    several = not quick and config.training.global_batch_size > micro * gpus
    update = {"zero": zero, "micro_batch_size": micro, "global_batch_size": micro * gpus * (2 if several else 1)}
    config = config.model_copy(update={"training": config.training.model_copy(update=update)})
    shape = batches_of(config.model).longest(config, parts, micro, tokens, images)
    ds_config = deepspeed_config(config, gpus)
    steps = 1 if quick and ds_config["zero_optimization"]["stage"] == 3 else steps_needed(ds_config)
    return Job(config, parts, ds_config, gpus, shape, target, steps)


def between(known: list[tuple[int, Rehearsal]], micro: int) -> Rehearsal:
    """The rehearsal that a micro-batch would give, on the line through the two that were held."""
    (low, a), (high, b) = known[0], known[-1]
    share = (micro - low) / (high - low) if high > low else 0.0

    def line(x: float, y: float) -> int:
        return round(x + share * (y - x))

    def kinds(phase: str) -> dict[str, int]:
        x, y = a.peaks[phase], b.peaks[phase]
        return {kind: line(x.get(kind, 0), y.get(kind, 0)) for kind in {**x, **y}}

    nearest = a if micro - low <= high - micro else b
    flops = line(a.flops / a.accumulation, b.flops / b.accumulation) * nearest.accumulation
    return dataclasses.replace(nearest, peaks={phase: kinds(phase) for phase in a.peaks}, flops=flops)


def judge(machine: Machine, zero: str, micro: int, accumulation: int, rehearsal: Rehearsal) -> Option:
    time = step_time(rehearsal, machine.gpus, accumulation, machine.rates)
    return Option(zero, micro, accumulation, rehearsal.peak, rehearsal.host, machine.fits(rehearsal.peak), time)
