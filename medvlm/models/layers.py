"""What is done to a backbone layer by layer: activation checkpointing, torch.compile."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from medvlm.errors import UserError

VARIANTS = 64  # of a compiled function; above, torch runs it uncompiled, with no more than a warning


def repeated_layers(backbone: nn.Module) -> list[nn.Module]:
    """The transformer layers of a Hugging Face model, in order."""
    return [module for module in backbone.modules() if isinstance(module, GradientCheckpointingLayer)]


def checkpoint_activations(backbone: nn.Module, which: bool | int | list[int], field: str) -> None:
    """Recompute activations in the backward pass: of all layers (True), of every ``which``-th, or of those listed."""
    if which is False:
        return
    layers = repeated_layers(backbone)
    if not layers:
        raise UserError(
            f"{field}.gradient_checkpointing: {type(backbone).__name__} has no layers to do it by; leave it out"
        )
    if isinstance(which, list):
        chosen = {number + len(layers) if number < 0 else number for number in which}
    else:
        chosen = set(range(0, len(layers), int(which)))
    if not chosen <= set(range(len(layers))):
        raise UserError(f"{field}.gradient_checkpointing: {which} names a layer beyond the {len(layers)} there are")
    backbone.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    for number, layer in enumerate(layers):
        layer.gradient_checkpointing = number in chosen  # type: ignore[assignment]


def compile_layers(backbones: list[nn.Module], backend: str) -> None:
    """``torch.compile`` for each transformer layer on its own, in place, with sizes left open.

    A layer is compiled once for all its like, batches of another length need no new compilation, and what lies between
    the layers (images merged into the text, the choice of supervised positions) is free to depend on the data.
    """
    known = [*torch.compiler.list_backends(exclude_tags=()), "eager"]
    if backend not in known:
        raise UserError(f"training.compile: torch has no backend {backend!r}; known: {', '.join(sorted(set(known)))}")
    # one Python function serves all kinds of layers, with masks and without, of one row and of more, in validation too
    torch._dynamo.config.recompile_limit = VARIANTS
    for backbone in backbones:
        if isinstance(backbone, PreTrainedModel):
            maybe_install_capturing_hooks(backbone)  # now, so that it is not done later
        for layer in repeated_layers(backbone):
            for module in layer.modules():
                if module is not layer:
                    _forget_capturing(module)
            # not ``layer.compile``, which takes in the layer's own hooks: transformers' collects hidden states there
            layer.forward = torch.compile(layer.forward, backend=backend, dynamic=True)


def _forget_capturing(module: nn.Module) -> None:
    """Remove transformers' hook that collects attention weights, of which fused attention has none: it asks a
    ``ContextVar``, where a graph ends."""
    for number, hook in list(module._forward_hooks.items()):
        if hook.__module__ == maybe_install_capturing_hooks.__module__:
            del module._forward_hooks[number]
