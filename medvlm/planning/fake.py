"""Tensors without memory, and a count of the memory, the communication and the work they would have taken."""

import weakref
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from medvlm.models import attention

aten: Any = torch.ops.aten
COPIES = (aten._to_copy.default, aten.copy_.default)
FLOPS = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}
VIEWS = {
    *(aten.slice.Tensor, aten.split.Tensor, aten.select.int, aten.as_strided.default, aten.view.default),
    *(aten.detach.default, aten.alias.default, aten.t.default, aten.transpose.int, aten.unsqueeze.default),
}
ACTIVATIONS, GATHERED, OTHER = "activations", "gathered parameters", "other"


@dataclass
class Collectives:
    """What this rank takes part in: calls, and bytes of the whole (gathered, reduced or broadcast) tensors."""

    calls: int = 0
    bytes: int = 0


class Count(TorchDispatchMode):
    """Inside a ``FakeTensorMode``: counts memory, collectives, copies between devices and FLOPs.

    Memory: the storages of fake tensors by device and by kind, from birth to death. ``live`` is {device: {kind:
    bytes}}; ``peaks`` holds, per phase and device, the largest total and its kinds. While ``kernel`` is set, nothing is
    recorded as a peak: the operations stand for one kernel without temporary tensors.

    Tensors that are real (token ids, masks) are computed for real, as the shapes of what follows depend on their
    values. A number that only a real gradient could give (a norm, a flag of overflow) is made up: 1.0, 0 or False.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        self.total: dict[str, int] = defaultdict(int)
        self.peaks: dict[tuple[str, str], tuple[int, dict[str, int]]] = {}
        self.collectives: dict[str, dict[str, Collectives]] = defaultdict(lambda: defaultdict(Collectives))
        self.flops = self.transfers = 0
        self.phase, self.kind, self.kernel = "start", OTHER, False
        self._known: dict[int, tuple[Any, str, str, int]] = {}  # address -> weak reference, device, kind, bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # `tensor.device`, which is half of all calls
        kwargs = kwargs or {}
        if func in VIEWS and isinstance(args[0], FakeTensor):
            return _view(func, args, kwargs)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        real = [t for t in tensors if not isinstance(t, FakeTensor)]
        if real and func is not aten.lift_fresh.default:
            if len(real) == len(tensors):
                kwargs = {k: v for k, v in kwargs.items() if k != "device"}  # they stay where they have values
                with unset_fake_temporarily():
                    return func(*args, **kwargs)
            device = next(t.device for t in tensors if isinstance(t, FakeTensor))
            if func is aten.index.Tensor:
                args = (args[0], _positions(args[1]))
            args, kwargs = tree_map_only(torch.Tensor, lambda t: _as_fake(t, device), (args, kwargs))
        if func.namespace == "c10d":
            return self._communicate(func, args, kwargs)
        if func is aten._local_scalar_dense.default:
            return _number(func, args[0])
        out = func(*args, **kwargs)
        if func._overloadpacket in FLOPS:
            self.flops += FLOPS[func._overloadpacket](*args, **kwargs, out_val=out)
        if func in COPIES:
            self._moved(*tensors, out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, FakeTensor):
                self._add(tensor, self.kind)
        return out

    def _moved(self, *tensors: torch.Tensor) -> None:
        if len({t.device.type for t in tensors}) > 1:
            self.transfers += tensors[0].numel() * tensors[0].itemsize

    def _communicate(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = func._overloadpacket.__name__.replace("_", "")
        groups = [[t for t in tree_leaves(a) if isinstance(t, FakeTensor)] for a in args]
        whole = max((sum(t.numel() * t.itemsize for t in group) for group in groups if group), default=0)
        gathers = "gather" in name
        kind = "all-gather" if gathers else "reduce-scatter" if "reducescatter" in name else "all-reduce"
        if "broadcast" in name or "barrier" in name:
            kind = "other"
        self.collectives[self.phase][kind].calls += 1
        self.collectives[self.phase][kind].bytes += whole
        out = func(*args, **kwargs)
        if gathers and self.kind == ACTIVATIONS:
            self.label([t for group in groups for t in group], GATHERED)
        return out

    def label(self, tensors: Any, kind: str) -> int:
        """Say what storages are, after the fact; returns their bytes."""
        storages = {t.untyped_storage()._cdata: t for t in tensors if isinstance(t, FakeTensor)}
        for address, tensor in storages.items():
            self._remove(address)
            self._add(tensor, kind)
        return sum(t.untyped_storage().nbytes() for t in storages.values())

    def _add(self, tensor: torch.Tensor, kind: str) -> None:
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        known = self._known.get(address)
        if known and known[0]() is storage:
            return
        device = tensor.device.type
        self._known[address] = (weakref.ref(storage, lambda _: self._remove(address)), device, kind, size)
        self.live[device][kind] += size
        self.total[device] += size
        if not self.kernel and self.total[device] > self.peaks.get((self.phase, device), (0, {}))[0]:
            self.peaks[self.phase, device] = (self.total[device], dict(self.live[device]))

    def _remove(self, address: int) -> None:
        known = self._known.pop(address, None)
        if known:
            self.live[known[1]][known[2]] -= known[3]
            self.total[known[1]] -= known[3]


def _view(func: Any, args: Any, kwargs: Any) -> Any:
    """Of a fake tensor, by the meta kernel alone: ZeRO-3 cuts each parameter into as many as there are ranks, and
    ``FakeTensorMode`` takes half a millisecond for each."""
    mode, device = args[0].fake_mode, args[0].fake_device
    with in_kernel_invocation_manager(mode):
        out = func(*args, **kwargs)
    if isinstance(out, torch.Tensor):
        return FakeTensor(mode, out, device)
    return [FakeTensor(mode, t, device) for t in out]


def _number(func: Any, tensor: torch.Tensor) -> float | int | bool:
    """Of a fake tensor: its value if it is a constant that was never computed with, else one that lets a step go on."""
    try:
        return func(tensor)
    except (DataDependentOutputException, NotImplementedError, RuntimeError):
        return 1.0 if tensor.is_floating_point() else (False if tensor.dtype == torch.bool else 0)


def _as_fake(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if isinstance(tensor, FakeTensor):
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


def _positions(indices: Any) -> list[Any]:
    """Real masks as positions, since only these say how many there are."""
    out: list[Any] = []
    for index in indices:
        if index is not None and not isinstance(index, FakeTensor) and index.dtype in (torch.bool, torch.uint8):
            with unset_fake_temporarily():
                out += index.nonzero().unbind(1)
        else:
            out.append(index)
    return out


@contextmanager
def fused_attention() -> Iterator[None]:
    """On the meta device PyTorch would take its plain attention, with a [T, T] matrix; a GPU takes a fused one.

    A patch and not a ``TorchFunctionMode``, which is off while it handles ``backward``: recomputed layers would then
    take another attention than they took in the forward pass.
    """
    plain = torch.nn.functional.scaled_dot_product_attention

    def chosen(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return (_fused_attention if query.device.type == "meta" else plain)(query, *args, **kwargs)

    places: tuple[Any, ...] = (torch.nn.functional, attention)
    for place in places:
        place.scaled_dot_product_attention = chosen
    try:
        yield
    finally:
        for place in places:
            place.scaled_dot_product_attention = plain


def _fused_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    if attn_mask is None:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if attn_mask.dtype == torch.bool:
        attn_mask = attn_mask.to(query.dtype)
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) if enable_gqa and groups > 1 else t for t in (key, value))
    bias = attn_mask.expand(*query.shape[:3], key.shape[2])
    return aten._scaled_dot_product_efficient_attention(query, key, value, bias, True, dropout_p, is_causal)[0]


def fake_tensors() -> FakeTensorMode:
    return FakeTensorMode(allow_non_fake_inputs=True)
