"""The index of shards: where each member lies, and what a plan must know of a sample without reading it.

``NAME.arrow`` beside ``NAME.tar`` has one row per sample of that tar. ``index.arrow`` holds the rows of all tars of a
folder as one uncompressed record batch, which is memory-mapped and not copied. The schema's metadata name the tars,
their sizes in bytes and a digest of their keys, sizes and checksums.
"""

import hashlib
import io
import json
import os
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
from PIL import Image as PILImage

from medvlm.data.schema import IMAGE_EXTENSIONS, parse_sample
from medvlm.data.storage import RemoteFile, is_url, normalize, write_file
from medvlm.errors import UserError

VERSION = 2
MERGED = "index.arrow"
_words = pa.dictionary(pa.int32(), pa.string())
INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.large_string()),
        ("source", pa.string()),
        ("split", pa.string()),
        ("group", pa.large_string()),  # the patient, or the nearest thing known: see Sample.group
        ("members", pa.list_(_words)),  # extensions, as in the tar but in lower case: "json", "0.jpg"
        ("offsets", pa.list_(pa.int64())),  # of each member's first byte in the tar
        ("sizes", pa.list_(pa.int64())),  # bytes
        ("crc32", pa.list_(pa.uint32())),
        ("widths", pa.list_(pa.int32())),  # of each image, in pixels
        ("heights", pa.list_(pa.int32())),
        ("depths", pa.list_(pa.int32())),  # slices of a volume, 0 for a picture
        ("turns", pa.int32()),
        ("characters", pa.int32()),  # of the conversation, or of the report where there is none
        ("labels", pa.list_(_words)),  # labels that are mentioned, whatever their value
    ]
)


@dataclass(frozen=True)
class Tar:
    """What an index says of a tar. ``name`` is relative to the index's folder, or an absolute path or URL.

    ``digest`` is of its keys, members, sizes and checksums; ``skipped`` counts members that are no sample's.
    """

    name: str
    size: int
    samples: int
    digest: str
    skipped: int = 0


def index_path(tar: str | Path) -> Path:
    return Path(tar).with_suffix(".arrow")


def index_tar(tar: str | Path, *, end_mark: bool = True) -> pa.Table:
    """Index any WebDataset tar, ours or foreign, local or remote; its metadata are read by `tars_of`.

    As in WebDataset, the key is a member's path up to the first dot of its name; members without extension or whose
    name begins with a dot are skipped, and counted. ``end_mark=False`` accepts an archive without the blocks of zeros
    that end it. Raises UserError where the tar is truncated or damaged.
    """
    where = normalize(tar)
    rows: dict[str, dict[str, Any]] = {}
    held: dict[str, bytes] = {}  # members of the sample at hand only
    last, skipped = None, 0
    try:
        with _open(where) as raw:
            size = raw.seek(0, io.SEEK_END)
            raw.seek(0)
            with tarfile.open(fileobj=raw, mode="r:") as archive:
                for key, extension, member, data in _members(archive, where):
                    if not extension:
                        skipped += 1
                        continue
                    if key != last:
                        _describe(rows, last, held)
                        held, last = {}, key
                    row = rows.setdefault(key, {name: [] for name in ("members", "offsets", "sizes", "crc32")})
                    row["members"].append(extension)
                    row["offsets"].append(member.offset_data)
                    row["sizes"].append(member.size)
                    row["crc32"].append(zlib.crc32(data))
                    held.setdefault(extension, data)
                _describe(rows, last, held)
                _check_end(raw, archive.offset, where, end_mark)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{where}: truncated or not a readable tar ({error})") from None
    records = [{"key": key, **row} for key, row in rows.items()]
    entry = Tar(where.rpartition("/")[2], size, len(records), _digest(records), skipped)
    return pa.Table.from_pylist(records, schema=schema_of([entry], INDEX_SCHEMA))


def _open(where: str) -> BinaryIO:
    return io.BufferedReader(RemoteFile(where), 1 << 20) if is_url(where) else open(where, "rb")  # type: ignore[return-value]


def _members(archive: tarfile.TarFile, where: str) -> Iterator[tuple[str, str, tarfile.TarInfo, bytes]]:
    """Key, extension, header and bytes of each member; extension "" where it belongs to no sample."""
    for member in archive:
        archive.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header, which grows with the shard
        if member.isdir():
            continue
        if not member.isfile() or member.issparse():
            raise UserError(f"{where}: member {member.name!r} is a link or sparse file, which cannot be read in place")
        folder, slash, name = member.name.rpartition("/")
        stem, _, extension = name.partition(".")
        handle = archive.extractfile(member)
        assert handle is not None
        data = handle.read()
        if len(data) != member.size:
            raise UserError(f"{where}: truncated inside member {member.name!r}")
        yield folder + slash + stem, extension.lower() if stem else "", member, data


