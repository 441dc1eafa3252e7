"""A training step rehearsed without memory: the run's own model, optimizer and DeepSpeed engine, on fake tensors.

DeepSpeed itself shards, gathers, reduces and steps, as one rank of a fake process group of as many ranks as wanted:
what is counted is what it allocates and sends. Nothing is read but configurations and the tokenizer.
"""

import dataclasses
import logging
import multiprocessing
import os
import tempfile
import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from medvlm.config.schema import RunConfig
from medvlm.models.trainable import PartSummary, backbones
from medvlm.planning.fake import ACTIVATIONS, OTHER, Collectives, Count, fake_tensors, fused_attention
from medvlm.planning.families import batches_of
from medvlm.planning.shape import BatchShape

GRADIENTS, OPTIMIZER, PARAMETERS, BUCKETS = "gradients", "optimizer", "parameters", "communication buckets"
DEFAULT_BUCKET = 500_000_000  # DeepSpeed's reduce_bucket_size, in elements


@dataclass(frozen=True)
class Job:
    """One rehearsal. ``target`` is cuda or cpu; ``steps`` are `steps_needed` for the memory of a long run."""

    config: RunConfig
    parts: Any
    ds_config: dict[str, Any]
    world: int
    shape: BatchShape
    target: str
    steps: int


@dataclass
class Rehearsal:
    """Of one rank. Bytes: ``peaks`` is {phase: {kind: bytes}} on the device, the phases being start (building the model
    and DeepSpeed), forward_backward and step; ``host`` the peak of what an offload keeps there; ``state`` is {kind:
    bytes} of what stays between steps.

    Of the last step: ``flops``, ``collectives`` as {phase: {kind: ...}}, and bytes moved to and from the host.
    """

    peaks: dict[str, dict[str, int]]
    host: int
    state: dict[str, int]
    summaries: list[PartSummary]
    flops: int
    collectives: dict[str, dict[str, Collectives]]
    transfers: int
    stage: int
    accumulation: int
    seconds: float

    @property
    def peak(self) -> int:
        return max(sum(kinds.values()) for kinds in self.peaks.values())

    @property
    def peak_kinds(self) -> dict[str, int]:
        return max(self.peaks.values(), key=lambda kinds: sum(kinds.values()))


