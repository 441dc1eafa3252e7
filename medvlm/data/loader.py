"""Samples -> batches of tensors. A batch is what one rank feeds its model in one micro-step."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from medvlm.data.augment import Augment
from medvlm.data.conversation import IGNORE, ConversationEncoder
from medvlm.data.images import ImageTransform
from medvlm.data.schema import Message, Sample
from medvlm.data.shards import ShardReader
from medvlm.data.storage import StorageError
from medvlm.data.volume_slices import VolumeSlices, expand
from medvlm.errors import LeftOut, UserError


@dataclass
class Encoded:
    """One sample, ready: T tokens and I images (uint8 [C, S, S], one channel where grey)."""

    ids: list[int]
    labels: list[int]
    images: list[torch.Tensor] = field(default_factory=list)

    @property
    def seen(self) -> list[tuple[int, torch.Tensor]]:
        """Images with their numbers in the sample."""
        return list(enumerate(self.images))


@dataclass
class Batch:
    """B rows of T tokens, and I images in the order in which the rows refer to them.

    input_ids, labels int64 [B, T]; attention_mask int64 [B, T] of a padded batch. A padding-free batch has one row of
    segments instead, one per sample: position_ids int64 [1, T] restart at each, segment_ids int32 [1, T] number them,
    cu_seqlens int32 [segments + 1] are their edges. pixel_values uint8 [I, C, S, S], C = 1 if all images are grey.
    ``quarantined`` holds (key, reason) of samples that could not be used, ``not_taken`` of those that the recipe does
    not ask for: their place stays, without loss.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor | None
    pixel_values: torch.Tensor
    position_ids: torch.Tensor | None = None
    segment_ids: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    keys: list[str] = field(default_factory=list)
    quarantined: list[tuple[str, str]] = field(default_factory=list)
    not_taken: list[tuple[str, str]] = field(default_factory=list)

    def inputs(self, device: torch.device) -> dict[str, Any]:
        """What the model's forward takes, on its device."""
        names = ("input_ids", "labels", "attention_mask", "position_ids", "cu_seqlens", "pixel_values")
        tensors = {name: getattr(self, name) for name in names}
        values: dict[str, Any] = {k: v.to(device, non_blocking=True) for k, v in tensors.items() if v is not None}
        if self.cu_seqlens is not None:  # a plain number, so that no kernel has to wait for it
            values["max_seqlen"] = int(self.cu_seqlens.diff().max())
        return values

    def pin_memory(self) -> "Batch":
        """Called by the loader's pinning thread, as PyTorch does not look into other classes."""
        return pinned(self)

    @property
    def tokens(self) -> int:
        """Real tokens, padding excluded."""
        return int(self.attention_mask.sum()) if self.attention_mask is not None else self.input_ids.numel()

    @property
    def lengths(self) -> list[int]:
        """Real tokens of each segment, or of each row."""
        lengths = self.attention_mask.sum(1) if self.cu_seqlens is None else self.cu_seqlens.diff()  # type: ignore[union-attr]
        return lengths.tolist()

    @property
    def supervised_tokens(self) -> int:
        """Targets after the shift: a row's first label has no position that predicts it."""
        return int((self.labels[:, 1:] != IGNORE).sum())

    @property
    def targets(self) -> int:
        """What the loss is averaged over."""
        return self.supervised_tokens

    @property
    def slots(self) -> int:
        """Tokens, padding included."""
        return self.input_ids.numel()

    @property
    def images(self) -> int:
        return self.pixel_values.shape[0]


def pinned(batch: Any) -> Any:
    """The batch with its tensors in page-locked memory."""
    tensors = {f.name: v for f in fields(batch) if isinstance(v := getattr(batch, f.name), torch.Tensor)}
    return replace(batch, **{name: value.pin_memory() for name, value in tensors.items()})


class SampleEncoder:
    """Sample and image bytes -> Encoded. Raises UserError with the reason where a sample cannot be trained on.

    Given an epoch, questions are put in another order (``shuffle``) and images are augmented (``augment``), as pure
    functions of (sample key, epoch, seed); without one, nothing is random. ``slices`` makes a volume
    several images, which are augmented alike; without it volumes are refused.
    """

    def __init__(
        self,
        conversation: ConversationEncoder,
        transform: ImageTransform,
        max_length: int,
        *,
        shuffle: bool = False,
        augment: Augment | None = None,
        slices: VolumeSlices | None = None,
        seed: int = 0,
    ):
        self.conversation, self.transform, self.max_length = conversation, transform, max_length
        self.shuffle, self.augment, self.slices, self.seed = shuffle, augment, slices, seed

    @property
    def tokens(self) -> ConversationEncoder:
        return self.conversation

    def __call__(self, sample: Sample, images: Sequence[bytes], epoch: int | None = None) -> Encoded:
        messages = list(sample.messages)
        if not any(m.role == "assistant" for m in messages):
            raise UserError("no assistant turn to learn from")
        if self.slices is None and any(image.depth for image in sample.images):
            raise UserError("holds a volume, and this model takes pictures; data.volume_slices makes slices of it")
        if self.shuffle and epoch is not None:
            messages = shuffle_turns(messages, random.Random(f"{self.seed}/{epoch}/{sample.key}"))
        if self.slices:
            messages = expand(messages, self.slices.images(sample.images))
        ids, labels = self.conversation(messages)
        if len(ids) > self.max_length:
            raise UserError(f"{len(ids)} tokens exceed data.max_length={self.max_length}")
        pixels: list[torch.Tensor] = []
        for i, (image, data) in enumerate(zip(sample.images, images, strict=True)):
            where = f"image {i}"
            if self.slices and image.depth:
                seen = [self.transform.resize(plane) for plane in self.slices.decode(data, where)]
            else:
                seen = [self.transform(data, where)]
            if self.augment and epoch is not None:
                seen = [self.augment(p, sample.key, i, epoch, self.seed) for p in seen]
            pixels += seen
        return Encoded(ids, labels, pixels)


