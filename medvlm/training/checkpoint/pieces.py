"""Reading tensors out of checkpoints, whichever ranks and stage wrote them."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medvlm.errors import UserError
from medvlm.training.checkpoint.files import SafetensorsFile
from medvlm.training.checkpoint.folder import frozen_folder, read_manifest

EMA = "ema"  # what `medvlm.training.ema` adds to the optimizer's states
VALUE = "param"  # the kind of a parameter's own values; other kinds are names of optimizer states


def key(kind: str, name: str) -> str:
    return f"{kind}:{name}"


class Pieces:
    """The fragments in a folder's files. Files are opened when they are needed, ``first`` before the others."""

    def __init__(self, folder: Path, first: int = 0):
        names = list(read_manifest(folder)["files"])
        self.folder, self.closed = folder, names[first:] + names[:first]
        self.found: dict[str, list[tuple[int, int, SafetensorsFile]]] = {}
        """By parameter: first element, the one after the last, and the file, of each fragment."""
        self.files: list[SafetensorsFile] = []
        self.stored: dict[str, dict[str, torch.dtype]] = {}
        self.scalars: dict[str, dict[str, Any]] = {}

    def _open_another(self) -> bool:
        if not self.closed:
            return False
        try:
            file = SafetensorsFile(self.folder / self.closed.pop(0))
        except (OSError, ValueError) as error:
            raise UserError(f"{self.folder}: cannot be read: {error}") from error
        self.files.append(file)
        for entry in file:
            if ":" in entry:
                kind, _, name = entry.partition(":")
                self.stored.setdefault(name, {})[kind] = file.dtype(entry)
        for name, start in json.loads(file.metadata["starts"]).items():
            stop = start + math.prod(file.shape(key(VALUE, name)))
            self.found.setdefault(name, []).append((start, stop, file))
        self.scalars |= json.loads(file.metadata["scalars"])
        return True

    def _find(self, name: str) -> None:
        while name not in self.found:
            if not self._open_another():
                raise UserError(f"{self.folder}: lacks {name}")

    def kinds(self, name: str) -> dict[str, torch.dtype]:
        """What is stored of a parameter, element by element, and in which type."""
        self._find(name)
        return self.stored[name]

    def scalars_of(self, name: str) -> dict[str, Any]:
        self._find(name)
        return self.scalars.get(name, {})

    def read(self, kind: str, name: str, start: int, stop: int, out: Callable[[int, Tensor], None]) -> None:
        """Give ``out`` the elements from ``start`` to ``stop`` in runs: the first element, and the values."""
        at = start
        while at < stop:
            held = next((f for f in self.found.get(name, []) if f[0] <= at < f[1]), None)
            if held is None:
                if not self._open_another():
                    raise UserError(f"{self.folder}: lacks {kind} of {name} from element {at}")
                continue
            first, last, file = held
            end = min(last, stop)
            out(at, file.read(key(kind, name), at - first, end - first))
            at = end

    def tensor(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """Elements ``start`` to ``stop`` of a flat parameter, as stored, 1-dim."""
        whole = torch.empty(stop - start, dtype=self.kinds(name)[kind])

        def out(at: int, values: Tensor) -> None:
            whole[at - start : at - start + len(values)] = values

        self.read(kind, name, start, stop, out)
        return whole

    def whole(self, kind: str, name: str) -> Tensor:
        """A tensor that one file holds whole, as stored, 1-dim."""
        while True:
            for file in self.files:
                if key(kind, name) in file:
                    return file.read(key(kind, name))
            if not self._open_another():
                raise UserError(f"{self.folder}: lacks {kind} {name}")

    def bound_to_layout(self, n: int, layout: list[list[Any]]) -> dict[str, Tensor]:
        """Optimizer states of the flat tensor number ``n`` that have a shape of their own, so that only the rank that
        has the same flat tensor again can use them. Raises UserError where such states exist for another layout."""
        self._find(layout[0][0])
        bound = [file for file in self.files if file.metadata["layouts"] != "{}"]
        for file in bound:
            if json.loads(file.metadata["layouts"]).get(str(n)) == layout:
                marked = {k.partition("@")[2]: k for k in file if k.startswith(f"{n}@")}
                return {kind: file.read(k).view(file.shape(k)) for kind, k in marked.items()}
        layouts = [entries for file in bound for entries in json.loads(file.metadata["layouts"]).values()]
        # other flat tensors may have such states where this one has none, as vectors beside 8-bit matrices
        if any(entry[0] == layout[0][0] for entries in layouts for entry in entries):
            raise UserError(
                f"{self.folder}: its optimizer's state cannot be divided anew; resume it with as many ranks as "
                "wrote it (the number of its files), and the same ZeRO stage"
            )
        return {}


class ByPart(Mapping[str, Tensor]):
    """Weights in fp32 that are read when asked for. ``shapes`` names all, ``absent`` those that are not stored."""

    shapes: dict[str, torch.Size]
    absent: set[str]

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """Elements ``start`` to ``stop`` of a flat weight, in the type they are stored in."""
        raise NotImplementedError

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        return self.part(name, 0, self.shapes[name].numel()).float().view(self.shapes[name])

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.shapes if name not in self.absent)

    def __len__(self) -> int:
        return len(self.shapes) - len(self.absent)


class Weights(ByPart):
    """Name -> whole fp32 weight of a checkpoint, read when asked for. ``absent`` are those that a pretrained folder
    gives: they stayed frozen, and are not stored. ``kind``: an optimizer state to read instead of trained weights."""

    def __init__(self, path: Path, kind: str = VALUE):
        self.path, self.kind, record = path, kind, read_manifest(path)
        self.config: dict[str, Any] = record["config"]
        self.shapes = {name: torch.Size(values["shape"]) for name, values in record["parameters"].items()}
        self.absent = {name for name, values in record["parameters"].items() if values["stored"] == "origin"}
        self.origin: dict[str, str] = record["frozen"]["origin"]
        self.trained, frozen = Pieces(path), frozen_folder(path, record)
        self.frozen = Pieces(frozen) if frozen else None
        self._at = {name: values["stored"] for name, values in record["parameters"].items()}

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """Elements ``start`` to ``stop`` of a flat weight, in the type they are stored in."""
        if name in self.absent or name not in self.shapes:
            raise KeyError(name)
        if self._at[name] == "frozen":
            assert self.frozen is not None
            return self.frozen.tensor(VALUE, name, start, stop)
        if self.kind not in self.trained.kinds(name):
            raise UserError(f"{self.path}: holds no {self.kind} of {name}")
        return self.trained.tensor(self.kind, name, start, stop)

    def added(self, name: str, start: int, stop: int) -> Tensor | None:
        """What is to be added to such elements of a weight that is absent: nothing, see `StockWeights`."""
        return None


def consolidate(path: Path, *, ema: bool = False) -> Weights:
    """Full fp32 weights of a checkpoint, whatever ZeRO stage and number of ranks wrote it, frozen parts included.

    ``ema``: their moving average. Raises UserError where the run kept none.
    """
    if ema and read_manifest(path)["config"]["training"].get("ema_decay") is None:
        raise UserError(f"{path}: holds no moving average; set training.ema_decay for a run that should keep one")
    return Weights(path, EMA if ema else VALUE)
