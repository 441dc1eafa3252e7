"""Words of a text altered as by EDA (Wei & Zou, arXiv 1901.11196), with the amounts of textaugment."""

import random
import re
from collections.abc import Callable, Sequence

FUNCTION_WORDS = """
a about above after again all also am an and any are as at be because been before being below between both but by can
could did do does for from further had has have he her here him his how i if in into is it its may me more most my of
off on once only or other our out over own same she should so some such than that the their them then there these they
this those through to too under until up very was we were what when where which while who will with would you
"""
# Which side a finding is on, and whether it is there.
TELLING_WORDS = "left right no not nor none non without never absent negative free"
KEPT = frozenset(f"{FUNCTION_WORDS} {TELLING_WORDS}".split())  # not exchanged: WordNet has "a" for angstrom
WORD = re.compile(r"(?<!\w)[A-Za-z]{3,}(?:-[A-Za-z]+)*(?!\w)")  # no "L", "PA", "T2" and "5cm", which are names or units


def alter_words(text: str, rng: random.Random, synonyms: Callable[[str], list[str]] | None = None) -> str:
    """Two words swapped; or each left out with probability 0.1, but for one; or, given ``synonyms`` of a word, one
    exchanged for one of its own: by equal chance. EDA's fourth operation, to insert a synonym, is not among them, nor
    is it in MedCLIP's code."""
    words = text.split()
    if len(words) < 2:
        return text
    operation = rng.randrange(3 if synonyms else 2)
    if operation == 0:
        a, b = rng.sample(range(len(words)), 2)
        words[a], words[b] = words[b], words[a]
    elif operation == 1:
        words = [word for word in words if rng.random() >= 0.1] or [rng.choice(words)]
    elif synonyms:
        words = exchange(words, rng, synonyms)
    return " ".join(words)


def exchange(words: Sequence[str], rng: random.Random, synonyms: Callable[[str], list[str]]) -> list[str]:
    """The first word, in a random order, that has synonyms, wherever it stands; capitals and punctuation stay."""
    found = [WORD.search(word) for word in words]
    candidates = sorted({match[0].lower() for match in found if match} - KEPT)
    for chosen in rng.sample(candidates, len(candidates)):
        if others := synonyms(chosen):
            other = rng.choice(others)
            return [_put(word, match, chosen, other) for word, match in zip(words, found, strict=True)]
    return list(words)


def _put(word: str, match: re.Match[str] | None, chosen: str, other: str) -> str:
    if not match or match[0].lower() != chosen:
        return word
    spelt = other[:1].upper() + other[1:] if match[0][0].isupper() else other
    return word[: match.start()] + spelt + word[match.end() :]