def shuffle_turns(messages: list[Message], rng: random.Random) -> list[Message]:
    """The question-answer pairs in another order; images stay in front of what is then the first question."""
    lead = [m for m in messages if m.role == "system"]
    rest = messages[len(lead) :]
    pairs = list(zip(rest[::2], rest[1::2], strict=False))
    if len(rest) % 2 or any(u.role != "user" or a.role != "assistant" for u, a in pairs):
        return messages
    images = [p for u, _ in pairs for p in u.content if p.type == "image"]
    if sum(u.n_images > 0 for u, _ in pairs) > 1:
        return messages  # images belong to their questions
    rng.shuffle(pairs)
    turns = list(lead)
    for n, (user, answer) in enumerate(pairs):
        content = [p for p in user.content if p.type != "image"]
        turns += [user.model_copy(update={"content": (images if n == 0 else []) + content}), answer]
    return turns


def collate(samples: Sequence[Encoded], pad_id: int, image_size: int, padding_free: bool, multiple: int = 8) -> Batch:
    """Stack encoded samples. An empty list gives one unsupervised padding token, so that every rank takes its step."""
    pixels = stack([image for s in samples for image in s.images], image_size)
    samples = list(samples) or [Encoded([pad_id], [IGNORE])]
    lengths = torch.tensor([len(s.ids) for s in samples])
    # through numpy: PyTorch takes four times as long over a list
    ids = torch.from_numpy(np.array([token for s in samples for token in s.ids], np.int64))
    labels = torch.from_numpy(np.array([label for s in samples for label in s.labels], np.int64))
    edges = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    segments = torch.repeat_interleave(torch.arange(len(samples)), lengths)
    positions = torch.arange(len(ids)) - edges[segments]
    if padding_free:
        # The first token of a segment has no predecessor inside it, so it is never a target.
        labels[edges[:-1]] = IGNORE
        return Batch(
            input_ids=ids[None],
            labels=labels[None],
            attention_mask=None,
            pixel_values=pixels,
            position_ids=positions[None],
            segment_ids=segments[None].int(),
            cu_seqlens=edges.int(),
        )
    shape = (len(samples), -(-int(lengths.max()) // multiple) * multiple)
    batch = Batch(torch.full(shape, pad_id), torch.full(shape, IGNORE), torch.zeros(shape, dtype=torch.int64), pixels)
    assert batch.attention_mask is not None
    batch.input_ids[segments, positions] = ids
    batch.labels[segments, positions] = labels
    batch.attention_mask[segments, positions] = 1
    return batch


def stack(images: Sequence[torch.Tensor], image_size: int) -> torch.Tensor:
    """uint8 [C, S, S] each -> [I, C, S, S] in one tensor, which workers hand over at a fraction of the cost of many."""
    if not images:
        return torch.zeros(0, 1, image_size, image_size, dtype=torch.uint8)
    channels = max(image.shape[0] for image in images)
    return default_collate([image.expand(channels, -1, -1) for image in images])  # in a worker, into shared memory


class MicroBatches(Dataset):
    """Map-style: a list of draws (sample number, repeat or None) in, a batch out. Runs in loader workers.

    ``encoder`` (sample, image bytes, repeat) gives what ``collate`` makes a batch of, or raises UserError with the
    reason why a sample cannot be used, LeftOut where it is not asked for. A batch has ``keys``, ``quarantined`` and
    ``not_taken``, as :class:`Batch`.
    """

    def __init__(self, reader: ShardReader, encoder: Any, collate: Callable[[list[Any]], Any]):
        self.reader, self.encoder, self.collate = reader, encoder, collate

    def __getitem__(self, draws: Sequence[tuple[int, int | None]]) -> Any:
        encoded, keys, quarantined, not_taken = [], [], [], []
        for number, repeat in draws:
            keys.append(self.reader.key(number))
            try:
                encoded.append(self.encoder(*self.reader.load(number), repeat))
            except StorageError:
                raise  # the network is down or the shards are gone: no fault of this sample
            except LeftOut as error:
                not_taken.append((keys[-1], str(error)))
            except UserError as error:
                quarantined.append((keys[-1], str(error)))
        batch = self.collate(encoded)
        batch.keys, batch.quarantined, batch.not_taken = keys, quarantined, not_taken
        return batch


def load_batches(
    dataset: MicroBatches, items: Iterator[Sequence[tuple[int, int | None]]], workers: int, timeout: float = 0
) -> Iterator[Any]:
    """Batches in the order of ``items``, read ahead by ``workers`` processes (0: in this one).

    Raises RuntimeError where workers give none for ``timeout`` seconds (0: for ever), or one of them dies.
    """
    loader: DataLoader = DataLoader(
        dataset,
        sampler=items,  # type: ignore[arg-type]  # any iterable of index lists serves a map-style dataset
        batch_size=None,
        num_workers=workers,
        timeout=timeout if workers else 0,
        pin_memory=torch.cuda.is_available(),
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=_one_thread if workers else None,
    )
    return iter(loader)


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)
