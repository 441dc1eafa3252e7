"""Samples -> questions, and the requests that ask them: with the own, a blank, or another patient's image."""

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

from PIL import Image

from medvlm.data.schema import Sample
from medvlm.errors import UserError
from medvlm.evaluation import metrics
from medvlm.inference.images import decode_image

if TYPE_CHECKING:
    from medvlm.inference.generate import Request

GREY = 127


class Reader(Protocol):
    def __len__(self) -> int: ...
    def sample(self, i: int) -> Sample: ...
    def images(self, i: int) -> list[bytes]: ...


@dataclass(frozen=True)
class Question:
    """``turn`` counts the sample's assistant turns from 0; ``sample_index`` is the sample's place in ``reader``."""

    key: str
    turn: int
    text: str
    gold: str
    answer_type: str
    question_type: str | None
    group: str
    source: str
    synthetic: bool
    n_images: int
    sample_index: int
    reader: Reader

    @property
    def closed(self) -> bool:
        return self.answer_type == "closed"

    def image(self, number: int) -> Image.Image:
        return decode_image(self.reader.images(self.sample_index)[number], f"{self.key}.{number}")


class LazyImages(Sequence):
    """Decodes when looked at, so that an evaluation never holds more pictures than one batch."""

    def __init__(self, loaders: list[Callable[[], Image.Image]]):
        self.loaders = loaders

    def __len__(self) -> int:
        return len(self.loaders)

    def __getitem__(self, i):
        return self.loaders[i]()


def load_questions(reader: Reader, limit: int | None = None, seed: int = 0) -> list[Question]:
    """One question per assistant turn, in the order of the shards; ``limit`` draws that many with ``seed``.

    Without an ``answer_type`` in the data a question is closed iff its gold answer is yes or no. Samples that hold a
    report but no conversation have no questions. Raises UserError where there are none at all.
    """
    questions = []
    for index in range(len(reader)):
        sample = reader.sample(index)
        asked, turn = None, 0
        for message in sample.messages:
            if message.role == "user":
                asked = message.text
            if message.role != "assistant":
                continue
            if asked is None:
                raise UserError(f"{sample.key}: an assistant turn has no user turn before it")
            closed = message.answer_type or ("closed" if metrics.normalize(message.text) in ("yes", "no") else "open")
            questions.append(
                Question(
                    key=sample.key,
                    turn=turn,
                    text=asked,
                    gold=message.text,
                    answer_type=closed,
                    question_type=message.question_type,
                    group=sample.group,
                    source=sample.source,
                    synthetic=sample.synthetic,
                    n_images=len(sample.images),
                    sample_index=index,
                    reader=reader,
                )
            )
            turn += 1
    if not questions or limit == 0:
        raise UserError(f"there are no questions to evaluate in {len(reader)} sample(s): no assistant turns")
    if limit is not None and limit < len(questions):
        chosen = sorted(random.Random(seed).sample(range(len(questions)), limit))
        questions = [questions[i] for i in chosen]
    return questions


Place = tuple[int, int]  # which question to take an image from, and which of its images


def donors(questions: Sequence[Question], seed: int) -> dict[tuple[int, int], Place] | None:
    """For each image (number of its sample, number) the image of ANOTHER group that stands in for it; None if there is
    one group.

    A permutation of all images where no group holds more than half of them. Deterministic in ``seed``; a question
    keeps its number of images, and all questions of a sample see the same stand-ins.
    """
    # not the key: two folders may have the same
    first = {q.sample_index: i for i, q in reversed(list(enumerate(questions))) if q.n_images}
    by_group: dict[str, list[Place]] = defaultdict(list)
    for i in sorted(first.values()):
        by_group[questions[i].group] += [(i, n) for n in range(questions[i].n_images)]
    if len(by_group) < 2:
        return None
    rng = random.Random(seed)
    groups = sorted(by_group)
    rng.shuffle(groups)
    for places in by_group.values():
        rng.shuffle(places)
    # Images lie in a ring, each group in one piece; a turn by the largest group carries every image out of its own.
    ring = [place for group in groups for place in by_group[group]]
    largest = max(map(len, by_group.values()))
    out = {}
    for at, (i, n) in enumerate(ring):
        own = questions[i].group
        stand_in = ring[(at + largest) % len(ring)]
        if questions[stand_in[0]].group == own:  # only where one group holds more than half of the images
            stand_in = rng.choice([place for place in ring if questions[place[0]].group != own])
        out[questions[i].sample_index, n] = stand_in
    return out


def _request(question: Question, loaders: list[Callable[[], Image.Image]]) -> "Request":
    content = [{"type": "image"} for _ in loaders] + [{"type": "text", "text": question.text}]
    return LazyImages(loaders), [{"role": "user", "content": content}]


def own(question: Question) -> "Request":
    return _request(question, [partial(question.image, n) for n in range(question.n_images)])


def blank(question: Question) -> "Request":
    sizes = question.reader.sample(question.sample_index).images
    return _request(question, [partial(Image.new, "L", (s.width, s.height), GREY) for s in sizes])


def shuffled(question: Question, questions: Sequence[Question], places: dict[tuple[int, int], Place]) -> "Request":
    taken = [places[question.sample_index, n] for n in range(question.n_images)]
    return _request(question, [partial(questions[i].image, n) for i, n in taken])
