"""Floating-point operations of a step, from the layers that run and the real lengths of what they run on.

A multiply-add counts 2; linear layers, convolutions and attention count, the rest does not, as in PaLM's model FLOPs
(Chowdhery et al., arXiv 2204.02311, appendix B) and ``torch.utils.flop_counter``. A causal mask is not halved: a token
of a segment of L counts L keys, or the window where that is shorter. Padding and the blank image of a batch without
images are nobody's work and do not count, nor do layers that no feature depends on.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CHECKPOINTED = "GradientCheckpointingLayer"  # of transformers


@dataclass
class Cost:
    """FLOPs of a unit of work. ``again`` is the part of ``forward`` that activation checkpointing repeats."""

    forward: float = 0.0
    backward: float = 0.0
    again: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.forward + other.forward, self.backward + other.backward, self.again + other.again)

    def __mul__(self, factor: float) -> "Cost":
        return Cost(self.forward * factor, self.backward * factor, self.again * factor)

    @property
    def model(self) -> float:
        """What the mathematics needs: MFU."""
        return self.forward + self.backward

    @property
    def hardware(self) -> float:
        """What is computed, recomputation included: HFU."""
        return self.model + self.again


PAIRS = "pairs of tokens"
Unit = str | tuple[str, int | None]
"""What a layer's work is proportional to: images, tokens, targets, ..., or `PAIRS` of tokens that attend, by window."""


def work(counts: Mapping[str, int], pairs: Mapping[int | None, int]) -> dict[Unit, int]:
    """Of a step, over all ranks: ``pairs`` by attention window (None: no window), see :func:`attended_pairs`."""
    done: dict[Unit, int] = {unit: count for unit, count in counts.items()}
    return done | {(PAIRS, window): count for window, count in pairs.items()}


@dataclass
class Costs:
    """By part of the model, of a unit of work."""

    parts: dict[str, dict[Unit, Cost]] = field(default_factory=dict)

    def add(self, part: str, unit: Unit, cost: Cost) -> None:
        units = self.parts[part]
        units[unit] = units.get(unit, Cost()) + cost

    def of(self, done: Mapping[Unit, int], repeated: Callable[[Unit], float] = lambda _: 0.0) -> dict[str, Cost]:
        """By part; ``repeated``: the share of a unit's forward passes that are made twice; what is checkpointed among
        them then thrice."""

        def whole(unit: Unit, cost: Cost) -> Cost:
            return (cost + Cost(again=cost.forward * repeated(unit))) * done[unit]

        return {
            part: sum((whole(unit, cost) for unit, cost in units.items()), Cost()) for part, units in self.parts.items()
        }


def attended_pairs(lengths: Iterable[int], window: int | None) -> int:
    """Sum over segments of length x keys of a token, which is the length or the window."""
    return sum(n * (n if window is None else min(n, window)) for n in lengths)


def attention_windows(text: Any) -> tuple[int | None, ...]:
    """The windows among a language model's layers, each once; None is full attention."""
    layers = range(text.num_hidden_layers)
    return tuple(dict.fromkeys(_window(text, layer) for layer in layers))


def _window(text: Any, layer: int) -> int | None:
    types = getattr(text, "layer_types", None)
    sliding = types is None or types[layer] == "sliding_attention"
    return getattr(text, "sliding_window", None) if sliding else None


@dataclass
class _Call:
    """One run of a layer: ``rows`` x ``flops`` forward; backward once for the input, once for the weight, if wanted.

    ``length`` are the rows that are one sequence.
    """

    module: nn.Module
    unit: str
    rows: float
    length: int
    flops: float
    width: int
    to_input: bool
    to_weight: bool


