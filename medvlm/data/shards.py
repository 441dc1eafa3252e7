"""WebDataset tar shards with a sidecar Arrow index that gives random access with one ``pread`` per member.

``NAME-000000.tar`` is a plain WebDataset tar; ``NAME-000000.arrow`` beside it holds one row per sample.
"""

import io
import os
import tarfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.feather as feather
import webdataset
from PIL import Image as PILImage

from medvlm.data.schema import IMAGE_EXTENSIONS, Sample, parse_sample
from medvlm.errors import UserError

INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("source", pa.string()),
        ("split", pa.string()),
        ("group", pa.string()),  # the patient, or the nearest thing known: see Sample.group
        ("members", pa.list_(pa.string())),  # extensions, as in the tar: "json", "0.jpg"
        ("offsets", pa.list_(pa.int64())),  # of each member's first byte in the tar
        ("sizes", pa.list_(pa.int64())),  # bytes
        ("crc32", pa.list_(pa.uint32())),
        ("widths", pa.list_(pa.int32())),  # of each image, in pixels
        ("heights", pa.list_(pa.int32())),
        ("turns", pa.int32()),
        ("characters", pa.int32()),  # of the conversation, or of the report where there is none
        ("labels", pa.list_(pa.string())),  # labels that are mentioned, whatever their value
    ]
)


def index_path(tar: str | Path) -> Path:
    return Path(tar).with_suffix(".arrow")


def write_shards(
    items: Iterable[tuple[Sample, dict[str, bytes]]], out: Path, prefix: str, samples_per_shard: int = 1000
) -> list[Path]:
    """Write samples with their members (extension -> bytes) and index each shard. The same items give the same bytes.

    A shard appears under its final name only when complete. Raises UserError for a duplicate key or a missing image.
    """
    out.mkdir(parents=True, exist_ok=True)
    shards: list[Path] = []
    seen: set[str] = set()
    writer: webdataset.TarWriter | None = None

    def close() -> None:
        if writer is not None:
            writer.close()
            part = shards[-1].with_suffix(".tar.part")
            with part.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(part, shards[-1])
            write_index(shards[-1])

    for n, (sample, members) in enumerate(items):
        if n % samples_per_shard == 0:
            close()
            shards.append(out / f"{prefix}-{len(shards):06d}.tar")
            writer = webdataset.TarWriter(
                str(shards[-1].with_suffix(".tar.part")), encoder=False, user="medvlm", group="medvlm", mtime=0
            )
        if sample.key in seen:
            raise UserError(f"{out}: key {sample.key!r} occurs twice; keys must be unique in a shard set")
        seen.add(sample.key)
        missing = [i.file for i in sample.images if i.file not in members]
        if missing:
            raise UserError(f"{out}: sample {sample.key!r} names image member(s) {missing} that were not given")
        assert writer is not None
        record = sample.model_dump_json(exclude_defaults=True).encode()
        writer.write({"__key__": sample.key, "json": record, **dict(sorted(members.items()))})
    close()
    if not shards:
        raise UserError(f"{out}: there is nothing to write")
    return shards


def index_tar(tar: str | Path) -> pa.Table:
    """Index any WebDataset tar, ours or foreign. Raises UserError where the tar is truncated or damaged."""
    path = Path(tar)
    rows: dict[str, dict] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                row = rows.setdefault(key, {name: [] for name in ("members", "offsets", "sizes", "crc32", "data")})
                handle = archive.extractfile(member)
                assert handle is not None
                data = handle.read()
                if len(data) != member.size:
                    raise UserError(f"{path}: truncated inside member {member.name!r}")
                values = (extension.lower(), member.offset_data, member.size, zlib.crc32(data), data)
                for column, value in zip(row.values(), values, strict=True):
                    column.append(value)
            # tarfile takes a damaged header for the end of the archive, silently: a real end is two blocks of zeros.
            with path.open("rb") as raw:
                raw.seek(archive.offset)
                if any(raw.read()):
                    raise UserError(f"{path}: damaged header at byte {archive.offset}, members after it are unreadable")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{path}: not a readable tar ({error})") from None
    return pa.Table.from_pylist([_index_row(key, row) for key, row in rows.items()], schema=INDEX_SCHEMA)


