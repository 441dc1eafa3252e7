"""What a model needs before DeepSpeed takes it."""

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
