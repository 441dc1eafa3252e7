"""What a model needs before DeepSpeed takes it, and its engine before it trains."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import AsyncPartitionedParameterSwapper
from deepspeed.runtime.zero import partition_parameters
from deepspeed.utils import groups
from torch import nn


def lift_scalars(model: nn.Module) -> list[str]:
    """Give 0-dim parameters (CLIP's logit_scale) one dimension, in place; returns their names.

    ``deepspeed.initialize`` fails on them at every ZeRO stage: "self.dim() cannot be 0 to view Float as Byte".
    """
    lifted = []
    for prefix, module in model.named_modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if p.dim() == 0 and not hasattr(p, "ds_id"):
                setattr(module, name, nn.Parameter(p.detach().reshape(1), p.requires_grad))
                lifted.append(f"{prefix}.{name}" if prefix else name)
    return lifted


def forget_first_step(engine: Any) -> None:
    """Undo what DeepSpeed's bf16 optimizer of ZeRO-0 does when it is made, in place.

    ``FP16_UnfusedOptimizer`` creates its optimizer's state by one step on zero gradients. AdamW then counts one update
    too many in its bias corrections, and has decayed the fp32 weights once at the peak learning rate. The ZeRO stages
    create their state otherwise.
    """
    if isinstance(engine.optimizer, FP16_UnfusedOptimizer):
        engine.optimizer.optimizer.state.clear()
        engine.optimizer.refresh_fp32_params()  # from the model's weights, which that step has not touched


@contextmanager
def shared_by_inits() -> Iterator[None]:
    """Lets several ``zero.Init`` build one model: transformers makes one per backbone.

    With ``zero_hpz_partition_size`` each creates the group of ranks that hold the secondary copy, and asserts that
    there is none. With parameters on NVMe each has a swapper of its own, which begins by deleting the files of the
    others, and only that of the first parameter is prepared for updates.
    """
    create = groups._create_zero_param_parallel_group
    made: list[Any] = []

    def create_once(size: int) -> None:
        if groups._get_zero_param_intra_parallel_group() is None:
            create(size)

    def swapper_once(*arguments: Any) -> Any:
        if not made:
            made.append(AsyncPartitionedParameterSwapper(*arguments))
        return made[0]

    with (
        mock.patch.object(groups, "_create_zero_param_parallel_group", create_once),
        mock.patch.object(partition_parameters, "AsyncPartitionedParameterSwapper", swapper_once),
    ):
        yield
