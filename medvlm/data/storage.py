"""Ranged reads of remote files, with retries and time-outs.

HTTP(S) goes through urllib3: the answer to a range tells the whole file's size, a server that ignores ranges is found
out before it sends everything, and no thread has to survive a fork. Every other URL (``s3://``, ``gs://``, ...) goes
through fsspec. Connections are made in the process that reads.
"""

import contextlib
import http.client
import io
import os
import random
import re
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from medvlm.errors import UserError

T = TypeVar("T")
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
MiB = 1 << 20


class StorageError(UserError):
    """The storage failed, not the sample: a loader should stop on it, not quarantine."""


class AbsentError(StorageError):
    """404, or whatever the storage calls it."""


class _Transient(Exception):
    """Worth another attempt, after ``wait`` seconds if the server said so."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait


@dataclass(frozen=True)
class Policy:
    """Attempts, seconds before the second one (doubled each time, then scattered), and time-outs in seconds."""

    attempts: int = 5
    first_wait: float = 0.5
    longest_wait: float = 30.0
    connect: float = 10.0
    read: float = 60.0


policy = Policy()


def normalize(path: str | os.PathLike) -> str:
    """The path or URL as a string. ``pathlib`` makes ``https:/host`` of a URL; that is mended."""
    return re.sub(r"^([a-z][a-z0-9+.\-]+):/+", r"\1://", os.fspath(path))


def is_url(path: str | os.PathLike) -> bool:
    return "://" in normalize(path)


def join(folder: str, name: str) -> str:
    return name if is_url(name) or os.path.isabs(name) else f"{folder.rstrip('/')}/{name}"


def _retry(url: str, attempt: Callable[[], T]) -> T:
    """``attempt()``, again after a transient failure. Raises StorageError naming url, attempts and the last reason."""
    start = time.monotonic()
    for number in range(1, policy.attempts + 1):
        try:
            return attempt()
        except _Transient as error:
            if number == policy.attempts:
                spent = time.monotonic() - start
                raise StorageError(f"{url}: not read after {number} attempts in {spent:.1f} s; last: {error}") from None
            wait = min(policy.longest_wait, policy.first_wait * 2 ** (number - 1))
            # Scattered, so that the workers of a cluster do not come back all at once.
            time.sleep(min(policy.longest_wait, max(error.wait or 0, wait * random.uniform(0.5, 1))))
    raise AssertionError("policy.attempts is at least 1")


def read_range(url: str, start: int, size: int) -> tuple[bytes, int | None]:
    """``size`` bytes from ``start``, and the size of the whole file where the server tells it.

    Raises StorageError: at once where another attempt cannot help (absent, forbidden, no ranges), else when all
    attempts failed. Never returns fewer bytes.
    """
    if size == 0:
        return b"", None
    one = _http_range if url.startswith(("http://", "https://")) else _fsspec_range
    return _retry(url, lambda: one(url, start, size))


def info(url: str) -> tuple[int, str]:
    """Size in bytes, and a tag that changes with the content. Raises StorageError as `read_range` does."""

    def by_http() -> tuple[int, str]:
        with _http_get(url, {"Range": "bytes=0-0"}) as response:
            total = _total(url, response, 0)
            headers = response.headers
            response.read()
        if total is None:
            raise StorageError(f"{url}: the server does not tell the file's size")
        return total, headers.get("ETag") or headers.get("Last-Modified") or ""

    def other() -> tuple[int, str]:
        with _fsspec(url) as (fs, path):
            found = fs.info(path)
        return int(found["size"]), str(found.get("ETag") or found.get("mtime") or found.get("LastModified") or "")

    return _retry(url, by_http if url.startswith(("http://", "https://")) else other)


def read_file(url: str) -> bytes:
    """A whole file, in ranges, so that each is retried alone."""
    with RemoteFile(url) as file:
        return file.read()


def write_file(url: str, data: bytes | Path) -> None:
    """Write a whole file, from bytes or from a local file. Raises StorageError where the storage cannot be written."""
    if url.startswith(("http://", "https://")):
        raise StorageError(f"{url}: HTTP cannot be written; give a folder of yours for the index with --out")

    def attempt() -> None:
        with _fsspec(url) as (fs, path):
            fs.put_file(str(data), path) if isinstance(data, Path) else fs.pipe_file(path, data)

    _retry(url, attempt)


def list_files(folder: str) -> dict[str, int | None] | None:
    """URL -> bytes of the files in a folder, sorted; None over HTTP, which has no listing."""
    if folder.startswith(("http://", "https://")):
        return None

    def attempt() -> dict[str, int | None]:
        with _fsspec(folder) as (fs, path):
            found = {fs.unstrip_protocol(e["name"]): e.get("size") for e in fs.ls(path, detail=True, refresh=True)}
        return dict(sorted(found.items()))

    return _retry(folder, attempt)


# HTTP

_pools: dict[tuple[int, str], Any] = {}


def _pool(url: str) -> Any:
    import urllib3

    parts = urllib.parse.urlsplit(url)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and parts.hostname and urllib.request.proxy_bypass(parts.hostname):
        proxy = None
    name = (os.getpid(), proxy or "")  # a forked worker must not share its parent's sockets
    if name not in _pools:
        options: dict[str, Any] = {"retries": False, "maxsize": 8}
        _pools[name] = urllib3.ProxyManager(proxy, **options) if proxy else urllib3.PoolManager(**options)
    return _pools[name]


@contextlib.contextmanager
def _http_get(url: str, headers: dict[str, str]) -> Iterator[Any]:
    """The answer to a GET, body unread. Raises _Transient or StorageError for any status but 2xx and 416."""
    import urllib3

    timeout = urllib3.Timeout(connect=policy.connect, read=policy.read)
    headers = {**headers, "Accept-Encoding": "identity"}
    response = None
    try:
        response = _pool(url).request(
            "GET", url, headers=headers, timeout=timeout, preload_content=False, redirect=True, retries=_redirects()
        )
        if response.status in TRANSIENT:
            after = response.headers.get("Retry-After", "")
            raise _Transient(f"status {response.status}", float(after) if after.isdigit() else None)
        if response.status in (404, 410):
            raise AbsentError(f"{url}: not found (status {response.status})")
        if response.status >= 400 and response.status != 416:
            raise StorageError(f"{url}: the server refuses it (status {response.status})")
        yield response
    except urllib3.exceptions.LocationParseError:
        raise StorageError(f"{url}: not a valid URL") from None
    except urllib3.exceptions.HTTPError as error:
        raise _Transient(_reason(error)) from None
    finally:
        if response is not None:
            # Only an answer that was read to its end leaves a connection that can be used again.
            response.release_conn() if response.length_remaining == 0 else response.close()


def _redirects() -> Any:
    import urllib3

    return urllib3.Retry(total=5, connect=0, read=0, status=0, other=0, redirect=5, raise_on_status=False)


def _reason(error: Exception) -> str:
    import urllib3

    if isinstance(error, urllib3.exceptions.TimeoutError):
        return f"time-out (connect {policy.connect:g} s, read {policy.read:g} s)"
    if isinstance(error, urllib3.exceptions.MaxRetryError) and error.reason:
        return _reason(error.reason)
    for cause in error.args:
        if isinstance(cause, http.client.IncompleteRead):
            got = cause.partial if isinstance(cause.partial, int) else len(cause.partial)
            return f"short read ({got} of {got + (cause.expected or 0)} bytes)"
    return f"{type(error).__name__}: {error}"


def _total(url: str, response: Any, start: int) -> int | None:
    """The file's size from the answer to a range request; raises StorageError where the range was not honoured."""
    found = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", response.headers.get("Content-Range", ""))
    if response.status == 416 and found and found[2] != "*":
        return int(found[2])
    if response.status != 206 or not found or int(found[1] or -1) != start:
        raise StorageError(f"{url}: the server does not support ranged reads; copy the shards or serve them otherwise")
    return int(found[2]) if found[2] != "*" else None


