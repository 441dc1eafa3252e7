"""CheXpert's 14 labels from the text of a chest radiograph's report, by rules; ``labeler.yaml`` holds the vocabulary.

The stages are those of the labeler of Irvin et al. 2019 (arXiv:1901.07031): sentences; the mentions of each class, less
look-alikes; of each mention doubt before it, negation, doubt after it, else positive; the aggregate over mentions. That
one reads parse trees, this one the words around a mention, within its clause (as NegEx does, Chapman et al. 2001).
"""

import re
from collections.abc import Iterable, Mapping
from functools import cache, lru_cache
from importlib.resources import files
from typing import Literal, NamedTuple, cast

import yaml

Label = Literal[1, 0, -1] | None
NO_FINDING, DEVICES = "No Finding", "Support Devices"
LABELS = (
    NO_FINDING,
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    DEVICES,
)
OTHER = "other"  # an abnormality of none of the classes
# Sections that say what was asked or done, not what is seen.
CONTEXT = frozenset(["indication", "history", "comparison", "technique", "examination", "clinical information"])
BLANKED = "~"
_FAILURE = re.compile(r"\bchf$|failure$")
_SENTENCE = re.compile(r"(?<=[.?!])\s+|(?<=[a-z)][.?!])(?=[A-Z])|\n\s*\n|\n(?=\s*(?:\d{1,2}[.)]|[-*])\s)")
_NORMAL = re.compile(
    r"\bno (?:\w+ ){0,4}(?:abnormalit|disease|process|finding)"
    r"|\b(?:lungs?|chest)\b[\w ,]*\b(?:clear|normal|unremarkable|negative)\b"
    r"|\b(?:normal|negative|unremarkable|clear) (?:\w+ )?(?:chest|lungs)\b"
)


class Mention(NamedTuple):
    """``value`` 1, 0 or -1 of a class (or of `OTHER`) at characters ``start`` to ``end`` of its cleaned sentence."""

    name: str
    value: int
    start: int
    end: int


class _Class(NamedTuple):
    name: str
    findings: re.Pattern[str] | None
    anatomy: re.Pattern[str] | None
    lookalikes: re.Pattern[str] | None


class _Clause(NamedTuple):
    """A mention at ``start`` to ``end`` of ``text``, in the clause from ``left`` to ``right``."""

    text: str
    left: int
    start: int
    end: int
    right: int


@cache
def _rules() -> tuple[list[_Class], dict[str, re.Pattern[str]]]:
    data = yaml.safe_load((files("medvlm.data") / "labeler.yaml").read_text(encoding="utf-8"))
    classes = [
        _Class(name, *(_alternation(phrases.get(kind)) for kind in ("findings", "anatomy", "not")))
        for name, phrases in data["classes"].items()
    ]
    cues = {name: re.compile(v) if isinstance(v, str) else _alternation(v) for name, v in data["cues"].items()}
    return [*classes, _Class(OTHER, _alternation(data["other"]), None, None)], cast(dict[str, re.Pattern[str]], cues)


def _alternation(phrases: Iterable[str] | None) -> re.Pattern[str] | None:
    if not phrases:
        return None
    # the star of \w* is one already
    stems = (re.sub(r"(?<=[a-z)])(?<!\\w)\*", r"\\w*", phrase) for phrase in phrases)
    return re.compile(rf"\b(?:{'|'.join(stems)})\b")


def label_report(text: str | Mapping[str, str]) -> dict[str, Label]:
    """The 14 labels of a report: 1 positive, 0 negative, -1 uncertain, None not mentioned.

    ``text`` is the report, or its sections by name, of which those in `CONTEXT` are left out. Over the mentions of a
    class, positive outweighs uncertain, which outweighs negative. "No Finding" is 1 where no class but Support Devices
    is positive or uncertain and nothing else abnormal is said, else None, as it is of a text without words.
    """
    if not isinstance(text, str):
        text = "\n\n".join(body for name, body in text.items() if name.lower() not in CONTEXT)
    values: dict[str, int] = {}
    found = sentences(text)
    for sentence in found:
        _aggregate(values, mentions(sentence))
    labels = _labels(values)
    labels[NO_FINDING] = 1 if found and not _abnormal(values) else None
    return labels


def label_sentences(text: str) -> list[tuple[str, dict[str, Label]]]:
    """Each sentence of a text with its own labels.

    "No Finding" is 1 only of a sentence that says something normal (that a class is absent, or that lungs are clear):
    most sentences without a finding, such as "Two views.", say nothing.
    """
    rows = []
    for sentence in sentences(text):
        values: dict[str, int] = {}
        _aggregate(values, mentions(sentence))
        labels = _labels(values)
        says_normal = any(v == 0 for name, v in values.items() if name != DEVICES) or _NORMAL.search(sentence.lower())
        labels[NO_FINDING] = 1 if says_normal and not _abnormal(values) else None
        rows.append((sentence, labels))
    return rows


