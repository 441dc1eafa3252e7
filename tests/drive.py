"""Runs ``medvlm``, with Python's files in place of DeepSpeed's ``async_io``, which takes minutes to compile.

What DeepSpeed keeps on a drive, and when it reads and writes it, is as with the compiled one. Run by `tests/zygote`.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import torch

SCRIPT = str(Path(__file__))


class Handle:
    """Of ``aio_handle`` what DeepSpeed's swappers call: all is done at once, and `wait` says how much that was."""

    pinned: ClassVar[set[int]] = set()

    def __init__(self, **_: object) -> None:
        self.done = 0

    def new_cpu_locked_tensor(self, count: int, example: torch.Tensor) -> torch.Tensor:
        made = torch.empty(count, dtype=example.dtype)
        self.pinned.add(made.untyped_storage().data_ptr())
        return made

    def free_cpu_locked_tensor(self, tensor: torch.Tensor) -> bool:
        self.pinned.discard(tensor.untyped_storage().data_ptr())
        return True

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.pinned

    def async_pread(self, buffer: torch.Tensor, path: str, offset: int) -> int:
        with open(path, "rb") as file:
            file.seek(offset)
            read = file.readinto(memoryview(buffer.view(torch.uint8).numpy()))
        assert read == buffer.numel() * buffer.itemsize, path
        self.done += 1
        return 0

    def async_pwrite(self, buffer: torch.Tensor, path: str, offset: int) -> int:
        assert offset == 0
        Path(path).write_bytes(buffer.view(torch.uint8).numpy())
        self.done += 1
        return 0

    def wait(self) -> int:
        done, self.done = self.done, 0
        return done


if __name__ == "__main__":
    from deepspeed.ops.op_builder.builder import OpBuilder
    from deepspeed.ops.op_builder.cpu import AsyncIOBuilder

    OpBuilder._loaded_ops["async_io"] = SimpleNamespace(aio_handle=Handle)
    AsyncIOBuilder.is_compatible = lambda *_, **__: True
    from medvlm.cli import main

    main()
