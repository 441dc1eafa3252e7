"""Scores of short answers, as the VQA literature computes them, and their uncertainty.

Sources: the VQAv2 answer normalisation (Antol et al., arXiv 1505.00468, and its evaluation server) and the scoring of
LLaVA-Med v1.0.0 (arXiv 2306.00890, ``llava/eval/eval_metrics``), whose numbers the tests reproduce.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {name: str(i) for i, name in enumerate(_DIGIT_NAMES)}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")  # not the point of 0.5
_DIGIT_COMMA = re.compile(r"\d,\d")
# Written without its apostrophe (or without one of several) each of these is restored, as "dont" to "don't".
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's i'd've i'm i've isn't it'd it'd've it'll ma'am might've mightn't mightn't've
    must've mustn't needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've
    somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
    that's there'd there'd've there're there's they'd they'd've they'll they're they've wasn't we'd've we've weren't
    what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
    why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
_RESTORED = {w[:i] + w[i + 1 :]: w for w in _CONTRACTIONS.split() for i, letter in enumerate(w) if letter == "'"}


def normalize(text: str, articles: bool = False) -> str:
    """Lower case, no punctuation, number words (none, zero .. ten) as digits, no articles, contractions restored.

    A punctuation mark is deleted where the text has it beside a space anywhere (or has a comma inside a number), and
    is a space otherwise ("x-ray" -> "x ray"): VQAv2's rule. ``articles`` keeps them.
    """
    in_number = _DIGIT_COMMA.search(text) is not None
    clean = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        clean = clean.replace(mark, "" if beside_space or in_number else " ")
    words = [_NUMBERS.get(word, word) for word in _PERIOD.sub("", clean).lower().split()]
    return " ".join(_RESTORED.get(word, word) for word in words if articles or word not in _ARTICLES)


def normalize_gold(gold: str) -> str:
    """As `normalize`; but an answer that is an article, as the choice "A" is, stays one."""
    return normalize(gold) or normalize(gold, articles=True)


def _both(answer: str, gold: str) -> tuple[str, str]:
    """Normalised alike: with articles where there is nothing else to look for."""
    wanted = normalize(gold)
    return (normalize(answer), wanted) if wanted else (normalize(answer, True), normalize(gold, True))


def exact_match(answer: str, gold: str) -> bool:
    """The whole normalised answer is the normalised gold answer."""
    said, wanted = _both(answer, gold)
    return said == wanted


def contains(answer: str, gold: str) -> bool:
    """LLaVA-Med's lenient rule: the normalised gold answer is a SUBSTRING of the answer.

    "no" is thus found in "normal" and in "I do not know": comparable with published numbers, not to be trusted alone.
    """
    said, wanted = _both(answer, gold)
    return wanted in said if normalize(gold) else wanted in said.split()


def contains_yes_no(answer: str, gold: str) -> bool:
    """``contains``, and "yes" or "no" occurs in the answer: the rule of LLaVA-Med's ``run_eval.py``."""
    text = normalize(answer)
    return ("yes" in text or "no" in text) and normalize(gold) in text


def polarity(answer: str) -> str | None:
    """ "yes" or "no" if the normalised answer begins with that word, else None."""
    first = normalize(answer).split(" ", 1)[0]
    return first if first in ("yes", "no") else None


class TokenScores(NamedTuple):
    precision: float
    recall: float
    f1: float


def token_scores(answer: str, gold: str) -> TokenScores:
    """Precision, recall and F1 over normalised words as LLaVA-Med has them; recall is the open score of its paper.

    Every occurrence in the answer of a word of the gold answer counts as a true positive; missed gold words count as
    often as they occur. All three are 0 where no word is shared.
    """
    said, wanted = (Counter(text.split()) for text in _both(answer, gold))
    hits = sum(n for word, n in said.items() if word in wanted)
    missed = sum(n for word, n in wanted.items() if word not in said)
    if not hits:
        return TokenScores(0.0, 0.0, 0.0)
    precision, recall = hits / said.total(), hits / (hits + missed)
    return TokenScores(precision, recall, 2 * precision * recall / (precision + recall))


def word_overlap(answer: str, gold: str) -> float:
    """What LLaVA-Med v1.0.0 prints as "exact match" and is not one: distinct gold words found / words in the answer."""
    said, wanted = normalize(answer).split(), set(normalize(gold).split())
    return len(wanted & set(said)) / len(said) if said else 0.0


def bootstrap_interval(
    values: Sequence[float] | np.ndarray, groups: Sequence[str] | None = None, seed: int = 0, resamples: int = 2000
) -> tuple[float, float]:
    """95 % percentile interval of the mean (Efron & Tibshirani 1993).

    With ``groups`` (patients) whole groups are drawn: questions about one image are not independent, and an interval
    that takes them so is too narrow. Raises ValueError without values.
    """
    if not len(values):
        raise ValueError("no values to resample")
    x = np.asarray(values, dtype=np.float64)
    _, member = np.unique(np.asarray(groups), return_inverse=True) if groups is not None else (None, np.arange(len(x)))
    sums, counts = np.bincount(member, weights=x), np.bincount(member)
    random = np.random.default_rng(seed)
    means = np.empty(resamples)
    for i in range(resamples):
        drawn = random.integers(0, len(sums), len(sums))
        means[i] = sums[drawn].sum() / counts[drawn].sum()
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
