"""Token counts of every sample, for packing and grouping. They change only with text and tokenizer: they are cached."""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from medvlm.data.conversation import ConversationEncoder
from medvlm.data.plan import Lengths
from medvlm.data.shards import ShardReader
from medvlm.data.storage import StorageError
from medvlm.data.volume_slices import VolumeSlices, expand
from medvlm.errors import UserError

VERSION = 1
CHUNK = 1024


def cache_folder(chosen: str | None) -> Path:
    """``data.cache_dir``, else MEDVLM_CACHE, else medvlm in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "medvlm"
    return Path(chosen or os.environ.get("MEDVLM_CACHE") or default)


class _Chunks(Dataset):
    """Chunk number -> int32 [samples of the chunk, 2]: text tokens, and images."""

    def __init__(self, reader: ShardReader, encoder: ConversationEncoder, slices: VolumeSlices | None):
        self.reader, self.encoder, self.slices = reader, encoder, slices

    def __len__(self) -> int:
        return -(-len(self.reader) // CHUNK)

    def __getitem__(self, chunk: int) -> np.ndarray:
        numbers = range(chunk * CHUNK, min((chunk + 1) * CHUNK, len(self.reader)))
        return np.array([self._measure(n) for n in numbers], np.int32)

    def _measure(self, number: int) -> tuple[int, int]:
        try:
            sample = self.reader.sample(number)
            counts = self.slices.images(sample.images) if self.slices else [1] * len(sample.images)
            return len(self.encoder(expand(sample.messages, counts))[0]), sum(counts)
        except StorageError:
            raise
        except UserError:
            return 0, 0  # training quarantines it, with the reason; it takes no room


def measure_lengths(
    reader: ShardReader,
    conversation: ConversationEncoder,
    cache: Path,
    workers: int = 0,
    progress: bool = False,
    slices: VolumeSlices | None = None,
) -> Lengths:
    """Lengths of all samples: from the cache, or counted now (about a millisecond a sample and worker) and kept there.

    The order of a sample's questions may change its length by a token or two; packs then differ by as much.
    """
    textual = ConversationEncoder(conversation.tokenizer, conversation.template, image_tokens=0)
    what = [str(VERSION), reader.index_hash, conversation.template, _fingerprint(conversation.tokenizer)]
    what += [f"{slices.count} slices"] if slices else []
    name = hashlib.sha256("\0".join(what).encode()).hexdigest()[:16]
    path = cache / f"lengths-{name}.npy"
    if path.exists():
        counts = np.load(path, mmap_mode="r")
    else:
        loader: DataLoader = DataLoader(
            _Chunks(reader, textual, slices),
            batch_size=None,
            num_workers=workers,
            multiprocessing_context="fork" if workers else None,
        )
        chunks: Any = loader
        if progress:
            from rich.progress import track

            chunks = track(loader, description="counting tokens", total=len(loader))
        counts = np.concatenate([np.asarray(c) for c in chunks])
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        with part.open("wb") as file:
            np.save(file, counts)
        os.replace(part, path)
    return Lengths(counts[:, 0], counts[:, 1], conversation.image_tokens)


def _fingerprint(tokenizer: Any) -> str:
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
