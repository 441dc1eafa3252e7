"""What a rank holds of each parameter, and where, at every ZeRO stage: the one place that knows DeepSpeed's layout.

Read from deepspeed 0.19's ``runtime/zero/stage3.py`` and ``stage_1_and_2.py``. A *flat* tensor is what the optimizer
updates: a run of parameters joined (ZeRO-1 to 3), or one parameter (ZeRO-0).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
from torch import Tensor, nn

from medvlm.training import distributed


@dataclass
class Fragment:
    """Elements ``start`` to ``start + numel`` of the flat parameter ``name``, at ``at`` in the flat tensor."""

    name: str
    start: int
    numel: int
    at: int


@dataclass
class Flat:
    """``state`` is the optimizer's own dict for ``tensor``, empty before the first update. ``lent``: both are gone from
    memory when the next flat tensor is asked for. ``alike``: all ranks hold the same, and each writes a share."""

    tensor: Tensor
    state: dict[str, Any]
    fragments: list[Fragment]
    lent: bool = False
    alike: bool = False

    @property
    def layout(self) -> list[list[Any]]:
        """What of which parameters a state of the flat tensor as a whole belongs to."""
        if self.alike:
            return [[f.name, 0, self.tensor.numel(), 0] for f in self.fragments]
        return [[f.name, f.start, f.numel, f.at] for f in self.fragments]


def flats(engine: Any, *, writing: bool) -> Iterator[Flat]:
    """The flat tensors of this rank, one after another; state on NVMe is in memory only while it is being looked at.

    ``writing``: only what this rank writes into a checkpoint, where several ranks hold the same. Otherwise everything
    that it must be given, and what is changed is kept.
    """
    stage = engine.zero_optimization_stage()
    names = {id(p): name for name, p in engine.module.named_parameters()}
    by_stage = {0: _whole, 3: _sharded}.get(stage, _divided)
    yield from by_stage(engine.optimizer, names, writing)


def _whole(optimizer: Any, names: dict[int, str], writing: bool) -> Iterator[Flat]:
    """ZeRO-0: every rank updates every parameter, or in bf16 its fp32 copy; each writes its share of it."""
    for p, tensor in _copies(optimizer):
        start, stop = _share(p.numel()) if writing else (0, p.numel())
        fragments = [Fragment(names[id(p)], start, stop - start, start)]
        yield Flat(tensor, optimizer.state[tensor], fragments, alike=True)


def _copies(optimizer: Any) -> list[tuple[nn.Parameter, Tensor]]:
    """Under ZeRO-0, parameters of the model and what the optimizer updates in their place."""
    groups = [group["params"] for group in optimizer.param_groups]
    models = getattr(optimizer, "fp16_groups", groups)  # DeepSpeed's name for those of any low precision
    return [pair for model, updated in zip(models, groups, strict=True) for pair in zip(model, updated, strict=True)]


def _divided(zero: Any, names: dict[int, str], writing: bool) -> Iterator[Flat]:
    """ZeRO-1 and 2: a group's parameters are joined, and the rank has one slice of that, which may cut parameters."""
    if hasattr(zero, "single_partition_of_fp32_groups"):
        partitions, groups = zero.single_partition_of_fp32_groups, zero.bit16_groups
    else:  # what DeepSpeed takes for ZeRO-1 in bf16 with gradients summed in fp32
        partitions, groups = zero.fp32_groups_flat_partition, zero.bf16_groups
    for tensor, parameters in zip(partitions, groups, strict=True):
        fragments = []
        for p in parameters:
            if p._hp_mapping is not None:
                inside, outside = p._hp_mapping.lp_fragment_address, p._hp_mapping.hp_fragment_address
                fragments.append(Fragment(names[id(p)], inside.start, inside.numel, outside.start))
        yield Flat(tensor, zero.optimizer.state[tensor], fragments)


