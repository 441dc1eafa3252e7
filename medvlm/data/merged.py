"""``index.arrow``: the rows of many indexes as one record batch, put together on the disk.

A record batch holds each column in one piece, so rows cannot be appended to it. Each buffer of each column therefore
grows in a file of its own, and the batch is written from those files, mapped: memory does not grow with the rows.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from medvlm.data.index import INDEX_SCHEMA, Tar, schema_of
from medvlm.errors import UserError

SHARD = pa.field("shard", pa.int32())


class Merger:
    """Collects indexes in order, then writes them as one, with a column ``shard``: the number of the row's tar.

    What grows with the rows lies in unnamed files in ``folder``, which vanish with the process. Raises UserError where
    a column exceeds what Arrow can address.
    """

    def __init__(self, folder: Path):
        self.fields, self.tars = [*INDEX_SCHEMA, SHARD], list[Tar]()
        self.columns = [_column(field.type, folder) for field in self.fields]

    def add(self, table: pa.Table, tars: Sequence[Tar]) -> None:
        numbers = np.repeat(np.arange(len(self.tars), len(self.tars) + len(tars)), [tar.samples for tar in tars])
        table = table.append_column(SHARD, pa.array(numbers, SHARD.type))
        for field, column in zip(self.fields, self.columns, strict=True):
            for chunk in table[field.name].chunks:
                column.append(chunk)
        self.tars += tars

    def write(self, target: Path) -> None:
        arrays = [column.finish() for column in self.columns]
        schema = schema_of(self.tars, pa.schema(self.fields))
        with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            if len(arrays[0]):
                writer.write_batch(pa.record_batch(arrays, schema=schema))


class _Buffer:
    """Bytes that grow in an unnamed file."""

    def __init__(self, folder: Path):
        self.file = tempfile.TemporaryFile(dir=folder)

    def append(self, values: Any) -> None:
        self.file.write(values)

    def finish(self) -> pa.Buffer:
        self.file.flush()
        if not self.file.tell():
            return pa.py_buffer(b"")
        return pa.py_buffer(np.memmap(self.file, np.uint8, "r"))


class _Numbers:
    def __init__(self, kind: pa.DataType, folder: Path):
        self.kind, self.length, self.data = kind, 0, _Buffer(folder)

    def append(self, array: pa.Array) -> None:
        self.data.append(array.to_numpy(zero_copy_only=True))
        self.length += len(array)

    def finish(self) -> pa.Array:
        return pa.Array.from_buffers(self.kind, self.length, [None, self.data.finish()])


class _Words:
    """Codes into a dictionary that is one for all indexes, in the order in which its words appear."""

    def __init__(self, kind: pa.DictionaryType, folder: Path):
        self.kind, self.codes = kind, _Numbers(kind.index_type, folder)
        self.words: dict[str, int] = {}

    def append(self, array: pa.DictionaryArray) -> None:
        new = [self.words.setdefault(word, len(self.words)) for word in array.dictionary.to_pylist()]
        codes = np.array([*new, 0], np.int32)[array.indices.to_numpy(zero_copy_only=True)]
        self.codes.append(pa.array(codes))

    def finish(self) -> pa.Array:
        return pa.DictionaryArray.from_arrays(self.codes.finish(), pa.array(list(self.words), self.kind.value_type))


class _Pieces:
    """Lists, or strings, which are lists of bytes: where each begins, and all values end to end."""

    def __init__(self, kind: pa.DataType, folder: Path):
        self.kind, self.length, self.total = kind, 0, 0
        self.type = np.int64 if kind == pa.large_string() else np.int32
        self.starts = _Buffer(folder)
        self.starts.append(self.type(0))
        self.values = _column(kind.value_type, folder) if pa.types.is_list(kind) else _Buffer(folder)

    def append(self, array: pa.Array) -> None:
        starts = np.frombuffer(array.buffers()[1], self.type)[array.offset : array.offset + len(array) + 1]
        first, last = int(starts[0]), int(starts[-1])
        if self.total + last - first > np.iinfo(self.type).max:
            raise UserError("too much for one index (2^31 bytes or values in a column); merge fewer tars")
        if isinstance(self.values, _Buffer):
            self.values.append((array.buffers()[2] or b"")[first:last])
        else:
            self.values.append(array.values[first:last])
        self.starts.append((starts[1:].astype(np.int64) + (self.total - first)).astype(self.type))
        self.total += last - first
        self.length += len(array)

    def finish(self) -> pa.Array:
        starts, values = self.starts.finish(), self.values.finish()
        if isinstance(values, pa.Buffer):
            return pa.Array.from_buffers(self.kind, self.length, [None, starts, values])
        return pa.Array.from_buffers(self.kind, self.length, [None, starts], children=[values])


def _column(kind: pa.DataType, folder: Path) -> Any:
    if pa.types.is_dictionary(kind):
        return _Words(kind, folder)
    return (_Numbers if pa.types.is_primitive(kind) else _Pieces)(kind, folder)