def _check_end(raw: BinaryIO, offset: int, where: str, end_mark: bool) -> None:
    # tarfile takes a damaged header for the end of the archive, silently: a real end is two blocks of zeros.
    raw.seek(offset)
    first = block = raw.read(1024)
    while block:
        if any(block):
            wrong = "truncated inside a" if len(first) < 512 else "damaged"
            raise UserError(f"{where}: {wrong} header at byte {offset}, members after it are unreadable")
        block = raw.read(1 << 20)
    if len(first) < 512 and end_mark:
        raise UserError(
            f"{where}: truncated at byte {offset}: no zeros end the tar; if its writer leaves them out, "
            "index with --no-end-mark"
        )


def _describe(rows: dict[str, dict[str, Any]], key: str | None, held: dict[str, bytes]) -> None:
    if key is None:
        return
    sample = None
    try:
        sample = parse_sample(held.get("json", b""), key)
    except UserError:  # a foreign tar: index what can be seen; `medvlm shards verify` tells what is wrong
        if "turns" in rows[key]:
            return  # the key comes a second time, which `verify` tells
    if sample is not None:
        sizes = [(i.width, i.height, i.depth or 0) for i in sample.images]
    else:
        sizes = [(*_image_size(held[n]), 0) for n in sorted(held) if n.rpartition(".")[2] in IMAGE_EXTENSIONS]
    texts = [m.text for m in sample.messages] or list(sample.report.values()) if sample else []
    rows[key] |= {
        "source": sample.source if sample else "",
        "split": sample.split if sample else "",
        "group": sample.group if sample else key,
        "widths": [w for w, _, _ in sizes],
        "heights": [h for _, h, _ in sizes],
        "depths": [d for _, _, d in sizes],
        "turns": sum(m.role == "assistant" for m in sample.messages) if sample else 0,
        "characters": sum(map(len, texts)),
        "labels": [k for k, v in sample.labels.items() if v is not None] if sample else [],
    }


def _image_size(data: bytes) -> tuple[int, int]:
    try:
        with PILImage.open(io.BytesIO(data)) as image:
            return image.size
    except OSError:
        return (0, 0)


def _digest(records: list[dict[str, Any]]) -> str:
    digest = hashlib.sha256()
    for row in records:
        digest.update(json.dumps([row["key"], row["members"], row["sizes"], row["crc32"]]).encode() + b"\n")
    return digest.hexdigest()


def schema_of(tars: Sequence[Tar], schema: pa.Schema) -> pa.Schema:
    """An index's schema with the metadata that `tars_of` reads."""
    return schema.with_metadata({"medvlm": json.dumps({"version": VERSION, "tars": [asdict(t) for t in tars]})})


def tars_of(schema: pa.Schema, where: str) -> list[Tar]:
    """The tars that an index describes. Raises UserError for an index that another version wrote."""
    values = json.loads((schema.metadata or {}).get(b"medvlm", b"{}"))
    if values.get("version") != VERSION:
        found = f"has version {values.get('version', 1)}, not {VERSION}"
        raise UserError(f"{where}: the index {found}; index again: `medvlm shards index`")
    return [Tar(**t) for t in values["tars"]]


def read_index(source: str | Path | bytes, where: str, *, mapped: bool = False) -> tuple[pa.Table, list[Tar]]:
    """An index from a file, memory-mapped if asked, or from its bytes. Raises UserError if it cannot be read."""
    try:
        data = pa.BufferReader(source) if isinstance(source, bytes) else pa.memory_map(str(source))
        table = feather.read_table(data, memory_map=mapped)
        return table, tars_of(table.schema, where)
    except UserError:
        raise
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{where}: the index cannot be read ({error}); index again: `medvlm shards index`") from None


def write_index(tar: str | Path, *, end_mark: bool = True) -> Tar:
    """Write the sidecar index of one tar beside it, at once and whole; returns what it says of the tar."""
    where = normalize(tar)
    if where.rpartition("/")[2] == "index.tar":
        raise UserError(f"{where}: rename it: its index would take the name of the folder's, {MERGED}")
    table = index_tar(where, end_mark=end_mark)
    sink = pa.BufferOutputStream()
    feather.write_feather(table, sink, compression="zstd")
    if is_url(where):
        write_file(f"{where.removesuffix('.tar')}.arrow", sink.getvalue().to_pybytes())
    else:
        replace_file(index_path(where), sink.getvalue())
    return tars_of(table.schema, where)[0]


def replace_file(path: Path, data: Any) -> None:
    """Write a file under another name, force it to the disk, and rename it."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(data)
    commit(part, path)


def commit(part: Path, path: Path) -> None:
    """Force a finished file to the disk, then give it its name."""
    with part.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)


def concatenate(indexes: Sequence[tuple[pa.Table, Sequence[Tar]]]) -> tuple[pa.Table, list[Tar]]:
    """The rows of the indexes of single tars as one chunk, with a column ``shard``: the number of the row's tar."""
    tars = [tar for _, described in indexes for tar in described]
    numbers = np.repeat(np.arange(len(tars), dtype=np.int32), [tar.samples for tar in tars])
    table = pa.concat_tables([t.replace_schema_metadata(None) for t, _ in indexes]).combine_chunks()
    return table.append_column("shard", pa.array(numbers)), tars
