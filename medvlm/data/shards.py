"""WebDataset tar shards, local or remote: writing them, and random access through their index."""

import itertools
import os
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import webdataset

from medvlm.data.cache import Cache
from medvlm.data.index import INDEX_SCHEMA, MERGED, commit, index_path, index_tar, read_index, write_index
from medvlm.data.merged import Merger
from medvlm.data.schema import IMAGE_EXTENSIONS, VOLUME_EXTENSION, Sample, parse_sample
from medvlm.data.shard_set import check_size, expand, find_tars, index_shards, merge_index, open_shards
from medvlm.data.storage import StorageError, is_url, read_range
from medvlm.errors import UserError

__all__ = [
    "INDEX_SCHEMA",
    "MERGED",
    "Cache",
    "Merger",
    "ShardReader",
    "find_tars",
    "index_path",
    "index_shards",
    "index_tar",
    "merge_index",
    "read_index",
    "write_index",
    "write_shard",
    "write_shards",
]
PIXELS = (*IMAGE_EXTENSIONS, VOLUME_EXTENSION)
GAP = 64 << 10  # bytes between members of a sample that are cheaper to read than to skip
LARGE = 256 << 10  # bytes in memory that take longer to copy than another read of a local file


def write_shards(
    items: Iterable[tuple[Sample, dict[str, bytes]]], out: Path, prefix: str, samples_per_shard: int = 1000
) -> list[Path]:
    """Write samples with their members (extension -> bytes) and index each shard. The same items give the same bytes.

    A shard appears under its final name only when complete. Raises UserError for a duplicate key or a missing image.
    """
    out.mkdir(parents=True, exist_ok=True)
    shards: list[Path] = []
    seen: set[str] = set()

    def unique() -> Iterator[tuple[Sample, dict[str, bytes]]]:
        for sample, members in items:
            if sample.key in seen:
                raise UserError(f"{out}: key {sample.key!r} occurs twice; keys must be unique in a shard set")
            seen.add(sample.key)
            yield sample, members

    rest = unique()
    for first in rest:
        shards.append(out / f"{prefix}-{len(shards):06d}.tar")
        write_shard(itertools.chain([first], itertools.islice(rest, samples_per_shard - 1)), shards[-1])
    if not shards:
        raise UserError(f"{out}: there is nothing to write")
    return shards


def write_shard(items: Iterable[tuple[Sample, dict[str, bytes]]], path: Path) -> None:
    """Write one tar and its sidecar index. The same items give the same bytes.

    The tar appears under its name only when it is complete and on the disk, the index after it. Raises UserError for
    a key that occurs twice in it, and for an image that is named but not given.
    """
    part = path.with_name(path.name + ".part")
    seen: set[str] = set()
    with (
        part.open("wb") as file,
        webdataset.TarWriter(file, encoder=False, user="medvlm", group="medvlm", mtime=0) as writer,
    ):
        for sample, members in items:
            if sample.key in seen:
                raise UserError(f"{path}: key {sample.key!r} occurs twice; keys must be unique in a shard set")
            seen.add(sample.key)
            missing = [i.file for i in sample.images if i.file not in members]
            if missing:
                raise UserError(f"{path}: sample {sample.key!r} names image member(s) {missing} that were not given")
            record = sample.model_dump_json(exclude_defaults=True).encode()
            writer.write({"__key__": sample.key, "json": record, **members})
    commit(part, path)
    write_index(path)


class Row(NamedTuple):
    """Where a sample lies: ``shard`` is the number of its tar; the members in the order of the tar."""

    key: str
    shard: int
    members: list[str]
    offsets: list[int]
    sizes: list[int]
    crc32: list[int]


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


class _Rows:
    """Views of the index's columns, without a copy, that give Python values quickly: 10 us through pyarrow, 1 here."""

    def __init__(self, table: pa.Table):
        def values(array: pa.Array) -> memoryview:
            return array.to_numpy(zero_copy_only=True).data

        keys, members = _one_chunk(table["key"]), _one_chunk(table["members"])
        _, offsets, data = keys.buffers()
        self.key_at = np.frombuffer(offsets or b"", np.int64)[keys.offset :].data
        self.key_data = memoryview(data or b"")
        self.start = values(members.offsets)
        self.code, self.words = values(members.values.indices), members.values.dictionary.to_pylist()
        self.offset, self.size, self.crc = (values(_one_chunk(table[n]).values) for n in ("offsets", "sizes", "crc32"))
        self.shard = values(_one_chunk(table["shard"]))

    def key(self, i: int) -> str:
        return str(self.key_data[self.key_at[i] : self.key_at[i + 1]], "utf-8")

    def __getitem__(self, i: int) -> Row:
        span = slice(self.start[i], self.start[i + 1])
        members = [self.words[code] for code in self.code[span]]
        return Row(
            self.key(i),
            self.shard[i],
            members,
            self.offset[span].tolist(),
            self.size[span].tolist(),
            self.crc[span].tolist(),
        )


