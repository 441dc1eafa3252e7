"""Samples -> images and texts of a dual encoder, paired (a study and its report) or not (each with its labels)."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from medvlm.data.augment import Augment
from medvlm.data.conversation import IGNORE
from medvlm.data.eda import alter_words
from medvlm.data.images import ImageTransform
from medvlm.data.loader import pinned, stack
from medvlm.data.pair_text import TextEncoder, choose_text, section_sentences
from medvlm.data.schema import Sample
from medvlm.errors import LeftOut, UserError

PRIOR = "prior"
Labeler = Callable[[str], Mapping[str, int | None]]


@dataclass
class EncodedPair:
    """One sample, ready: an image (uint8 [C, S, S]) and the one before it, T token ids; labels are 1, 0 or -1 each."""

    ids: list[int] | None = None
    image: torch.Tensor | None = None
    prior: torch.Tensor | None = None
    image_labels: list[float] | None = None
    text_labels: list[float] | None = None
    masked_ids: list[int] | None = None
    masked_labels: list[int] | None = None
    truncated: bool = False
    """Whether the text was cut to the greatest length."""
    seen: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    """Both images with their numbers in the sample."""

    @property
    def labels(self) -> list[int]:
        """Of the tokens to predict, -100 elsewhere."""
        return self.masked_labels or [IGNORE] * len(self.ids or [])


@dataclass
class PairBatch:
    """I images and T texts of L tokens; in a paired batch row n of both is the same study.

    pixel_values, prior_pixel_values uint8 [I, C, S, S], C = 1 if all are grey, black where there is no prior;
    has_prior bool [I]; input_ids, attention_mask, masked_ids, masked_labels int64 [T, L]; image_labels float32 [I, N],
    text_labels float32 [T, N]. ``images`` and ``texts`` are the numbers of real rows: a side without any has one blank
    row, so that every rank runs every module, whose features are to be dropped.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    pixel_values: torch.Tensor
    images: int
    texts: int
    paired: bool = True
    prior_pixel_values: torch.Tensor | None = None
    has_prior: torch.Tensor | None = None
    image_labels: torch.Tensor | None = None
    text_labels: torch.Tensor | None = None
    masked_ids: torch.Tensor | None = None
    masked_labels: torch.Tensor | None = None
    truncated: int = 0
    """Texts that were cut to the greatest length."""
    keys: list[str] = field(default_factory=list)
    quarantined: list[tuple[str, str]] = field(default_factory=list)
    not_taken: list[tuple[str, str]] = field(default_factory=list)

    def inputs(self, device: torch.device) -> dict[str, Any]:
        """What the model's forward takes, on its device; without what this batch does not have."""
        names = ("pixel_values", "input_ids", "attention_mask", "prior_pixel_values", "has_prior")
        tensors = {name: getattr(self, name) for name in (*names, "masked_ids", "masked_labels")}
        return {k: v.to(device, non_blocking=True) for k, v in tensors.items() if v is not None}

    def pin_memory(self) -> "PairBatch":
        """Called by the loader's pinning thread, as PyTorch does not look into other classes."""
        return pinned(self)

    @property
    def lengths(self) -> list[int]:
        """Real tokens of each text."""
        return self.attention_mask[: self.texts].sum(1).tolist()

    @property
    def tokens(self) -> int:
        """Real tokens, padding excluded."""
        return sum(self.lengths)

    @property
    def slots(self) -> int:
        """Tokens, padding included."""
        return self.input_ids.numel()

    @property
    def targets(self) -> int:
        """What the loss is averaged over: pairs, or images and texts where they are not paired."""
        return self.images if self.paired else self.images + self.texts

    @property
    def left_out(self) -> int:
        """Samples without an image or a text that the recipe asks for."""
        return len(self.not_taken)

    @property
    def masked_tokens(self) -> int:
        """Tokens that are to be predicted."""
        return 0 if self.masked_labels is None else int((self.masked_labels != IGNORE).sum())


