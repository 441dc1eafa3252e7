"""A bounded cache of blocks of remote files, shared by all processes of a node."""

import contextlib
import fcntl
import hashlib
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from medvlm.data.storage import MiB, StorageError, info, read_file, read_range
from medvlm.errors import UserError


class Cache:
    """Blocks of remote files in a local folder, at most ``limit_bytes`` of them; the least recently read go first.

    Blocks rather than whole files: a sample of 40 kB must not wait for a shard of 1 GB, and the limit may be smaller
    than a shard; neighbours in a block are what a block-shuffled order reads next. A block is fetched once, under a
    lock, and appears complete or not at all: a process that is killed leaves nothing that another would read.
    """

    def __init__(self, folder: str | os.PathLike, limit_bytes: int, block_bytes: int = 4 * MiB):
        self.folder, self.limit, self.block = Path(folder) / "blocks", int(limit_bytes), block_bytes
        if self.limit < 4 * block_bytes:
            raise UserError(f"{folder}: a cache of {limit_bytes} bytes is too small; it needs {4 * block_bytes}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder}: cannot hold a cache ({error})") from None

    def read(self, url: str, start: int, size: int, total: int, tag: str = "") -> bytes:
        """Bytes of a file that has ``total``; ``tag`` tells contents of the same URL apart.

        Raises StorageError as `medvlm.data.storage.read_range` does, and where the file has another size.
        """
        pieces = []
        for number in range(start // self.block, -(-(start + size) // self.block)):
            first = number * self.block
            low, high = max(start, first), min(start + size, first + self.block)
            length = min(self.block, total - first)

            def fetch(first: int = first, length: int = length) -> bytes:
                data, found = read_range(url, first, length)
                if found is not None and found != total:
                    raise StorageError(f"{url}: has {found} bytes, its index expects {total}; index again")
                return data

            pieces.append(self._piece(self._path(url, tag, number), low - first, high - low, length, fetch))
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def file(self, url: str) -> Path:
        """A whole file, for memory-mapping. It goes when room is needed; what is open by then stays readable."""
        size, tag = info(url)
        path = self._path(url, f"{size}/{tag}", -1)
        self._piece(path, 0, 0, size, lambda: read_file(url))
        return path

    def forget(self, url: str, start: int, size: int, tag: str = "") -> None:
        """Drop the blocks of a range, because they turned out damaged."""
        for number in range(start // self.block, -(-(start + size) // self.block)):
            self._path(url, tag, number).unlink(missing_ok=True)

    def _path(self, url: str, tag: str, number: int) -> Path:
        name = hashlib.sha256(f"{url}\0{tag}\0{self.block}\0{number}".encode()).hexdigest()[:40]
        return self.folder / name[:2] / name

    def _piece(self, path: Path, start: int, size: int, length: int, fetch: Callable[[], bytes]) -> bytes:
        """``size`` bytes of a block of ``length``, which is fetched if it is not there, or not whole."""
        found = _read_block(path, start, size, length)
        if found is not None:
            return found
        with self._lock(path.name[:2]):
            found = _read_block(path, start, size, length)  # another process was quicker
            if found is not None:
                return found
            data = fetch()
            self._store(path, data)
        return data[start : start + size]

    def _store(self, path: Path, data: bytes) -> None:
        if len(data) > self.limit:
            raise UserError(f"{self.folder}: a cache of {self.limit} bytes cannot hold a file of {len(data)}")
        path.parent.mkdir(exist_ok=True)
        part = path.with_name(".part-" + path.name)
        with self._lock("size") as counter:  # one writer at a time, so that the limit holds with any number of them
            text = counter.read()
            used = int(text) if text.isdigit() else self._evict(len(data))
            if used + len(data) > self.limit:
                used = self._evict(len(data))
            counter.truncate(0)
            counter.write(str(used + len(data)).encode())
            counter.flush()
            try:
                part.write_bytes(data)
                os.replace(part, path)
            except OSError as error:
                raise StorageError(f"{part}: the cache could not be written ({error})") from None

    def _evict(self, wanted: int) -> int:
        """Make room for ``wanted`` bytes and a tenth of the limit beside; returns the bytes that stay."""
        found = []
        for folder in self.folder.iterdir():
            for entry in os.scandir(folder) if folder.is_dir() else ():
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    orphan = entry.name.startswith(".part-")  # its writer, who held the lock, was killed
                    found.append((0 if orphan else status.st_mtime_ns, status.st_size, entry.path))
        used = sum(size for _, size, _ in found)
        for when, size, path in sorted(found):
            if when and used + wanted <= self.limit * 0.9:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            used -= size
        return used

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[io.BufferedRandom]:
        # flock belongs to the open file: opened each time, it is safe after a fork, and a killed process lets go.
        with (self.folder / f"{name}.lock").open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            yield file  # type: ignore[misc]


def _read_block(path: Path, start: int, size: int, length: int) -> bytes | None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        if os.fstat(descriptor).st_size != length:
            return None  # cut off, as by a power failure
        data = os.pread(descriptor, size, start)
        os.utime(descriptor)  # when it was last read, for eviction
    finally:
        os.close(descriptor)
    return data if len(data) == size else None
