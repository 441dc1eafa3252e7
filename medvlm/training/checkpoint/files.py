"""safetensors files, written and read tensor by tensor, with a checksum.

The library's own writer wants all tensors in memory, and its reader maps files, whose pages count as memory in use. The
format is simple: the header's length (8 bytes), a JSON header, the tensors' bytes without gaps.
https://github.com/huggingface/safetensors#format
"""

import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "I64": torch.int64,
    "F32": torch.float32,
    "I32": torch.int32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
CHUNK = 16 * 2**20  # bytes written, read or checked at a time


@dataclass
class Entry:
    """A tensor to be written; ``pieces`` gives it when its turn comes, flat and in order, on any device."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Tensor]]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(path: Path, entries: Sequence[Entry], metadata: dict[str, str]) -> dict[str, Any]:
    """Write a file and force it to the disk; returns its ``size`` and ``crc32``. Raises OSError."""
    entries = sorted(entries, key=lambda entry: -entry.dtype.itemsize)  # keeps every tensor aligned to its elements
    header: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for entry in entries:
        offsets = [at, at + entry.bytes]
        header[entry.name] = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
        at += entry.bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    crc = 0
    with path.open("wb", buffering=0) as file:

        def put(data: Any) -> None:
            nonlocal crc
            view = memoryview(data)
            while view:
                crc = zlib.crc32(part := view[:CHUNK], crc)
                while part:
                    part = part[file.write(part) :]
                view = view[CHUNK:]

        put(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            count = 0
            for piece in entry.pieces():
                assert piece.dtype == entry.dtype, entry.name
                put(as_bytes(piece.detach().cpu().contiguous()))
                count += piece.numel()
                del piece  # before the next one is made
            assert count == math.prod(entry.shape), entry.name
        os.fsync(file.fileno())
    return {"size": 8 + len(text) + at, "crc32": f"{crc:08x}"}


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def checksum(path: Path) -> str:
    """As `write_safetensors` returns it; about 2 GB/s where the disk allows it. Raises OSError."""
    crc, buffer = 0, bytearray(CHUNK)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            crc = zlib.crc32(memoryview(buffer)[:count], crc)
    return f"{crc:08x}"


def sync_folder(path: Path) -> None:
    """Force a folder's list of names to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a small file and force it to the disk."""
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


class SafetensorsFile:
    """Reads parts of tensors. Raises ValueError if it is no safetensors file, OSError if it cannot be read."""

    def __init__(self, path: Path):
        self.path = path
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= path.stat().st_size - 8:
                raise ValueError(f"{path}: is not a safetensors file")
            self.header: dict[str, Any] = json.loads(file.read(length))
        self.metadata: dict[str, str] = self.header.pop("__metadata__", {})
        self.start = 8 + length

    def __contains__(self, name: str) -> bool:
        return name in self.header

    def __iter__(self) -> Iterator[str]:
        return iter(self.header)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.header[name]["shape"])

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self.header[name]["dtype"]]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """The elements ``start`` to ``stop`` of the flat tensor, 1-dim."""
        dtype = self.dtype(name)
        stop = math.prod(self.shape(name)) if stop is None else stop
        out = torch.empty(stop - start, dtype=dtype)
        self.read_into(out, name, start)
        return out

    def read_into(self, out: Tensor, name: str, start: int) -> None:
        """Fill a contiguous CPU tensor of the stored type with the elements from ``start``."""
        view = as_bytes(out)
        at = self.start + self.header[name]["data_offsets"][0] + start * out.dtype.itemsize
        with self.path.open("rb", buffering=0) as file:
            file.seek(at)
            while view:
                count = file.readinto(view[:CHUNK])
                if not count:
                    raise ValueError(f"{self.path}: is truncated")
                view = view[count:]
