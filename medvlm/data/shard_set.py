"""Which tars a path stands for, local or remote, and which index describes them."""

import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
from braceexpand import braceexpand

from medvlm.data.cache import Cache
from medvlm.data.index import (
    MERGED,
    Tar,
    commit,
    concatenate,
    index_path,
    index_tar,
    read_index,
    tars_of,
    write_index,
)
from medvlm.data.merged import Merger
from medvlm.data.storage import AbsentError, is_url, join, list_files, normalize, read_file, write_file
from medvlm.errors import UserError


class ShardSet(NamedTuple):
    """What one path stands for: rows in one chunk, with a column ``shard`` that counts ``tars`` and ``places``."""

    table: pa.Table
    tars: list[Tar]
    places: list[str]  # path or URL of each tar


def find_tars(paths: Sequence[str | Path]) -> list[Path]:
    """Local tars named directly or lying in the folders named, sorted by name. Raises UserError where there are none.

    A name may hold braces, as in ``x-{000000..000009}.tar``.
    """
    tars: list[Path] = []
    for path in expand(paths):
        if is_url(path):
            raise UserError(f"{path}: is remote; this works on local shards, so copy them first")
        if not os.path.exists(path):
            raise UserError(f"{path}: no such file or folder")
        found = sorted(Path(path).glob("*.tar")) if os.path.isdir(path) else [Path(path)]
        if not found:
            raise UserError(f"{path}: holds no .tar shards")
        tars += found
    return tars


def expand(paths: Sequence[str | Path]) -> list[str]:
    """Paths and URLs as strings, with braces written out."""
    listed = [normalize(p) for p in paths]
    return [e for p in listed for e in (braceexpand(p) if "{" in p and not os.path.exists(p) else [p])]


def _is_tar(path: str) -> bool:
    return path.split("?")[0].endswith(".tar") if is_url(path) else not os.path.isdir(path)


def _tars_at(path: str) -> list[str]:
    if not is_url(path):
        return [str(tar) for tar in find_tars([path])]
    if _is_tar(path):
        return [path]
    listed = list_files(path)
    if listed is None:
        try:
            text = read_file(join(path, "shards.txt")).decode()
        except AbsentError:
            wanted = f"{MERGED} (`medvlm shards index` writes it) or shards.txt, with a name per line"
            raise UserError(f"{path}: HTTP lists no folder, so it needs {wanted}; or name the tars") from None
        listed = {join(path, line.strip()): None for line in text.splitlines() if line.strip()}
    tars = [name for name in listed if name.endswith(".tar")]
    if not tars:
        raise UserError(f"{path}: holds no .tar shards")
    return tars


def index_shards(paths: Sequence[str | Path], out: str | Path | None = None, *, end_mark: bool = True) -> Iterator[str]:
    """Index tars, each beside itself, and merge the indexes of each folder; yields a line for each file.

    With ``out``, a folder of one's own, only a merged index is written there, which names the tars where they lie: for
    shards beside which nothing can be written. What reads them is given that folder.
    """
    merger = None
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
        merger = Merger(Path(out))
    for path in expand(paths):
        for tar in _tars_at(path):
            if merger is None:
                described = write_index(tar, end_mark=end_mark)
            else:
                table = index_tar(tar, end_mark=end_mark)
                described = replace(tars_of(table.schema, tar)[0], name=tar if is_url(tar) else os.path.abspath(tar))
                merger.add(table, [described])
            note = f"; {described.skipped} member(s) without key or extension left out" if described.skipped else ""
            yield f"{tar}: {described.samples} samples{note}"
        if merger is None and not _is_tar(path):
            yield str(merge_index(path))
    if merger is not None and out is not None:
        yield str(_write(merger, Path(out)))


def merge_index(folder: str | Path) -> Path | str:
    """Write ``index.arrow`` of a folder, local or remote, from its tars' own indexes, which must be there."""
    where = normalize(folder)
    with tempfile.TemporaryDirectory() if is_url(where) else nullcontext(where) as local:
        merger = Merger(Path(local))
        for tar in _tars_at(where):
            merger.add(*_sidecar(tar))
        written = _write(merger, Path(local))
        if not is_url(where):
            return written
        write_file(join(where, MERGED), written)
    return join(where, MERGED)


def _write(merger: Merger, folder: Path) -> Path:
    part = folder / f"{MERGED}.{os.getpid()}.part"
    merger.write(part)
    commit(part, folder / MERGED)
    return folder / MERGED


