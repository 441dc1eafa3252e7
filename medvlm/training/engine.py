"""What a model needs before DeepSpeed takes it, and its engine before it trains."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
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
def one_secondary_group() -> Iterator[None]:
    """Lets several ``zero.Init`` build a model with ``zero_hpz_partition_size``: transformers makes one per backbone.

    DeepSpeed creates the group of ranks that hold the secondary copy in each of them, and asserts that there is none.
    """
    create = groups._create_zero_param_parallel_group

    def create_once(size: int) -> None:
        if groups._get_zero_param_intra_parallel_group() is None:
            create(size)

    with mock.patch.object(groups, "_create_zero_param_parallel_group", create_once):
        yield