def _http_range(url: str, start: int, size: int) -> tuple[bytes, int | None]:
    with _http_get(url, {"Range": f"bytes={start}-{start + size - 1}"}) as response:
        total = _total(url, response, start)
        if total is not None and total < start + size:
            raise StorageError(f"{url}: truncated, it has {total} bytes and {start + size} are needed")
        data = response.read()
    if len(data) != size:
        raise _Transient(f"short read ({len(data)} of {size} bytes)")
    return data, total


# Everything else


@contextlib.contextmanager
def _fsspec(url: str) -> Iterator[tuple[Any, str]]:
    """The filesystem of a URL and the path in it; its errors become ours."""
    import fsspec

    scheme = url.split("://")[0]
    options: dict[str, Any] = {}
    if scheme in ("s3", "s3a"):  # attempts are counted here alone, not multiplied by two layers below
        options["config_kwargs"] = {
            "connect_timeout": policy.connect,
            "read_timeout": policy.read,
            "retries": {"total_max_attempts": 1},
        }
    try:
        fs, path = fsspec.core.url_to_fs(url, **options)
        if scheme in ("s3", "s3a"):
            fs.retries = 1
        yield fs, path
    except ImportError as error:
        raise StorageError(f"{url}: needs another package ({error}); pip install 'medvlm[remote]'") from None
    except FileNotFoundError:
        raise AbsentError(f"{url}: not found") from None
    except PermissionError as error:
        raise StorageError(f"{url}: access denied ({error})") from None
    except (_Transient, UserError):
        raise
    except ValueError as error:  # fsspec: protocol not known
        raise StorageError(f"{url}: {error}") from None
    except Exception as error:  # each filesystem has exceptions of its own; the last is told when attempts are spent
        raise _Transient(f"{type(error).__name__}: {error}") from None


def _fsspec_range(url: str, start: int, size: int) -> tuple[bytes, int | None]:
    with _fsspec(url) as (fs, path):
        data = fs.cat_file(path, start=start, end=start + size)
    if len(data) != size:
        raise _Transient(f"short read ({len(data)} of {size} bytes)")
    return data, None


class RemoteFile(io.RawIOBase):
    """A remote file as a file object, read in ranges of ``block`` bytes; for reading from front to back."""

    def __init__(self, url: str, block: int = 8 * MiB):
        self.url, self.block = url, block
        self.size, self.tag = info(url)
        self._at, self._start, self._data = 0, 0, b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        if self._at >= self.size or not len(buffer):
            return 0
        if not self._start <= self._at < self._start + len(self._data):
            self._data = read_range(self.url, self._at, min(self.block, self.size - self._at))[0]
            self._start = self._at
        at = self._at - self._start
        piece = self._data[at : at + len(buffer)]
        buffer[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)