class CostRecorder:
    """Watches the next forward pass of a model with gradients, once; then ``costs`` says what its units of work cost.

    What is frozen, adapted or checkpointed is seen as it runs: a layer has an activation gradient if its input requires
    one, a weight gradient if its weight does. ``unused`` names, by part, parameters that no output depends on;
    ``unit`` says what a layer's work is counted by, as `Family.unit`. What is compiled (``training.compile``) runs
    uncompiled that once: the hooks would be compiled into it, and then all of it again without them.
    """

    def __init__(
        self, model: nn.Module, names: Iterable[str], unit: Callable[..., str], unused: Mapping[str, set[str]]
    ):
        self.model, self.unit = model, unit
        self.costs = Costs({name: {} for name in names})
        self.done = False
        self.images = 1
        self.calls: dict[str, list[_Call]] = {part: [] for part in self.costs.parts}
        self.handles = [model.register_forward_pre_hook(self._count_images, with_kwargs=True)]
        for part in self.calls:
            idle = {name.rsplit(".", 1)[0] for name in unused.get(part, ())}
            for name, module in getattr(model, part).named_modules():
                flops = _flops_of(module)
                if flops is not None and name not in idle:
                    self.handles.append(module.register_forward_hook(self._recorder(part, flops)))
        self.handles.append(model.register_forward_hook(self._finish))

    def _count_images(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        torch.compiler.set_stance("force_eager")
        self.images = max(1, kwargs["pixel_values"].shape[0])  # where there is none, a blank one

    def _recorder(self, part: str, flops: Callable[[Any], float]) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            weight, rows = next(module.parameters(recurse=False)), args[0]
            count = output.numel() / module.out_channels if isinstance(module, CONV) else rows.numel() / rows.shape[-1]
            call = _Call(
                module,
                self.unit(self.model, part, module, rows),
                count,
                rows.shape[-2] if rows.dim() > 2 else 1,
                flops(args),
                rows.shape[-1],
                rows.requires_grad,
                weight.requires_grad,
            )
            self.calls[part].append(call)

        return record

    def _finish(self, *call_arguments: Any) -> None:
        torch.compiler.set_stance("default")
        if not torch.is_grad_enabled():
            for calls in self.calls.values():
                calls.clear()
            return
        for handle in self.handles:
            handle.remove()
        self.done = True
        for part in self.calls:
            repeated = self._repeated(part)
            for call in self.calls[part]:
                share = call.rows / self.images if call.unit == "images" else 1.0
                self.costs.add(part, call.unit, _layer(call, call.module in repeated) * share)
            for attention, call in self._attentions(part):
                cost = _pair(call, call.module in repeated)
                if call.unit == "images":
                    self.costs.add(part, "images", cost * (call.rows / self.images * call.length))
                else:
                    window = _window(getattr(self.model, part).config, getattr(attention, "layer_idx", 0))
                    self.costs.add(part, (PAIRS, window), cost)
        self.calls.clear()

    def _repeated(self, part: str) -> set[nn.Module]:
        """What activation checkpointing computes again: a layer but for its last matmul, whose input is enough."""
        owners = _owners(getattr(self.model, part), _is_checkpointed)
        last = {owners[call.module]: call.module for call in self.calls[part] if call.module in owners}
        return owners.keys() - set(last.values())

    def _attentions(self, part: str) -> list[tuple[nn.Module, _Call]]:
        """Outermost attention modules, each with the call of its output layer, whose input is what attention gives."""
        owners = _owners(getattr(self.model, part), lambda m: type(m).__name__.endswith("Attention"))
        last: dict[nn.Module, _Call] = {}
        for call in self.calls[part]:
            if call.module in owners:
                last[owners[call.module]] = call
        return list(last.items())


def _flops_of(module: nn.Module) -> Callable[[Any], float] | None:
    """Forward FLOPs of a row, given the arguments of the call; None of what is not counted."""
    if isinstance(module, nn.Linear):
        linear = 2.0 * module.in_features * module.out_features
        return lambda _: linear
    if isinstance(module, CONV):
        kernel = torch.Size(module.kernel_size).numel()
        conv = 2.0 * module.in_channels // module.groups * kernel * module.out_channels
        return lambda _: conv
    own = dict(module.named_parameters(recurse=False))
    if {"gate_up_proj", "down_proj"} <= own.keys():  # experts, fused: [experts, out, in]
        size = sum(_shape(own[name]).numel() for name in ("gate_up_proj", "down_proj"))
        expert = 2.0 * size / _shape(own["down_proj"])[0]
        return lambda args: expert * args[1].shape[-1]  # hidden states, then the experts chosen for each
    if type(module).__name__.endswith("Router") and "weight" in own:
        router = 2.0 * _shape(own["weight"]).numel()
        return lambda _: router
    return None


def _shape(p: nn.Parameter) -> torch.Size:
    return torch.Size(getattr(p, "ds_shape", p.shape))


def _layer(call: _Call, repeated: bool) -> Cost:
    backward = call.flops * (call.to_input + call.to_weight)
    return Cost(call.flops, backward, call.flops if repeated else 0.0)


def _pair(call: _Call, repeated: bool) -> Cost:
    """Scores and their product with the values, 2 x width each; four such products backward."""
    forward = 4.0 * call.width
    return Cost(forward, 2 * forward if call.to_input else 0.0, forward if repeated else 0.0)


def _owners(root: nn.Module, wanted: Callable[[nn.Module], bool]) -> dict[nn.Module, nn.Module]:
    """Each module below a wanted one -> the outermost such; adapters (``lora_A``, ``lora_B``) have none."""
    found: dict[nn.Module, nn.Module] = {}

    def visit(module: nn.Module, owner: nn.Module | None) -> None:
        owner = module if owner is None and wanted(module) else owner
        for name, child in module.named_children():
            if not name.startswith("lora_"):
                if owner is not None:
                    found[child] = owner
                visit(child, owner)

    visit(root, None)
    return found


def _is_checkpointed(module: nn.Module) -> bool:
    kinds = (cls.__name__ for cls in type(module).__mro__)
    return CHECKPOINTED in kinds and getattr(module, "gradient_checkpointing", False)