class PairEncoder:
    """Sample and image bytes -> EncodedPair. Raises UserError with the reason where a sample cannot be trained on,
    LeftOut where it lacks what this recipe asks for.

    Given an epoch, the image (of ``views`` if given), the sentence or the order of sentences, the words altered, the
    tokens to predict (with probability ``masking``) and the augmentation are drawn, each as a pure function of (sample
    key, epoch, seed). Without one, it is the first image, the report as it stands or its first sentence, and fixed
    tokens.

    ``sections``, ``text``, ``min_words``, ``shuffle_sentences``, ``alter_words`` and ``views`` mean what they mean in
    the recipe's ``data.pairs``, ``synonyms`` gives those of a word. ``labels`` are the names of the labels wanted;
    where a sample has none of them, and for every single sentence, they are those that ``labeler`` finds in the text.
    ``prior`` asks for the image whose metadata say ``role: prior``, which is never the main one. Where samples are not
    ``paired``, one may lack its image or its text.
    """

    def __init__(
        self,
        tokenizer: Any,
        transform: ImageTransform,
        max_length: int,
        *,
        sections: Sequence[str] = ("findings", "impression"),
        text: str = "report",
        min_words: int = 3,
        shuffle_sentences: bool = False,
        alter_words: float = 0.0,
        synonyms: Callable[[str], list[str]] | None = None,
        views: Sequence[str] | None = None,
        augment: Augment | None = None,
        masking: float | None = None,
        labels: Sequence[str] = (),
        prior: bool = False,
        paired: bool = True,
        labeler: Labeler | None = None,
        seed: int = 0,
    ):
        self.tokens = TextEncoder(tokenizer, max_length, masking)
        self.transform, self.augment, self.views, self.seed = transform, augment, views, seed
        self.sections, self.text, self.min_words = list(sections), text, min_words
        self.shuffle_sentences, self.alter_words, self.synonyms = shuffle_sentences, alter_words, synonyms
        self.labels, self.labeler, self.prior, self.paired = list(labels), labeler, prior, paired
        self.known = frozenset(labeler("")) if labeler and labels else frozenset()  # a blank of these may be left out

    def __call__(self, sample: Sample, images: Sequence[bytes], epoch: int | None = None) -> EncodedPair:
        if any(image.depth for image in sample.images):
            raise UserError("holds a volume, and this model takes pictures")
        text, number = self.read(sample, epoch), self.choose_image(sample, epoch)
        if self.paired and number is None:
            views = f" of the views {', '.join(self.views)}" if self.views and sample.images else ""
            raise LeftOut(f"no image{views}, and an image and a text make a pair")
        if text is None and (self.paired or number is None):
            raise LeftOut(self._no_text(sample))
        pair = EncodedPair()
        if number is not None:
            pair.image = self._pixels(sample, images, number, epoch)
            pair.seen.append((number, pair.image))
            before = [n for n, image in enumerate(sample.images) if image.metadata.get("role") == PRIOR]
            if self.prior and before:
                pair.prior = self._pixels(sample, images, before[0], epoch)
                pair.seen.append((before[0], pair.prior))
        if text is not None:
            pair.ids, pair.truncated = self.tokens(self.altered(text, sample, epoch))
            if self.tokens.masking is not None:
                pair.masked_ids, pair.masked_labels = self.tokens.mask(pair.ids, self._rng(sample, epoch, "masks"))
        if self.labels:
            self._label(pair, sample, text, self.alone(sample, epoch))
        return pair

    def read(self, sample: Sample, epoch: int | None = None) -> str | None:
        """The text of a sample, None where it has too few words."""
        return choose_text(
            section_sentences(sample, self.sections),
            sentence=self.alone(sample, epoch),
            shuffle=self.shuffle_sentences,
            min_words=self.min_words,
            rng=None if epoch is None else self._rng(sample, epoch, "text"),
        )

    def altered(self, text: str, sample: Sample, epoch: int | None) -> str:
        """The text with words swapped, left out or exchanged, if it is drawn for that."""
        if epoch is None or not self.alter_words:
            return text
        rng = self._rng(sample, epoch, "words")
        return alter_words(text, rng, self.synonyms) if rng.random() < self.alter_words else text

    def alone(self, sample: Sample, epoch: int | None = None) -> bool:
        """Whether the text is a single sentence; of ``either`` it is the report where nothing is drawn."""
        if self.text == "either" and epoch is not None:
            return self._rng(sample, epoch, "length").random() < 0.5
        return self.text == "sentence"

    def length(self, sample: Sample) -> int:
        """Tokens of the sample's text before it is cut, 0 where it has none."""
        text = self.read(sample)
        return 0 if text is None else len(self.tokens.tokenizer(text, verbose=False)["input_ids"])

    def choose_image(self, sample: Sample, epoch: int | None = None) -> int | None:
        """The number of the main image, None where there is none."""
        fit = [
            n
            for n, image in enumerate(sample.images)
            if image.metadata.get("role") != PRIOR and (self.views is None or image.view in self.views)
        ]
        if not fit:
            return None
        return fit[0] if epoch is None else self._rng(sample, epoch, "image").choice(fit)

    def _rng(self, sample: Sample, epoch: int | None, what: str) -> random.Random:
        """One for each thing that is drawn, so that turning one on leaves the others as they were."""
        return random.Random(f"{self.seed}/{epoch}/{sample.key}/{what}")

    def _pixels(self, sample: Sample, images: Sequence[bytes], number: int, epoch: int | None) -> torch.Tensor:
        pixels = self.transform(images[number], f"image {number}")
        if self.augment and epoch is not None:
            pixels = self.augment(pixels, sample.key, number, epoch, self.seed)
        return pixels

    def _no_text(self, sample: Sample) -> str:
        if not section_sentences(sample, self.sections):
            return f"empty report: nothing to read in {', '.join(self.sections)}"
        what = "no sentence of its report has" if self.text == "sentence" else "its report has less than"
        return f"{what} {self.min_words} words, see data.pairs.min_words"

    def _label(self, pair: EncodedPair, sample: Sample, text: str | None, alone: bool) -> None:
        known = sample.labels if any(name in sample.labels for name in self.labels) else None
        if pair.image is not None:
            pair.image_labels = self._vector(sample.labels if known else self._labels_of(self._report(sample)))
        if text is not None:
            pair.text_labels = self._vector(sample.labels if known and not alone else self._labels_of(text))

    def _report(self, sample: Sample) -> str | None:
        return " ".join(s for section in section_sentences(sample, self.sections) for s in section) or None

    def _labels_of(self, text: str | None) -> Mapping[str, int | None]:
        if text is None or self.labeler is None:
            raise LeftOut(
                f"has none of the labels {', '.join(self.labels)}, and no "
                + ("report to take them from" if text is None else "labeler is given to take them from its report")
            )
        return self.labeler(text)

    def _vector(self, labels: Mapping[str, int | None]) -> list[float]:
        strange = [name for name in self.labels if name not in labels and name not in self.known]
        if strange:
            raise UserError(f"data.pairs.labels: neither the sample nor the labeler has a label {strange[0]!r}")
        return [float(labels.get(name) or 0) for name in self.labels]


