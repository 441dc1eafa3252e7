"""Samples -> batches of tensors. A batch is what one rank feeds its model in one micro-step."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from medvlm.data.conversation import IGNORE, ConversationEncoder
from medvlm.data.images import ImageTransform
from medvlm.data.schema import Message, Sample
from medvlm.data.shards import ShardReader
from medvlm.errors import UserError


@dataclass
class Encoded:
    """One sample, ready: T tokens and I images (uint8 [3, S, S])."""

    ids: list[int]
    labels: list[int]
    images: list[torch.Tensor] = field(default_factory=list)


@dataclass
class Batch:
    """B rows of T tokens, and I images in the order in which the rows refer to them.

    input_ids, labels int64 [B, T]; attention_mask int64 [B, T], or None in a padding-free batch, where position_ids
    int64 [1, T] restart at each segment; pixel_values uint8 [I, 3, S, S]. ``quarantined`` holds (key, reason) of
    samples that could not be used: their place stays, without loss.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor | None
    pixel_values: torch.Tensor
    keys: list[str] = field(default_factory=list)
    quarantined: list[tuple[str, str]] = field(default_factory=list)

    def inputs(self, device: torch.device) -> dict[str, Any]:
        names = ("input_ids", "labels", "attention_mask", "position_ids", "pixel_values")
        tensors = {name: getattr(self, name) for name in names}
        return {k: v.to(device, non_blocking=True) for k, v in tensors.items() if v is not None}

    @property
    def tokens(self) -> int:
        """Real tokens, padding excluded."""
        return int(self.attention_mask.sum()) if self.attention_mask is not None else self.input_ids.numel()

    @property
    def supervised_tokens(self) -> int:
        """Targets after the shift: a row's first label has no position that predicts it."""
        return int((self.labels[:, 1:] != IGNORE).sum())


class SampleEncoder:
    """Sample and image bytes -> Encoded. Raises UserError with the reason where a sample cannot be trained on."""

    def __init__(self, conversation: ConversationEncoder, transform: ImageTransform, max_length: int):
        self.conversation, self.transform, self.max_length = conversation, transform, max_length

    def __call__(self, sample: Sample, images: Sequence[bytes], shuffle: random.Random | None = None) -> Encoded:
        messages = list(sample.messages)
        if not any(m.role == "assistant" for m in messages):
            raise UserError("no assistant turn to learn from")
        ids, labels = self.conversation(shuffle_turns(messages, shuffle) if shuffle else messages)
        if len(ids) > self.max_length:
            raise UserError(f"{len(ids)} tokens exceed data.max_length={self.max_length}")
        return Encoded(ids, labels, [self.transform(data, f"image {i}") for i, data in enumerate(images)])


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
    images = [image for s in samples for image in s.images]
    pixels = torch.stack(images) if images else torch.zeros(0, 3, image_size, image_size, dtype=torch.uint8)
    samples = list(samples) or [Encoded([pad_id], [IGNORE])]
    if padding_free:
        # The first token of a segment has no predecessor inside it, so it is never a target.
        ids = torch.tensor([[token for s in samples for token in s.ids]])
        row = torch.tensor([[label for s in samples for label in [IGNORE, *s.labels[1:]]]])
        return Batch(ids, row, None, torch.tensor([[p for s in samples for p in range(len(s.ids))]]), pixels)
    length = -(-max(len(s.ids) for s in samples) // multiple) * multiple
    shape = (len(samples), length)
    input_ids, labels = torch.full(shape, pad_id), torch.full(shape, IGNORE)
    mask = torch.zeros(shape, dtype=torch.int64)
    for number, sample in enumerate(samples):
        n = len(sample.ids)
        input_ids[number, :n], labels[number, :n], mask[number, :n] = (
            torch.tensor(sample.ids),
            torch.tensor(sample.labels),
            1,
        )
    return Batch(input_ids, labels, mask, None, pixels)


class MicroBatches(Dataset):
    """Map-style: a list of (sample number, epoch) in, a :class:`Batch` out. Runs in the loader's workers."""

    def __init__(
        self,
        reader: ShardReader,
        encoder: SampleEncoder,
        pad_id: int,
        image_size: int,
        *,
        seed: int = 0,
        shuffle: bool = False,
        padding_free: bool = False,
    ):
        self.reader, self.encoder, self.seed, self.shuffle = reader, encoder, seed, shuffle
        self.collate_options = (pad_id, image_size, padding_free)

    def __getitem__(self, items: Sequence[tuple[int, int]]) -> Batch:
        encoded, keys, quarantined = [], [], []
        for number, epoch in items:
            key = self.reader.key(number)
            keys.append(key)
            rng = random.Random(f"{self.seed}/{epoch}/{key}") if self.shuffle else None
            try:
                sample = self.reader.sample(number)
                data = [self.reader.member(number, image.file) for image in sample.images]
                encoded.append(self.encoder(sample, data, rng))
            except UserError as error:
                quarantined.append((key, str(error)))
        batch = collate(encoded, *self.collate_options)
        batch.keys, batch.quarantined = keys, quarantined
        return batch


def load_batches(dataset: MicroBatches, items: Iterator[list[tuple[int, int]]], workers: int) -> Iterator[Batch]:
    """Batches in the order of ``items``, read ahead by ``workers`` processes (0: in this one)."""
    loader: DataLoader = DataLoader(
        dataset,
        sampler=items,  # type: ignore[arg-type]  # any iterable of index lists serves a map-style dataset
        batch_size=None,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=_one_thread if workers else None,
    )
    return iter(loader)


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)
