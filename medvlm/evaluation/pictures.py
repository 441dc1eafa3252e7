"""Samples -> pictures with their texts, labels and boxes, for the tasks of dual encoders."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from PIL import Image

from medvlm.data.pair_text import section_sentences
from medvlm.data.pairs import PRIOR
from medvlm.data.schema import Box, Sample
from medvlm.errors import UserError
from medvlm.evaluation.questions import LazyImages, Reader
from medvlm.inference.images import decode_image

SECTIONS = ("findings", "impression")
NO_FINDING = "No Finding"
T = TypeVar("T")


@dataclass(frozen=True)
class Picture:
    """Image ``number`` of a sample; ``size`` is (width, height). ``group`` is the patient, or the nearest known."""

    key: str
    number: int
    group: str
    source: str
    synthetic: bool
    text: str | None
    report: dict[str, str]
    labels: dict[str, int | None]
    boxes: list[Box]
    size: tuple[int, int]
    sample_index: int
    reader: Reader

    def image(self) -> Image.Image:
        return decode_image(self.reader.images(self.sample_index)[self.number], f"{self.key}.{self.number}")

    @property
    def named(self) -> dict[str, Any]:
        """What a line of predictions begins with."""
        return {"key": self.key, "image": self.number, "group": self.group}


def report_text(sample: Sample, sections: Sequence[str]) -> str | None:
    """The sections that a report has, one after the other, as training on pairs reads them; None without words."""
    return " ".join(s for section in section_sentences(sample, sections) for s in section) or None


def load_pictures(
    reader: Reader,
    limit: int | None,
    seed: int,
    *,
    sections: Sequence[str] = SECTIONS,
    views: Sequence[str] = (),
    wanted: Callable[[Picture], bool] = lambda picture: True,
    missing: str = "no sample has an image",
) -> list[Picture]:
    """Every picture that is ``wanted``, of these ``views`` or of all, in the order of the shards.

    ``limit`` draws that many with ``seed``. Pictures of earlier studies (``role: prior``) are left out.

    Raises UserError that says what is ``missing`` where there is none, and for volumes.
    """
    found = []
    for index in range(len(reader)):
        sample = reader.sample(index)
        for number, image in enumerate(sample.images):
            if image.metadata.get("role") == PRIOR:  # of an earlier study, so the report is not its own
                continue
            if image.depth is not None:
                raise UserError(f"{sample.key}: image {number} is a volume; dual encoders are evaluated on pictures")
            picture = Picture(
                key=sample.key,
                number=number,
                group=sample.group,
                source=sample.source,
                synthetic=sample.synthetic,
                text=report_text(sample, sections),
                report=sample.report,
                labels=dict(sample.labels),
                boxes=[box for box in sample.boxes if box.image == number],
                size=(image.width, image.height),
                sample_index=index,
                reader=reader,
            )
            if wanted(picture) and (not views or image.view in views):
                found.append(picture)
    if not found or limit == 0:
        of = f" of view {' or '.join(views)}" if views else ""
        raise UserError(f"there is nothing to evaluate in {len(reader)} sample(s): {missing}{of}")
    return drawn(found, limit, seed)


def drawn(items: Sequence[T], count: int | None, seed: int | str) -> list[T]:
    """At most ``count`` of the items, in their order."""
    if count is None or count >= len(items):
        return list(items)
    return [items[i] for i in sorted(random.Random(seed).sample(range(len(items)), count))]


def lazy(pictures: Sequence[Picture]) -> Sequence[Image.Image]:
    return LazyImages([picture.image for picture in pictures])


def described(pictures: Sequence[Picture]) -> dict[str, Any]:
    """The counts that every result begins with."""
    return {
        "n": len(pictures),
        "n_groups": len({p.group for p in pictures}),
        "sources": dict(Counter(p.source for p in pictures)),
        "synthetic": all(p.synthetic for p in pictures),
    }


def known_labels(pictures: Sequence[Picture]) -> list[str]:
    """Labels that any picture has a value of, in the order in which they come."""
    return list(dict.fromkeys(name for p in pictures for name, value in p.labels.items() if value is not None))


def truth(picture: Picture, label: str, uncertain: str, unmentioned: str) -> int | None:
    """1 or 0, or None where the picture is left out: of -1 and None (blank) the options decide."""
    value = picture.labels.get(label)
    if value is None:
        return 0 if unmentioned == "negative" else None
    if value == -1:
        return {"ignore": None, "positive": 1, "negative": 0}[uncertain]
    return value


def only_class(picture: Picture, classes: Sequence[str], exclusive: str = "classes") -> str | None:
    """The one of the classes that is positive, where no other is positive or uncertain.

    With ``exclusive`` "all" no other label may be either, but No Finding: the rule of CheXpert 5x200.
    """
    positive = [name for name in classes if picture.labels.get(name) == 1]
    if len(positive) != 1:
        return None
    others = picture.labels if exclusive == "all" else classes
    free = (positive[0], NO_FINDING)
    return None if any(picture.labels.get(name) for name in others if name not in free) else positive[0]


def has_labels(picture: Picture) -> bool:
    return any(value is not None for value in picture.labels.values())