def steps_needed(ds_config: dict[str, Any]) -> int:
    """ZeRO-3 learns the order of modules in two passes and then fetches ahead. At the other stages the first update
    makes Adam's moments, so that only later passes have them beside their activations."""
    stage, passes = ds_config["zero_optimization"]["stage"], ds_config["gradient_accumulation_steps"]
    return -(-3 // passes) if stage == 3 else 2


def rehearse(jobs: Sequence[Job]) -> list[Rehearsal]:
    """Each in a process of its own, as DeepSpeed keeps state per process. Call it before joining a process group."""
    if not jobs:
        return []
    # imported here once, the forked processes need not
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401

    from medvlm.training import distributed, optimizer, setup  # noqa: F401

    workers = min(len(jobs), os.cpu_count() or 1)
    with multiprocessing.get_context("fork").Pool(workers, maxtasksperchild=1) as pool:
        return pool.map(rehearse_here, jobs, chunksize=1)


def rehearse_here(job: Job) -> Rehearsal:
    """In this process, of which nothing else can be made afterwards."""
    with tempfile.TemporaryDirectory() as drive:  # DeepSpeed makes its folders there, and deletes what it finds
        zero = dict(job.ds_config["zero_optimization"])
        for place in ("offload_optimizer", "offload_param"):
            if (zero.get(place) or {}).get("device") == "nvme":
                zero[place] = {**zero[place], "nvme_path": drive}
        config = {key: value for key, value in job.ds_config.items() if key != "aio"}  # GPUDirect needs a compiler
        return _rehearse(dataclasses.replace(job, ds_config={**config, "zero_optimization": zero}))


def _rehearse(job: Job) -> Rehearsal:
    """As `rehearse_here`, of a job that touches no drive."""
    from medvlm.training import distributed
    from medvlm.training.engine import shared_by_inits
    from medvlm.training.families import Pass, family_of
    from medvlm.training.optimizer import make_optimizer
    from medvlm.training.setup import precision, prepare

    started = time.perf_counter()
    device = torch.device("meta" if job.target == "cuda" else "cpu")
    _pretend(job.world, device)
    config, count, family = job.config, Count(), family_of(job.config.model)
    with fake_tensors(), fused_attention(), count:
        stage = job.ds_config["zero_optimization"]["stage"]
        with shared_by_inits(), torch.device("cpu") if stage == 3 else device:  # ZeRO-3 moves what it shards
            model = family.build(_without_weights(config), job.parts, precision(config), job.ds_config)
        summaries, groups = prepare(model, config, job.parts)
        optimizer = make_optimizer(groups, config, stage)
        _mark_updates(optimizer, count, one_kernel=job.target == "cuda")
        for p in model.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(lambda p: _label_gradient(count, p))
        engine, optimizer, *_ = distributed.deepspeed.initialize(
            model=model, optimizer=optimizer, config=_for_rehearsal(job, summaries)
        )
        _phases(engine, count)
        accumulation = job.ds_config["gradient_accumulation_steps"]
        batches = [batches_of(config.model).make_batch(job.shape, job.parts)] * accumulation
        counts = {name: sum(getattr(b, name) for b in batches) for name in ("targets", *family.counted)}
        given = Pass(
            *(config, engine, device, counts["targets"], counts, job.world, accumulation, 0),
            lambda _: nullcontext(),
        )
        for _ in range(job.steps):
            _label(count, engine)
            count.collectives.clear()
            count.flops = count.transfers = 0
            family.passes(given, batches)
            engine.step()
        state = _label(count, engine)
    on_device = {phase: kinds for (phase, where), (_, kinds) in count.peaks.items() if where == device.type}
    offloads = {"offload_optimizer", "offload_param"} & job.ds_config["zero_optimization"].keys()
    host = [total for (_, where), (total, _) in count.peaks.items() if offloads and where != device.type]
    return Rehearsal(
        peaks={phase: {k: v for k, v in kinds.items() if v} for phase, kinds in on_device.items()},
        host=max(host, default=0),
        state=state,
        summaries=summaries,
        flops=count.flops,
        collectives={phase: dict(kinds) for phase, kinds in count.collectives.items()},
        transfers=count.transfers,
        stage=stage,
        accumulation=accumulation,
        seconds=time.perf_counter() - started,
    )


def _pretend(world: int, device: torch.device) -> None:
    """Rank 0 of a process group in which nobody else takes part; an accelerator whose device may be ``meta``."""
    warnings.simplefilter("ignore")
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world)}
    from deepspeed.accelerator import set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    from deepspeed.ops.op_builder.cpu import AsyncIOBuilder
    from deepspeed.runtime.zero import utils as zero_utils
    from deepspeed.utils import logger
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from medvlm.objectives import gather
    from medvlm.training import distributed

    class Pretended(CPU_Accelerator):
        def device_name(self, device_index: int | None = None) -> str:
            return device.type

        def current_device_name(self) -> str:
            return device.type

    logger.setLevel(logging.ERROR)
    set_accelerator(Pretended())
    nn.Module._apply = _apply  # type: ignore[method-assign, assignment]
    distributed.device = lambda: device
    distributed.deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    distributed.deepspeed.init_distributed("fake", verbose=False)
    AsyncIOBuilder.load = lambda *_, **__: SimpleNamespace(aio_handle=_NoDrive)
    # nobody is there to disagree, or to have other numbers of rows
    gather.row_counts = lambda rows: [len(rows)] * world
    zero_utils.assert_lst_len_same_as_other_ranks = lambda _: None
    zero_utils.get_lst_from_rank0 = lambda values: values


def _apply(module: nn.Module, function: Any, recurse: bool = True) -> nn.Module:
    """`nn.Module._apply`, which wants to swap tensors in place and cannot where they are fake."""
    for child in module.children() if recurse else ():
        child._apply(function)
    for key, p in list(module._parameters.items()):
        if p is None or (moved := function(p)) is p:
            continue
        if moved.device.type == p.device.type:
            p.data = moved.data
        else:
            module._parameters[key] = nn.Parameter(moved.detach(), p.requires_grad)
    for key, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[key] = function(buffer)
    return module


