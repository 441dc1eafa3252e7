"""Precision at k of image search by label, as ConVIRT's CheXpert 8x200 has it: queries are images, or texts of a class.

A candidate is right if it is of the query's class. Only images with exactly one of the classes take part.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator

from medvlm.errors import UserError
from medvlm.evaluation.metrics import bootstrap_interval
from medvlm.evaluation.pictures import Picture, described, drawn, has_labels, lazy, load_pictures, only_class
from medvlm.evaluation.prompts import BinarySet, load_prompts
from medvlm.evaluation.retrieval import Joint
from medvlm.evaluation.task import Context, Options, Row, Task

QUERIES = ("image", "text")


class PrecisionOptions(Options):
    k: tuple[int, ...] = (5, 10, 50)
    prompts: str = "chexzero"
    queries_per_class: int = Field(default=10, gt=0)
    images_per_class: int = Field(default=200, gt=0)

    @field_validator("k")
    @classmethod
    def _positive(cls, k: tuple[int, ...]) -> tuple[int, ...]:
        if not k or min(k) < 1:
            raise ValueError("must be positive numbers")
        return tuple(sorted(set(k)))


def load(reader: Any, limit: int | None, seed: int, options: PrecisionOptions) -> list[Picture]:
    load_prompts(options.prompts)
    return load_pictures(reader, limit, seed, views=options.view, wanted=has_labels, missing="no image has labels")


def precision_at(similarity: torch.Tensor, right: torch.Tensor, k: int) -> torch.Tensor:
    """[Q, C] similarities and which candidates are right -> the share of right ones among the k nearest, [Q].

    Of candidates that are equally similar the right ones come last, so that a collapsed model gains nothing by order.
    """
    right = right.double()
    order = right.argsort(dim=1, stable=True)
    nearest = similarity.gather(1, order).argsort(dim=1, descending=True, stable=True)[:, :k]
    return right.gather(1, order).gather(1, nearest).mean(1)


def split(
    pictures: Sequence[Picture],
    classes: Sequence[str],
    options: PrecisionOptions,
    seed: int,
    exclusive: Literal["all", "classes"] = "classes",
) -> tuple[list[tuple[Picture, str]], list[tuple[Picture, str]]]:
    """Queries, each of another patient, and candidates of other patients than these; both with their classes."""
    own: dict[str, list[Picture]] = {name: [] for name in classes}
    for picture in pictures:
        if (name := only_class(picture, classes, exclusive)) is not None:
            own[name].append(picture)
    queries, taken = [], set[str]()
    for name, members in own.items():
        mixed = [members[i] for i in np.random.default_rng([seed, classes.index(name)]).permutation(len(members))]
        # a third of a small class at most, or nothing would be left to find
        most, found = min(options.queries_per_class, len({p.group for p in members}) // 3), 0
        for picture in mixed:
            if found < most and picture.group not in taken:
                taken.add(picture.group)
                queries.append((picture, name))
                found += 1
    candidates = []
    for name, members in own.items():
        free = [p for p in members if p.group not in taken]
        candidates += [(p, name) for p in drawn(free, options.images_per_class, f"{seed}/{name}")]
    return queries, candidates


def evaluate(
    embedder: Joint, pictures: Sequence[Picture], options: PrecisionOptions, context: Context
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Raises UserError for fewer than two classes, or fewer candidates than the largest k."""
    chosen = load_prompts(options.prompts)
    listed = list(chosen.labels if isinstance(chosen, BinarySet) else chosen.classes)
    exclusive = "classes" if isinstance(chosen, BinarySet) else chosen.exclusive
    queries, candidates = split(pictures, listed, options, context.seed, exclusive)
    classes = [n for n in listed if any(q == n for _, q in queries) and any(c == n for _, c in candidates)]
    if len(classes) < 2:
        raise UserError(
            f"--prompts {options.prompts}: {len(classes)} of its labels is the only positive one in images of three "
            "patients (see exclusive in the set); precision at k needs two"
        )
    queries = [item for item in queries if item[1] in classes]
    candidates = [item for item in candidates if item[1] in classes]
    if len(candidates) < max(options.k):
        raise UserError(
            f"--k {max(options.k)}: there are only {len(candidates)} candidates; give a smaller k or more data"
        )
    texts = {
        name: chosen.prompts(name)[0] if isinstance(chosen, BinarySet) else chosen.prompts(name, context.seed)
        for name in classes
    }
    asked = {
        "image": [(f"{p.key}.{p.number}", name) for p, name in queries],
        "text": [(text, name) for name in classes for text in texts[name]],
    }
    of_query = {
        "image": embedder.images(lazy([p for p, _ in queries]), context.batch_size),
        "text": embedder.texts([text for text, _ in asked["text"]], context.batch_size),
    }
    index = embedder.images(lazy([p for p, _ in candidates]), context.batch_size)
    place = torch.tensor([classes.index(name) for _, name in candidates])
    share = np.bincount(place.numpy(), minlength=len(classes)) / len(candidates)
    counts = {name: int((place == i).sum()) for i, name in enumerate(classes)}
    out: dict[str, Any] = {
        **described([p for p, _ in [*queries, *candidates]]),
        "n_candidates": len(candidates),
        "candidates_per_class": counts,
        "classes_left_out": [name for name in listed if name not in classes],
    }
    ci, rows = {}, []
    for kind in QUERIES:
        names = [name for _, name in asked[kind]]
        of = torch.tensor([classes.index(name) for name in names])
        right = of[:, None] == place[None]
        similarity = of_query[kind] @ index.T
        out[f"n_{kind}_queries"] = len(names)
        found = {k: precision_at(similarity, right, k).numpy() for k in options.k}
        for k, values in found.items():
            key = f"{kind}_precision_at_{k}"
            out[key] = float(values.mean())
            out[f"chance_{key}"] = float(share[of.numpy()].mean())
            out[f"best_{key}"] = float(np.mean([min(counts[name], k) / k for name in names]))
            ci[key] = bootstrap_interval(values, None, context.seed)
        for i, (query, name) in enumerate(asked[kind]):
            rows.append(
                {"kind": kind, "query": query, "class": name} | {f"precision_at_{k}": float(found[k][i]) for k in found}
            )
    return {**out, "ci95": ci}, rows


def table(results: dict[str, Any]) -> list[Row]:
    rows = []
    for key, interval in results["ci95"].items():
        kind = key.split("_")[0]
        n = results[f"n_{kind}_queries"]
        rows.append(Row(f"{kind} to image: precision at {key.rsplit('_', 1)[1]}", results[key], interval, n))
        rows.append(Row("  chance", results[f"chance_{key}"], None, n, True))
        if results[f"best_{key}"] < 1:
            rows.append(Row("  at best: a class has fewer than k", results[f"best_{key}"], None, n, True))
    return rows


TASK = Task(load=load, evaluate=evaluate, table=table, options=PrecisionOptions)