def _sidecar(tar: str) -> tuple[pa.Table, list[Tar]]:
    target = f"{tar.removesuffix('.tar')}.arrow" if is_url(tar) else str(index_path(tar))
    missing = UserError(f"{tar}: has no index; run `medvlm shards index {tar}`")
    if not is_url(tar) and not os.path.exists(target):
        raise missing
    try:
        table, tars = read_index(read_file(target) if is_url(tar) else target, target)
    except AbsentError:
        raise missing from None
    return table, [replace(entry, name=tar.rpartition("/")[2]) for entry in tars]  # the tar may have been renamed


def open_shards(path: str, cache: Cache | None = None) -> ShardSet:
    """The samples at a path: by the folder's merged index where it is up to date, else by the tars' own.

    Raises UserError for a tar without index, or of another size than its index says.
    """
    if not is_url(path) and not os.path.exists(path):
        raise UserError(f"{path}: no such file or folder")
    if _is_tar(path):
        return _by_sidecars([path])
    merged = _remote_merged(path, cache) if is_url(path) else _local_merged(path)
    if merged is None:
        return _by_sidecars(_tars_at(path))
    table, tars, reason = merged
    if reason is None:
        return ShardSet(table, tars, [join(path, tar.name) for tar in tars])
    warnings.warn(
        f"{join(path, MERGED)}: is out of date ({reason}), the tars' own indexes are read; "
        f"`medvlm shards index {path}` writes it again",
        stacklevel=2,
    )
    return _by_sidecars(_tars_at(path))


def _by_sidecars(places: list[str]) -> ShardSet:
    indexes = [_sidecar(place) for place in places]
    for place, (_, tars) in zip(places, indexes, strict=True):
        if not is_url(place):
            check_size(place, os.stat(place).st_size, tars[0].size)
    table, described = concatenate(indexes)
    return ShardSet(table, described, places)


def check_size(place: str, size: int, expected: int) -> None:
    """Raises UserError where a tar has another size than its index says."""
    if size != expected:
        wrong = "truncated" if size < expected else "not what was indexed"
        raise UserError(f"{place}: {wrong}, it has {size} bytes and its index expects {expected}")


def _local_merged(folder: str) -> tuple[pa.Table, list[Tar], str | None] | None:
    index = Path(folder, MERGED)
    if not index.exists():
        return None
    table, tars = read_index(index, str(index), mapped=True)
    apart = [tar for tar in tars if is_url(tar.name) or os.path.isabs(tar.name)]
    if apart:  # an index of tars that lie elsewhere
        for tar in apart:
            if not is_url(tar.name):
                check_size(tar.name, os.stat(find_tars([tar.name])[0]).st_size, tar.size)
        return table, tars, None
    when = index.stat().st_mtime_ns
    with os.scandir(folder) as entries:
        files = {e.name: e.stat() for e in entries if e.name.endswith((".tar", ".arrow"))}
    reason = _difference(tars, {name: s.st_size for name, s in files.items() if name.endswith(".tar")})
    for tar in tars if reason is None else ():
        sidecar = files.get(index_path(tar.name).name)
        # An older sidecar was merged as it is; in a copied folder it may be newer, with the same digest.
        newer = sidecar is not None and sidecar.st_mtime_ns >= when
        if newer and _sidecar(str(Path(folder, tar.name)))[1][0].digest != tar.digest:
            reason = f"{tar.name} was indexed again"
            break
    return table, tars, reason


def _difference(tars: list[Tar], sizes: dict[str, int]) -> str | None:
    """How a folder's tars (name -> bytes) differ from those of its merged index."""
    expected = {tar.name: tar.size for tar in tars}
    for name in sorted(expected.keys() ^ sizes.keys()):
        return f"{name} is gone" if name in expected else f"{name} is not in it"
    for name, size in sizes.items():
        if size != expected[name]:
            return f"{name} has {size} bytes, not {expected[name]}"
    return None


def _remote_merged(folder: str, cache: Cache | None) -> tuple[pa.Table, list[Tar], str | None] | None:
    url = join(folder, MERGED)
    try:
        table, tars = read_index(cache.file(url) if cache else read_file(url), url, mapped=cache is not None)
    except AbsentError:
        return None
    listed = list_files(folder)
    if listed is None or any(is_url(tar.name) for tar in tars):
        return table, tars, None  # HTTP: each tar's size is compared when it is read
    sizes = {url.rpartition("/")[2]: size or 0 for url, size in listed.items() if url.endswith(".tar")}
    return table, tars, _difference(tars, sizes)
