"""Where a prepared data set goes: a local folder or any fsspec URL, with whole-file writes only."""

import json
import os
import shutil
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from medvlm.errors import UserError

PROBE = ".probe"
TEMPORARY = ".work/tmp"  # of a local output: on the same file system, so that a rename suffices


def sync(path: Path) -> None:
    """Flush a file's or a folder's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_synced(part: Path, target: Path) -> None:
    """Move a finished file to its final name so that a crash at any moment leaves the whole file or none."""
    sync(part)
    os.replace(part, target)
    sync(target.parent)


class Output:
    """The root of a data set. Names are relative, with ``/``; every file appears whole or not at all.

    Credentials and endpoints come from the environment (``AWS_*``, ``FSSPEC_*``), never from arguments. Raises
    UserError for an unknown protocol or one whose package is not installed.
    """

    def __init__(self, url: str):
        self.url = str(url).rstrip("/")
        try:
            self.fs, self.root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise UserError(f"{url}: cannot be opened ({error}); `pip install medvlm[remote]` brings S3") from None
        self.local = isinstance(self.fs, LocalFileSystem)

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # each store has errors of its own
            raise UserError(
                f"{self.url}/{name}: cannot be written ({type(error).__name__}: {error}); finished shards are kept"
            ) from error

    def probe(self) -> None:
        """Raise before hours of work where nothing can be written here."""
        self.write(PROBE, b"")
        self.remove(PROBE)

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def sizes(self, folders: Iterable[str]) -> dict[str, int]:
        """Name -> size in bytes of the files directly in ``folders`` ("" is the root), read afresh."""
        self.fs.invalidate_cache()
        found: dict[str, int] = {}
        for folder in folders:
            try:
                listing = self.fs.ls(self.path(folder).rstrip("/"), detail=True)
            except FileNotFoundError:
                continue
            names = ((f"{folder}/" if folder else "") + entry["name"].rpartition("/")[2] for entry in listing)
            found |= {n: e["size"] for n, e in zip(names, listing, strict=True) if e["type"] == "file"}
        return found

    def read_json(self, name: str) -> dict[str, Any] | None:
        """The content of a small file, or None where it does not exist."""
        return self.read_many([name]).get(name)

    def read_many(self, names: list[str]) -> dict[str, dict[str, Any]]:
        """Name -> content of the JSON files among ``names`` that exist; a remote store is asked concurrently."""
        if not names:
            return {}
        paths = [self.path(name) for name in names]
        found = self.fs.cat(paths, on_error="return")
        result = {}
        for name, data in zip(names, (found[p] for p in paths), strict=True):
            if isinstance(data, FileNotFoundError):
                continue
            if isinstance(data, Exception):
                raise UserError(f"{self.url}/{name}: cannot be read ({type(data).__name__}: {data})")
            try:
                result[name] = json.loads(data)
            except ValueError:
                raise UserError(f"{self.url}/{name}: not valid JSON; delete it and start again") from None
        return result

    def read_each(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """Name and content of files, in order, a few at a time; a remote store is asked concurrently."""
        rest = iter(names)
        while block := list(islice(rest, 64)):
            found = self.fs.cat([self.path(name) for name in block], on_error="return")
            for name in block:
                data = found[self.path(name)]
                if isinstance(data, Exception):
                    raise UserError(f"{self.url}/{name}: cannot be read ({type(data).__name__}: {data})")
                yield name, data

    def write(self, name: str, data: bytes) -> None:
        """Write a small file."""
        if not self.local:
            with self._explained(name):
                self.fs.pipe_file(self.path(name), data)
            return
        target = Path(self.path(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        part = Path(self.path(TEMPORARY), f"write.{socket.gethostname()}.{os.getpid()}", target.name)
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data)
        replace_synced(part, target)
        with suppress(OSError):
            part.parent.rmdir()

    def publish(self, file: Path, name: str) -> None:
        """Move a local file here: a rename on a local file system, an upload of the whole object elsewhere."""
        if not self.local:
            with self._explained(name):
                self.fs.put_file(str(file), self.path(name))
            file.unlink()
            return
        target = Path(self.path(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_synced(file, target)

    def download(self, name: str, file: Path) -> Path:
        """A local copy (the file itself where it is local)."""
        if self.local:
            return Path(self.path(name))
        self.fs.get_file(self.path(name), str(file))
        return file

    def remove(self, name: str) -> None:
        """Remove a file that may not exist."""
        with suppress(FileNotFoundError):
            self.fs.rm_file(self.path(name))


def remove_dead(folder: Path, stem: str) -> None:
    """Remove what killed processes of this machine left: entries ``STEM.HOST.PID`` whose process is gone."""
    for left in folder.glob(f"{stem}.{socket.gethostname()}.*"):
        pid = left.name.rpartition(".")[2]
        if pid.isdigit() and int(pid) != os.getpid() and not _alive(int(pid)):
            shutil.rmtree(left, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
