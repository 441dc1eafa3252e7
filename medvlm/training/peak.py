"""What a device could do at most, which MFU is a share of: a datasheet's figure, or a matmul's where none is known."""

import time
from dataclasses import dataclass

import torch

# Dense bf16 TFLOP/s of NVIDIA's datasheets, half of those "with sparsity", by the first name that the device's holds.
DATASHEET = {
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H200 NVL": 835,
    "A100": 312,
    "H100": 989,
    "H200": 989,
    "B200": 2250,
}


@dataclass(frozen=True)
class Peak:
    """FLOP/s of one rank. ``source`` is ``datasheet`` or ``measured``."""

    flops: float
    source: str
    what: str

    def line(self) -> str:
        return f"MFU is relative to {self.flops / 1e12:.4g} TFLOP/s a rank, {self.source}: {self.what}"


def datasheet_peak(name: str, dtype: torch.dtype) -> Peak | None:
    """``name`` as ``torch.cuda.get_device_name`` gives it. None if unknown, of a part of a GPU (MIG), or not bf16."""
    if dtype != torch.bfloat16 or "MIG" in name:
        return None
    found = next((tera for known, tera in DATASHEET.items() if known in name), None)
    return None if found is None else Peak(found * 1e12, "datasheet", f"{name}, bf16 dense")


def peak_of(device: torch.device, dtype: torch.dtype) -> Peak:
    """Of this rank's device; where it is measured, all ranks do so at once, since they may share a CPU."""
    if device.type == "cuda":
        known = datasheet_peak(torch.cuda.get_device_name(device), dtype)
        if known:
            return known
    size = 8192 if device.type == "cuda" else 1024
    return Peak(matmul_rate(device, dtype, size), "measured", f"{size} x {size} matmul, {dtype}".replace("torch.", ""))


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int, seconds: float = 0.3) -> float:
    """The best FLOP/s of square matmuls repeated for about ``seconds``."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best, end = 0.0, time.perf_counter() + seconds
    a @ b  # warm-up
    while time.perf_counter() < end or not best:
        _wait(device)
        started = time.perf_counter()
        a @ b
        _wait(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