class ShardReader:
    """Random access to the samples of a shard set, in the order of the paths and their tars.

    ``paths`` are folders, tars or URLs of them. Every tar needs its index (``medvlm shards index``) and the size the
    index expects. Remote reads go through ``cache`` where one is given, else each sample is a request. Every read is
    compared with its crc32 (5 GB/s). At most ``open_files`` tars are open at a time. For one thread, and safe to fork.
    """

    def __init__(self, paths: str | Path | Sequence[str | Path], cache: Cache | None = None, *, open_files: int = 64):
        sets = [open_shards(path, cache) for path in expand([paths] if isinstance(paths, str | Path) else paths)]
        self.cache, self.open_files = cache, open_files
        self.tars: list[Path | str] = [p if is_url(p) else Path(p) for s in sets for p in s.places]
        self.source_tars = [len(s.tars) for s in sets]  # of each path
        self._described = [tar for s in sets for tar in s.tars]
        self._sets = sets
        self._rows = [_Rows(s.table) for s in sets]
        self._starts = np.cumsum([0, *(len(s.table) for s in sets)]).tolist()
        self._first_tar = np.cumsum([0, *self.source_tars]).tolist()
        self._files: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return self._starts[-1]

    @cached_property
    def index_hash(self) -> str:
        """Of the keys, members, sizes and checksums of all samples, in order; the same wherever the shards lie."""
        return sha256("\n".join(tar.digest for tar in self._described).encode()).hexdigest()

    @property
    def shard_samples(self) -> list[int]:
        """The number of samples of each tar."""
        return [tar.samples for tar in self._described]

    @cached_property
    def table(self) -> pa.Table:
        """The index: `INDEX_SCHEMA`, and ``shard``, the number of the sample's tar. One chunk per path."""
        tables = [s.table.replace_schema_metadata(None) for s in self._sets]
        for n, first in enumerate(self._first_tar[:-1]):
            if first:
                shard = pa.array(tables[n]["shard"].to_numpy() + np.int32(first))
                tables[n] = tables[n].set_column(tables[n].schema.get_field_index("shard"), "shard", shard)
        return pa.concat_tables(tables)

    def column(self, name: str) -> np.ndarray:
        """A column with one value per sample; numbers of a single path are not copied, words are objects."""
        column = self.table[name]
        if pa.types.is_list(column.type):
            raise ValueError(f"column {name!r} holds lists; use lists({name!r})")
        if column.num_chunks == 1 and pa.types.is_primitive(column.type):
            return column.chunk(0).to_numpy(zero_copy_only=True)
        return column.to_numpy()

    def lists(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """A column of lists of numbers: where each sample's begins [samples + 1], and all values end to end."""
        arrays = [_one_chunk(s.table[name]) for s in self._sets]
        values = [a.values.to_numpy() for a in arrays]
        if len(arrays) == 1:
            return arrays[0].offsets.to_numpy(), values[0]
        lengths = [np.diff(a.offsets.to_numpy()) for a in arrays]
        return np.concatenate([[0], np.cumsum(np.concatenate(lengths), dtype=np.int64)]), np.concatenate(values)

    def _at(self, i: int) -> tuple[int, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        part = bisect_right(self._starts, i) - 1
        return part, i - self._starts[part]

    def row(self, i: int) -> Row:
        part, local = self._at(i)
        row = self._rows[part][local]
        return row._replace(shard=row.shard + self._first_tar[part]) if part else row

    def key(self, i: int) -> str:
        part, local = self._at(i)
        return self._rows[part].key(local)

    def keys(self, numbers: Iterable[int]) -> list[str]:
        return [self.key(int(i)) for i in numbers]

    def load(self, i: int) -> tuple[Sample, list[bytes]]:
        """A sample and its encoded images, in the order of the conversation, with one read where they lie together.

        Raises UserError naming tar, key and member: cut off, damaged, absent, or not of the schema.
        """
        row = self.row(i)
        wanted = [n for n, name in enumerate(row.members) if name == "json" or name.rpartition(".")[2] in PIXELS]
        data = dict(zip([row.members[n] for n in reversed(wanted)], self._read(row, wanted[::-1]), strict=True))
        where = f"{self.tars[row.shard]}:{row.key}"
        if "json" not in data:
            raise UserError(f"{where}.json: no such member")
        sample = parse_sample(data["json"], f"{where}.json")
        absent = [image.file for image in sample.images if image.file not in data]
        if absent:
            raise UserError(f"{where}.{absent[0]}: no such member")
        return sample, [data[image.file] for image in sample.images]

    def members(self, i: int) -> dict[str, bytes]:
        """All members of sample i by extension, whatever they are. Raises UserError as `load` does."""
        row = self.row(i)
        return dict(zip(row.members, self._read(row, list(range(len(row.members)))), strict=True))

    def member(self, i: int, extension: str) -> bytes:
        """The bytes of one member of sample i. Raises UserError if it is absent, short or fails its checksum."""
        row = self.row(i)
        if extension not in row.members:
            raise UserError(f"{self.tars[row.shard]}:{row.key}.{extension}: no such member")
        return self._read(row, [row.members.index(extension)])[0]

    def sample(self, i: int) -> Sample:
        """The sample without its images' bytes."""
        row = self.row(i)
        return parse_sample(self.member(i, "json"), f"{self.tars[row.shard]}:{row.key}.json")

    def images(self, i: int) -> list[bytes]:
        """The encoded images of sample i, in the order of the conversation."""
        return self.load(i)[1]

    def _read(self, row: Row, numbers: list[int]) -> list[bytes]:
        """The bytes of members of a row, checked."""
        if not numbers:
            return []
        first = min(row.offsets[n] for n in numbers)
        span = max(row.offsets[n] + row.sizes[n] for n in numbers) - first
        # one by one where members lie far apart, as in a foreign tar, or where cutting a large piece would copy it
        most = LARGE if isinstance(self.tars[row.shard], Path) else sum(row.sizes[n] for n in numbers) + GAP
        if len(numbers) > 1 and span > most:
            return [self._read(row, [n])[0] for n in numbers]
        data = self._bytes(row.shard, first, span)
        found = []
        for n in numbers:
            low, size = row.offsets[n] - first, row.sizes[n]
            piece = data if size == len(data) else data[low : low + size]
            if zlib.crc32(piece) != row.crc32[n]:
                piece = self._again(row, n, len(piece), first, span)
            found.append(piece)
        return found

    def _again(self, row: Row, n: int, got: int, first: int, span: int) -> bytes:
        """A member that failed its checksum: from the storage once more where it is remote, else a UserError."""
        size, where = row.sizes[n], f"{self.tars[row.shard]}:{row.key}.{row.members[n]}"
        if self._forget(row.shard, first, span):  # damaged on the way or in the cache
            piece = self._bytes(row.shard, row.offsets[n], size)
            if zlib.crc32(piece) == row.crc32[n]:
                return piece
        if got < size:
            raise UserError(f"{where}: cut off after {got} of {size} bytes; the shard is truncated")
        raise UserError(f"{where}: checksum differs from the index; the shard is damaged or the index is stale")

    def _bytes(self, shard: int, start: int, size: int) -> bytes:
        tar, described = self.tars[shard], self._described[shard]
        if isinstance(tar, Path):
            try:
                return os.pread(self._file(shard), size, start)
            except OSError as error:
                raise StorageError(f"{tar}: cannot be read at byte {start} ({error})") from None
        if self.cache is not None:
            return self.cache.read(tar, start, size, described.size, described.digest)
        data, total = read_range(tar, start, size)
        if total is not None:
            check_size(tar, total, described.size)
        return data

    def _forget(self, shard: int, start: int, size: int) -> bool:
        """Whether another read may give other bytes."""
        tar = self.tars[shard]
        if isinstance(tar, Path):
            return False
        if self.cache is not None:
            self.cache.forget(tar, start, size, self._described[shard].digest)
        return True

    def _file(self, shard: int) -> int:
        # pread has no position, so that forked workers share descriptors safely.
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        try:
            self._files[shard] = os.open(self.tars[shard], os.O_RDONLY)
        except OSError as error:
            raise StorageError(f"{self.tars[shard]}: cannot be opened ({error})") from None
        if len(self._files) > self.open_files:
            os.close(self._files.popitem(last=False)[1])
        return self._files[shard]
