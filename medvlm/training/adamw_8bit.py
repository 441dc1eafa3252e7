"""AdamW whose two moments take one byte each (Dettmers et al., arXiv 2110.02861), in plain PyTorch.

bitsandbytes has it for CUDA only. torchao's state is a tensor subclass that cannot be cut, which DeepSpeed does to find
parameters in its flat partitions, and its step is compiled. Here the state is plain uint8 and fp32 tensors.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

BLOCK = 256  # elements that share a scale
CHUNK = BLOCK * 2**16  # elements updated at a time: bounds the fp32 copies


def dynamic_map(signed: bool) -> Tensor:
    """The 256 values of dynamic tree quantization, ascending: 0, 1, and for each decade 10^-e, e = 0 to 6, the middles
    of equal parts of [0.1, 1], half as many per decade down (section 1.3 of the paper)."""
    values = [torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)]
    for e in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (6 - e + (not signed)) + 1, dtype=torch.float64)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0**-e
        values += [middles, -middles] if signed else [middles]
    return torch.cat(values).sort().values.float()


def quantize(values: Tensor, book: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 [n] -> codes uint8 [n] of the nearest values in ``book`` (ascending), and the scale of each block."""
    blocks = _blocks(values)
    scales = blocks.abs().amax(1)
    normed = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    codes = torch.bucketize(normed, (book[:-1] + book[1:]) / 2)
    return codes.to(torch.uint8).view(-1)[: len(values)], scales


def dequantize(codes: Tensor, scales: Tensor, book: Tensor) -> Tensor:
    return (_blocks(book[codes.int()]) * scales[:, None]).view(-1)[: len(codes)]


def _blocks(values: Tensor) -> Tensor:
    return torch.nn.functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)


class AdamW8bit(torch.optim.Optimizer):
    """Groups with ``matrix: False`` (biases, norms) keep fp32 moments: they are small, and sensitive."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "matrix": True})
        self.books: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:  # type: ignore[override]  # no closure, no loss
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)

    def _update(self, p: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["step"] = 0
            for name in ("exp_avg", "exp_avg_sq"):
                if group["matrix"]:
                    state[f"{name}_codes"] = self._zeros(p, name)
                    state[f"{name}_scales"] = p.new_zeros(-(-p.numel() // BLOCK), dtype=torch.float32)
                else:
                    state[name] = torch.zeros_like(p, dtype=torch.float32)
        state["step"] += 1
        flat, gradient = p.view(-1), p.grad.view(-1)  # type: ignore[union-attr]  # the caller looked
        for begin in range(0, p.numel(), CHUNK):
            part = slice(begin, begin + CHUNK)
            m, v = (self._moment(state, name, part, p.device) for name in ("exp_avg", "exp_avg_sq"))
            _adamw(flat[part], gradient[part].float(), m, v, state["step"], group)
            self._keep(state, "exp_avg", part, m)
            self._keep(state, "exp_avg_sq", part, v)

    def _moment(self, state: dict[str, Any], name: str, part: slice, device: torch.device) -> Tensor:
        if name in state:
            return state[name].view(-1)[part]
        scales = state[f"{name}_scales"][part.start // BLOCK : -(-part.stop // BLOCK)]
        return dequantize(state[f"{name}_codes"].view(-1)[part], scales, self._book(name, device))

    def _keep(self, state: dict[str, Any], name: str, part: slice, moment: Tensor) -> None:
        if name not in state:
            codes, scales = quantize(moment, self._book(name, moment.device))
            state[f"{name}_codes"].view(-1)[part] = codes
            state[f"{name}_scales"][part.start // BLOCK : -(-part.stop // BLOCK)] = scales

    def _zeros(self, p: Tensor, name: str) -> Tensor:
        zero = int((self._book(name, p.device) == 0).nonzero())
        return torch.full_like(p, zero, dtype=torch.uint8)

    def _book(self, name: str, device: torch.device) -> Tensor:
        if device not in self.books:
            self.books[device] = dynamic_map(signed=True).to(device), dynamic_map(signed=False).to(device)
        return self.books[device][name == "exp_avg_sq"]


def _adamw(p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int, group: dict[str, Any]) -> None:
    """In place, in fp32 (Loshchilov and Hutter, arXiv 1711.05101)."""
    beta1, beta2 = group["betas"]
    m.lerp_(g, 1 - beta1)
    v.lerp_(g * g, 1 - beta2)
    p.mul_(1 - group["lr"] * group["weight_decay"])
    denominator = (v / (1 - beta2**step)).sqrt_().add_(group["eps"])
    p.addcdiv_(m, denominator, value=-group["lr"] / (1 - beta1**step))