def collate_pairs(
    samples: Sequence[EncodedPair],
    *,
    pad_id: int,
    image_size: int,
    max_length: int,
    labels: int = 0,
    prior: bool = False,
    masking: bool = False,
    paired: bool = True,
    multiple: int = 8,
) -> PairBatch:
    """Stack encoded samples, texts padded to a multiple of ``multiple`` tokens, or to ``max_length``, for which there
    are positions, where that is less.

    ``labels`` is the number of labels; with ``prior`` and ``masking`` the batch has these tensors, whatever is in it.
    """
    shown, told = [s for s in samples if s.image is not None], [s for s in samples if s.ids is not None]
    blank = torch.zeros(1, image_size, image_size, dtype=torch.uint8)
    ids = [s.ids or [] for s in told] or [[pad_id]]
    length = min(max_length, -(-max(map(len, ids)) // multiple) * multiple)
    batch = PairBatch(
        input_ids=_padded(ids, pad_id, length),
        attention_mask=_padded([[1] * len(row) for row in ids], 0, length),
        pixel_values=stack([s.image for s in shown if s.image is not None] or [blank], image_size),
        images=len(shown),
        texts=len(told),
        paired=paired,
        truncated=sum(s.truncated for s in told),
    )
    if prior:
        before = [s.prior for s in shown] or [None]
        batch.prior_pixel_values = stack([blank if p is None else p for p in before], image_size)
        batch.has_prior = torch.tensor([p is not None for p in before])
    if masking:
        batch.masked_ids = _padded([s.masked_ids or [] for s in told] or [[pad_id]], pad_id, length)
        batch.masked_labels = _padded([s.masked_labels or [] for s in told] or [[IGNORE]], IGNORE, length)
    if labels:
        batch.image_labels = torch.tensor([s.image_labels for s in shown] or [[0.0] * labels])
        batch.text_labels = torch.tensor([s.text_labels for s in told] or [[0.0] * labels])
    return batch


def _padded(rows: Sequence[Sequence[int]], value: int, length: int) -> torch.Tensor:
    """int64 [rows, length]"""
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])
