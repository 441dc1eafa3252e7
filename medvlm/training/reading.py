"""Opening shards, and reading batches so that no rank waits for one that cannot."""

import re
from collections.abc import Iterator
from typing import Any

from medvlm.config.schema import Data
from medvlm.data.cache import Cache
from medvlm.data.lengths import cache_folder
from medvlm.data.shard_set import expand
from medvlm.data.shards import ShardReader
from medvlm.data.storage import is_url
from medvlm.errors import UserError


def open_shards(data: Data, paths: list[str]) -> ShardReader:
    """Remote shards go through a cache of ``data.cache_gib`` in ``data.cache_dir``."""
    remote = any(is_url(path) for path in expand(paths))
    return ShardReader(paths, Cache(cache_folder(data.cache_dir), int(data.cache_gib * 2**30)) if remote else None)


def read(loader: Iterator[Any], count: int) -> tuple[list[Any], str | None]:
    """The next batches, fewer where the storage fails (or a worker does), and then the reason."""
    batches: list[Any] = []
    try:
        while len(batches) < count:
            batches.append(next(loader))
    except (UserError, OSError, RuntimeError) as error:
        return batches, reason_of(error)
    return batches, None


def reason_of(error: Exception) -> str:
    """An error's sentence, also where it comes from a worker with a traceback around it."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    kind, text = type(error).__name__, lines[-1] if lines else ""
    if isinstance(error, UserError):
        return re.sub(r"^[\w.]+Error: ", "", text)
    return f"{kind}: {text}"
