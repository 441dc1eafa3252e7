"""Retrieval of reports by images and of images by reports: recall at k, median rank, mean reciprocal rank."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
from PIL import Image
from pydantic import field_validator
from torch import Tensor

from medvlm.errors import UserError
from medvlm.evaluation import intervals, metrics
from medvlm.evaluation.pictures import SECTIONS, Picture, described, lazy, load_pictures
from medvlm.evaluation.task import Context, Options, Row, Task
from medvlm.measures import retrieval as measures

DIRECTIONS = ("image_to_text", "text_to_image")


class Joint(Protocol):
    """What a task asks of :class:`medvlm.inference.embed.Embedder`."""

    def images(self, images: Sequence[Image.Image], batch_size: int = ..., *, normalized: bool = ...) -> Tensor: ...
    def texts(self, texts: Sequence[str], batch_size: int = ..., *, normalized: bool = ...) -> Tensor: ...


class RetrievalOptions(Options):
    k: tuple[int, ...] = measures.KS
    section: tuple[str, ...] = SECTIONS
    other_patients: bool = False  # leave out what is of the query's patient and not right

    @field_validator("k")
    @classmethod
    def _positive(cls, k: tuple[int, ...]) -> tuple[int, ...]:
        if not k or min(k) < 1:
            raise ValueError("must be positive numbers")
        return tuple(sorted(set(k)))


def load(reader: Any, limit: int | None, seed: int, options: RetrievalOptions) -> list[Picture]:
    return load_pictures(
        reader,
        limit,
        seed,
        sections=options.section,
        views=options.view,
        wanted=lambda picture: picture.text is not None,
        missing=f"no image has a report with {' or '.join(options.section)}",
    )


def evaluate(
    embedder: Joint, pictures: Sequence[Picture], options: RetrievalOptions, context: Context
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Each image searches all reports (one per sample) and each report all images; equal reports are one answer.

    Raises UserError if there are fewer candidates than the largest k.
    """
    first = {p.key: p for p in reversed(pictures)}
    studies = [p for p in pictures if first[p.key] is p]  # a sample with several images has one report
    texts = [p.text or "" for p in studies]
    unique = list(dict.fromkeys(texts))
    if len(studies) < max(options.k):
        raise UserError(f"--k {max(options.k)}: there are only {len(studies)} report(s); give a smaller k or more data")
    images = embedder.images(lazy(pictures), context.batch_size)
    place = {text: i for i, text in enumerate(unique)}
    text = embedder.texts(unique, context.batch_size)[[place[t] for t in texts]]
    out: dict[str, Any] = {
        **described(pictures),
        "n_image_to_text": len(pictures),
        "n_text_to_image": len(studies),
        "n_texts": len(studies),
        "n_unique_texts": len(unique),
    }
    ci: dict[str, Any] = {}
    rows = []
    sides = ((images, pictures), (text, studies))
    for name, (query, asked), (candidate, offered) in zip(DIRECTIONS, sides, sides[::-1], strict=True):
        groups, wanted = [p.text for p in asked], [p.text for p in offered]
        patients = ([p.group for p in asked], [p.group for p in offered]) if options.other_patients else None
        ranks = measures.embedding_ranks(query, candidate, groups, wanted, patients)
        scores = measures.summary(ranks, measures.chance_ranks(groups, wanted, patients), options.k)
        out |= {f"{name}_{key}": value for key, value in scores.items()}
        owners = [p.group for p in asked]
        for k in options.k:
            ci[f"{name}_recall_at_{k}"] = metrics.bootstrap_interval(ranks <= k, owners, context.seed)
        ci[f"{name}_mrr"] = metrics.bootstrap_interval(1 / ranks, owners, context.seed)
        ci[f"{name}_median_rank"] = intervals.resampled(partial(_median, ranks), owners, context.seed)
        rows += [{"direction": name, **p.named, "rank": int(r)} for p, r in zip(asked, ranks, strict=True)]
    return {**out, "ci95": ci}, rows


def _median(ranks: np.ndarray, rows: np.ndarray) -> float:
    return float(np.median(ranks[rows]))


def table(results: dict[str, Any]) -> list[Row]:
    rows = []
    for name in DIRECTIONS:
        title, n = name.replace("_", " "), results[f"n_{name}"]
        measured = [key.removeprefix(f"{name}_") for key in results["ci95"] if key.startswith(f"{name}_")]
        for key in measured:
            number = key in ("median_rank", "mrr")
            full = f"{name}_{key}"
            rows.append(
                Row(f"{title}: {key.replace('_', ' ')}", results[full], results["ci95"][full], n, False, number)
            )
            rows.append(Row("  chance", results[f"{name}_chance_{key}"], None, n, True, number))
    counts = (
        ("reports", "n_texts"),
        ("  unique", "n_unique_texts"),
    )
    return rows + [Row(label, results[key], None, results["n_texts"], number=True) for label, key in counts]


TASK = Task(load=load, evaluate=evaluate, table=table, options=RetrievalOptions)