def _aggregate(values: dict[str, int], found: Iterable[Mention]) -> None:
    rank = (0, -1, 1)  # of two values the later one stays
    for m in found:
        values[m.name] = max(values.get(m.name, 0), m.value, key=rank.index)


def _labels(values: Mapping[str, int]) -> dict[str, Label]:
    return {name: cast(Label, values.get(name)) for name in LABELS}


def _abnormal(values: Mapping[str, int]) -> bool:
    return any(value for name, value in values.items() if name != DEVICES)


def sentences(text: str) -> list[str]:
    """The sentences of a report that hold a letter. Wrapped lines are joined; blank lines and list entries divide."""
    pieces = (" ".join(piece.split()) for piece in _SENTENCE.split(text))
    return [piece for piece in pieces if any(map(str.isalpha, piece))]


@lru_cache(maxsize=1 << 16)  # reports share most of their sentences
def mentions(sentence: str) -> tuple[Mention, ...]:
    """What one sentence says of each class, in the order of the classes; `OTHER` comes last."""
    classes, cues = _rules()
    text = re.sub(r"\br/o\b", "rule out", sentence.lower()).replace("and/or", "or")
    text = re.sub(r"(?<=[a-z])/(?=[a-z])", " or ", text)
    text = re.sub(r"\bunlikely that there (?:is|are)\b", "unlikely to be", text)
    text = cues["harmless"].sub(lambda m: BLANKED * len(m[0]), text)
    ends = [(0, 0), *(m.span() for m in cues["clause_end"].finditer(text)), (len(text), len(text))]
    found: list[Mention] = []
    for entry in classes:
        taken = [m.span() for m in entry.lookalikes.finditer(text)] if entry.lookalikes else []
        for pattern, value_of in ((entry.findings, _finding), (entry.anatomy, _anatomy)):
            for m in pattern.finditer(text) if pattern else ():
                start, end = m.span()
                if any(s < end and start < e for s, e in taken):
                    continue
                left = max(e for _, e in ends if e <= start)
                right = min(s for s, _ in ends if s >= end)
                value = value_of(_Clause(text, left, start, end, right), cues)
                if value is None:
                    continue
                taken.append((start, end))
                found.append(Mention(entry.name, value, start, end))
                if value and entry.name == "Edema" and _FAILURE.search(m[0]):
                    found.append(Mention("Cardiomegaly", -1, start, end))
    return tuple(found)


def _finding(c: _Clause, cues: Mapping[str, re.Pattern[str]]) -> int:
    before, after = c.text[c.left : c.start], c.text[c.end : c.right]
    if cues["not_excluded"].search(before) or cues["not_excluded"].search(after):
        return -1
    verb = cues["verb"].search(after)
    if _reaches("negation", before, cues) or cues["none_after"].search(after):
        return 0
    if verb and cues["negation_after"].match(after, verb.end() + 1):
        return 0
    if _reaches("doubt", before, cues) or cues["doubt_after"].search(after):
        return -1
    alternative = cues["or_before"].search(before) or cues["or_after"].search(after)
    return -1 if alternative and BLANKED not in before else 1  # "no change in A or B" has both


def _reaches(cue: str, before: str, cues: Mapping[str, re.Pattern[str]]) -> bool:
    """Whether the last cue in what stands before a mention reaches it, without a finite verb in between."""
    *_, last = [None, *cues[cue].finditer(before)]
    return last is not None and not cues["verb"].search(before, last.end())


def _anatomy(c: _Clause, cues: Mapping[str, re.Pattern[str]]) -> int | None:
    """What the word of state nearest to a part says of it; None where there is none, or none that tells."""
    nearest: tuple[int, int, str, int] | None = None
    for kind in ("normal", "abnormal", "borderline", "unknown"):
        for m in cues[kind].finditer(c.text, c.left, c.right):
            between = c.text[m.end() : c.start]
            if m.start() >= c.end:
                distance = m.start() - c.end
            elif m.end() <= c.start and "," not in between and not cues["verb"].search(between):
                distance = len(between)
            else:
                continue
            candidate = (distance, -len(m[0]), kind, m.start())
            nearest = min(nearest or candidate, candidate)
    if nearest is None or nearest[2] == "unknown":
        return None
    if nearest[2] != "abnormal":
        return 0 if nearest[2] == "normal" else -1
    place = nearest[3]  # the word of state is negated or doubted as a finding is
    return _finding(c._replace(start=place, end=place, right=c.right if place >= c.end else c.start), cues)