def _sharded(zero: Any, names: dict[int, str], writing: bool) -> Iterator[Flat]:
    """ZeRO-3: every parameter is cut into equal parts, one per rank; the parts of a sub-group are joined."""
    for n, (tensor, parameters) in enumerate(zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True)):
        swapped = zero._swappable_optimizer_subgroup(n)
        if swapped:
            zero._optimizer_states_and_gradient_swap_in(n)
        fragments, at = [], 0
        for p in parameters:
            start, numel = shard(p)
            if numel:
                fragments.append(Fragment(names[id(p)], start, numel, at))
            at += p.partition_numel()
        yield Flat(tensor, zero.optimizer.state[tensor], fragments, swapped)
        if not writing:
            zero._reassign_or_swap_out_partitioned_parameters(n)
            if swapped:
                zero._optimizer_states_and_gradient_swap_out(n)
        elif swapped:
            zero._release_swap_buffers(n)


def shard(p: nn.Parameter) -> tuple[int, int]:
    """First element and number of elements of the shard of a ZeRO-3 parameter that this rank holds, without padding."""
    part: Any = p
    start = part.ds_zero_partition_rank * part.partition_numel()
    return start, max(0, min(part.ds_numel - start, part.partition_numel()))


@contextmanager
def held(p: nn.Parameter, *, writing: bool, change: bool = False) -> Iterator[tuple[int, Tensor]]:
    """Of any parameter: the first element, and the values, that this rank holds in the type of the forward pass.

    What lies on an NVMe drive is in memory meanwhile; ``change``: and is written back.
    """
    part: Any = p
    if not hasattr(p, "ds_id"):
        start, stop = _share(p.numel()) if writing else (0, p.numel())
        yield start, p.data.view(-1)[start:stop]
        return
    start, numel = shard(p)
    away = on_drive(p)
    if away:
        part.nvme_swapper.swap_in([p], async_op=False)
    yield start, part.ds_tensor.data.view(-1)[:numel]
    if away and change:
        part.nvme_swapper.swap_out_and_release([p])
    elif away:
        part.nvme_swapper.remove_partition_and_release_buffers([p])


def on_drive(p: nn.Parameter) -> bool:
    """Whether ZeRO-3 keeps the shard of this rank on an NVMe drive, and has it not in memory now."""
    part: Any = p
    return hasattr(p, "ds_id") and part.ds_tensor.status == PartitionedParamStatus.NOT_AVAILABLE


def forget_copy(p: nn.Parameter) -> None:
    """After a shard was written: the copy of it within a node (ZeRO-3's hpZ) is made anew when it is next gathered."""
    if hasattr(p, "ds_secondary_tensor"):
        p.ds_secondary_tensor = None


def _share(numel: int) -> tuple[int, int]:
    """What a rank takes of something that all ranks hold."""
    rank, world = distributed.rank(), distributed.world_size()
    return rank * numel // world, (rank + 1) * numel // world


def base_optimizer(engine: Any) -> Any:
    """The optimizer that was given to DeepSpeed, without what DeepSpeed put around it."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def before_writing_weights(engine: Any) -> None:
    """Under ZeRO-3 no parameter may be whole while its shards change."""
    if engine.zero_optimization_stage() == 3:
        engine.optimizer._partition_all_parameters()


def after_writing_weights(engine: Any) -> None:
    """Renew what is derived from the flat tensors and the shards: low-precision and whole parameters."""
    stage = engine.zero_optimization_stage()
    if stage == 3:
        for p in engine.module.parameters():
            forget_copy(p)
        engine.optimizer.checkpoint_event_epilogue()
    elif stage > 0:
        engine.optimizer.update_lp_params()
    else:
        for p, updated in _copies(engine.optimizer):
            p.data.copy_(updated.data)


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Buffers that a state dict holds, such as running means: the same on all ranks."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, child in module.named_modules()
        for name, buffer in child._buffers.items()
        if buffer is not None and name not in child._non_persistent_buffers_set
    }
