"""What a dual encoder reads of a sample: sections or captions, whole or a sentence of them, and its masked tokens."""

import random
import re
from collections.abc import Sequence
from typing import Any

from medvlm.data.conversation import IGNORE
from medvlm.data.phi import sentences
from medvlm.data.schema import DEIDENTIFICATION_MASK, Sample
from medvlm.errors import UserError

ANSWERS = "answers"
_LIST_MARK = re.compile(r"^(?:\d{1,2}[.)]|[-*•])\s+")


def section_sentences(sample: Sample, sections: Sequence[str]) -> list[list[str]]:
    """The sentences of each section that the sample has, in the order asked, white space joined.

    ``answers`` stands for the conversation's assistant turns. Sentences that hold ``___`` are left out: a model must
    not learn the mask.
    """
    texts = [
        "\n\n".join(m.text for m in sample.messages if m.role == "assistant")
        if name == ANSWERS
        else sample.report.get(name, "")
        for name in sections
    ]
    found = [[" ".join(s.split()) for s in sentences(text) if DEIDENTIFICATION_MASK not in s] for text in texts]
    # a list number whose sentence went is no text
    return [kept for section in found if (kept := [s for s in section if any(map(str.isalpha, s))])]


def choose_text(
    sections: Sequence[Sequence[str]], *, sentence: bool, shuffle: bool, min_words: int, rng: random.Random | None
) -> str | None:
    """The whole text, or one sentence of it; None where it has fewer than ``min_words`` words.

    ``rng`` draws the sentence and the order of sentences within each section; without one it is the first sentence, and
    the order of the report. What is moved or drawn loses its list number.
    """
    if sentence:
        every = [_LIST_MARK.sub("", s) for section in sections for s in section]
        fit = [s for s in every if len(s.split()) >= min_words]
        return (rng.choice(fit) if rng else fit[0]) if fit else None
    if shuffle and rng:
        sections = [[_LIST_MARK.sub("", s) for s in section] for section in sections]
        sections = [rng.sample(section, len(section)) for section in sections]
    text = " ".join(s for section in sections for s in section)
    return text if len(text.split()) >= min_words else None


class TextEncoder:
    """Text -> token ids with the tokenizer's special tokens, cut to ``max_length``, and BERT's masked copy of them.

    Raises UserError for a slow tokenizer, and, where ``masking`` (the probability that a token is to be predicted) is
    given, for one without a mask token.
    """

    image_id: int | None = None  # a text of its own holds no images
    image_tokens = 0

    def __init__(self, tokenizer: Any, max_length: int, masking: float | None = None):
        self.tokenizer, self.max_length, self.masking = tokenizer, max_length, masking
        self.special = set(tokenizer.all_special_ids)
        if not tokenizer.is_fast:
            raise UserError(f"{tokenizer.name_or_path}: medvlm needs a fast tokenizer")
        if tokenizer.pad_token_id is None:
            raise UserError(f"{tokenizer.name_or_path}: the tokenizer has no padding token, and texts are padded")
        if max_length < 2 + tokenizer.num_special_tokens_to_add():
            raise UserError(f"data.max_length: {max_length} leaves no room beside the tokenizer's special tokens")
        if masking is not None and tokenizer.mask_token_id is None:
            raise UserError(
                f"objective.masked_language_modeling: {tokenizer.name_or_path} has no mask token; take another "
                "tokenizer or leave this loss out"
            )

    def __call__(self, text: str) -> tuple[list[int], bool]:
        """ids, and whether the text was cut; the special token at the end is kept."""
        ids = self.tokenizer(text, verbose=False)["input_ids"]
        if len(ids) <= self.max_length:
            return ids, False
        return self.tokenizer(text, truncation=True, max_length=self.max_length)["input_ids"], True

    def mask(self, ids: Sequence[int], rng: random.Random) -> tuple[list[int], list[int]]:
        """ids with masks, and labels (-100 where nothing is to be predicted), as in BERT (arXiv 1810.04805, 3.1).

        Each token that is not special is chosen with the probability; at least one is. Of the chosen 80 % become
        the mask token, 10 % any other token that is not special, 10 % stay.
        """
        assert self.masking is not None
        places = [n for n, token in enumerate(ids) if token not in self.special]
        chosen = [n for n in places if rng.random() < self.masking]
        if not chosen and places:
            chosen = [rng.choice(places)]
        masked, labels = list(ids), [IGNORE] * len(ids)
        for n in chosen:
            labels[n] = ids[n]
            draw = rng.random()
            if draw < 0.8:
                masked[n] = self.tokenizer.mask_token_id
            elif draw < 0.9:
                masked[n] = self._random_token(rng)
        return masked, labels

    def _random_token(self, rng: random.Random) -> int:
        while (token := rng.randrange(len(self.tokenizer))) in self.special:
            pass
        return token