def _index_row(key: str, row: dict) -> dict:
    members = dict(zip(row["members"], row.pop("data"), strict=True))
    try:
        sample = parse_sample(members.get("json", b""), key)
    except UserError:  # a foreign tar: index what can be seen; `medvlm shards verify` tells what is wrong
        sample = None
    sizes = [_image_size(data) for name, data in sorted(members.items()) if name.split(".")[-1] in IMAGE_EXTENSIONS]
    if sample is not None:
        sizes = [(i.width, i.height) for i in sample.images]
    texts = [m.text for m in sample.messages] or list(sample.report.values()) if sample else []
    return {
        **row,
        "key": key,
        "source": sample.source if sample else "",
        "split": sample.split if sample else "",
        "group": sample.group if sample else key,
        "widths": [w for w, _ in sizes],
        "heights": [h for _, h in sizes],
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


def write_index(tar: str | Path) -> Path:
    """Write the sidecar index of one tar, atomically; returns its path."""
    target = index_path(tar)
    part = target.with_suffix(".arrow.part")
    feather.write_feather(index_tar(tar), part, compression="zstd")
    os.replace(part, target)
    return target


def find_tars(paths: Sequence[str | Path]) -> list[Path]:
    """Tars named directly or lying in the folders named, sorted by name. Raises UserError where there are none."""
    tars: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        found = sorted(path.glob("*.tar")) if path.is_dir() else [path]
        if not found:
            raise UserError(f"{path}: holds no .tar shards")
        tars += found
    return tars


class ShardReader:
    """Random access to the samples of a shard set, in the order of the tars.

    ``paths`` are folders or tars. Every tar needs its index (``medvlm shards index``) and the size the index expects.
    """

    def __init__(self, paths: str | Path | Sequence[str | Path]):
        self.tars = find_tars([paths] if isinstance(paths, str | Path) else paths)
        tables = []
        for number, tar in enumerate(self.tars):
            if not index_path(tar).exists():
                raise UserError(f"{tar}: has no index; run `medvlm shards index {tar}`")
            table = feather.read_table(index_path(tar))
            if len(table):
                last = table.slice(len(table) - 1).to_pylist()[0]
                end = max(o + s for o, s in zip(last["offsets"], last["sizes"], strict=True))
                if tar.stat().st_size < end:
                    raise UserError(f"{tar}: truncated, its index expects at least {end} bytes")
            tables.append(table.append_column("shard", pa.array([number] * len(table), pa.int32())))
        self.table = pa.concat_tables(tables)
        self._files: dict[int, int] = {}
        self._pid = os.getpid()

    def __len__(self) -> int:
        return len(self.table)

    def key(self, i: int) -> str:
        return self.table["key"][i].as_py()

    def member(self, i: int, extension: str) -> bytes:
        """The bytes of one member of sample i. Raises UserError if it is absent, short or fails its checksum."""
        row = {name: self.table[name][i].as_py() for name in ("key", "shard", "members", "offsets", "sizes", "crc32")}
        where = f"{self.tars[row['shard']]}:{row['key']}.{extension}"
        if extension not in row["members"]:
            raise UserError(f"{where}: no such member")
        n = row["members"].index(extension)
        data = os.pread(self._file(row["shard"]), row["sizes"][n], row["offsets"][n])
        if zlib.crc32(data) != row["crc32"][n]:
            raise UserError(f"{where}: checksum differs from the index; the shard is damaged or the index is stale")
        return data

    def sample(self, i: int) -> Sample:
        return parse_sample(self.member(i, "json"), f"{self.tars[self.table['shard'][i].as_py()]}:{self.key(i)}.json")

    def images(self, i: int) -> list[bytes]:
        """The encoded images of sample i, in the order of the conversation."""
        return [self.member(i, image.file) for image in self.sample(i).images]

    def _file(self, shard: int) -> int:
        if self._pid != os.getpid():  # descriptors are reopened in each loader worker
            self._files, self._pid = {}, os.getpid()
        if shard not in self._files:
            self._files[shard] = os.open(self.tars[shard], os.O_RDONLY)
        return self._files[shard]