class _NoDrive:
    """In place of DeepSpeed's ``aio_handle``, which needs a compiler: buffers are made, and nothing is moved."""

    def __init__(self, *_: Any, **__: Any):
        self.asked = 0

    def new_cpu_locked_tensor(self, count: int, like: torch.Tensor) -> torch.Tensor:
        return torch.empty(count, dtype=like.dtype, device="cpu")

    def free_cpu_locked_tensor(self, tensor: torch.Tensor) -> bool:
        return True

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return True

    def async_pread(self, *_: Any) -> int:
        self.asked += 1
        return 0

    async_pwrite = async_pread

    def wait(self) -> int:
        done, self.asked = self.asked, 0
        return done


def _without_weights(config: RunConfig) -> RunConfig:
    """The same shapes from scratch: what a pretrained backbone holds is of no interest."""
    model, origin = config.model, {"path": None, "config": {"model_type": ""}}
    parts = {name: getattr(model, name).model_copy(update=origin) for name in backbones(model)}
    return config.model_copy(update={"model": model.model_copy(update=parts)})


def _for_rehearsal(job: Job, summaries: list[PartSummary]) -> dict[str, Any]:
    """DeepSpeed's configuration, with another CPU optimizer, as its own takes no fake tensors.

    A CPU takes memory when it is written, so buckets count only as far as gradients can fill them.
    """
    zero = dict(job.ds_config["zero_optimization"])
    trainable = sum(s.trainable for s in summaries)
    if job.target == "cpu" and trainable < zero.get("reduce_bucket_size", DEFAULT_BUCKET):
        zero |= {"reduce_bucket_size": trainable, "overlap_comm": False}
    return {**job.ds_config, "zero_optimization": zero, "zero_force_ds_cpu_optimizer": False}


def _mark_updates(optimizer: torch.optim.Optimizer, count: Count, one_kernel: bool) -> None:
    """A GPU's optimizers update in one kernel, without the temporary tensors of the plain ones that stand in here."""
    step = optimizer.step

    def marked(*arguments: Any, **options: Any) -> Any:
        kind, count.kind, count.kernel = count.kind, OPTIMIZER, one_kernel
        try:
            return step(*arguments, **options)
        finally:
            count.kind, count.kernel = kind, False

    optimizer.step = marked  # type: ignore[method-assign]


def _phases(engine: Any, count: Count) -> None:
    """From here on, what is born belongs to forward and backward, or to ``engine.step``."""
    step = engine.step
    count.phase, count.kind = "forward_backward", ACTIVATIONS

    def marked(*arguments: Any, **options: Any) -> None:
        count.phase, count.kind = "step", OTHER
        step(*arguments, **options)
        count.phase, count.kind = "forward_backward", ACTIVATIONS

    engine.step = marked


def _label_gradient(count: Count, p: nn.Parameter) -> None:
    if p.grad is not None:
        count.label([p.grad], GRADIENTS)


def _label(count: Count, engine: Any) -> dict[str, int]:
    """Say what DeepSpeed's tensors are; returns the bytes of each kind."""
    zero = engine.optimizer
    optimizer = getattr(zero, "optimizer", zero)
    parameters = list(engine.module.parameters())
    master = [p for group in optimizer.param_groups for p in group["params"]]
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):
        master += getattr(zero, name, [])
    states = [value for values in optimizer.state.values() for value in values.values()]
    buckets = [value for bucket in getattr(zero, "ipg_buckets", {}).values() for value in vars(bucket).values()]
    buckets = [b for value in buckets for b in (value if isinstance(value, list) else [value])]
    gradients = [p.grad for p in [*parameters, *master] if p.grad is not None]
    gradients += [getattr(zero, "grad_partitions_flat_buffer", None)]
    gradients += [g for group in getattr(zero, "averaged_gradients", {}).values() if group for g in group]
    own = [getattr(p, "ds_tensor", p.data) for p in parameters]
    whole = [p.data for p in parameters]
    named = {OPTIMIZER: [*master, *states], BUCKETS: buckets, GRADIENTS: gradients, PARAMETERS: [*own, *whole]}
    return {kind: count.label([t for t in tensors if t is not None], kind) for kind, tensors in named.items()}
