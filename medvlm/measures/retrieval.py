"""Retrieval of paired images and texts: ranks, recall at k, median rank, mean reciprocal rank; and their chance levels.

Equal texts are one answer: every item of the query's group (its text) is a hit, since no image tells two identical
normal reports apart. The rank of a query is the place of its best hit. A tie counts against the query, so that a
collapsed model, for which everything is equally similar, finds nothing.
"""

from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np
import torch
from torch import Tensor

from medvlm.errors import UserError
from medvlm.measures.embedding_space import CHUNK, directions

Groups = Sequence[Hashable]
KS = (1, 5, 10)


def numbered(*columns: Groups) -> list[Tensor]:
    """Groups of any kind -> int64 tensors, equal where the groups are, in one numbering for all columns."""
    number: dict[Hashable, int] = {}
    return [torch.tensor([number.setdefault(group, len(number)) for group in column]) for column in columns]


def ranks(
    similarity: Tensor, query_groups: Groups, groups: Groups, patients: tuple[Groups, Groups] | None = None
) -> np.ndarray:
    """[Q, C] similarities of queries and candidates -> the rank of each query [Q], from 1.

    1 + the number of candidates of other groups that are at least as similar as the best one of the query's group.
    With the ``patients`` of queries and candidates, a candidate of the same patient and another group is left out.
    Raises UserError for NaN, or for a query without any candidate of its group.
    """
    wanted, offered = numbered(query_groups, groups)
    if similarity.shape != (len(wanted), len(offered)):
        raise ValueError(f"{tuple(similarity.shape)} similarities of {len(wanted)} queries, {len(offered)} candidates")
    owners = numbered(*patients) if patients else None
    found = []
    for start in range(0, len(wanted), CHUNK):
        rows = slice(start, start + CHUNK)
        own = (owners[0][rows], owners[1]) if owners else None
        found.append(_ranks(similarity[rows].detach().cpu(), wanted[rows], offered, own, start))
    return torch.cat(found).numpy()


def embedding_ranks(
    queries: Tensor,
    candidates: Tensor,
    query_groups: Groups,
    groups: Groups,
    patients: tuple[Groups, Groups] | None = None,
) -> np.ndarray:
    """As :func:`ranks`, by cosine of queries [Q, D] and candidates [C, D]; no [Q, C] matrix is ever whole."""
    wanted, offered = numbered(query_groups, groups)
    owners = numbered(*patients) if patients else None
    queries, candidates = directions(queries), directions(candidates)
    if (len(queries), len(candidates)) != (len(wanted), len(offered)):
        raise ValueError(f"{len(queries)} queries in {len(wanted)} groups, {len(candidates)} in {len(offered)}")
    found = []
    for start in range(0, len(wanted), CHUNK):
        rows = slice(start, start + CHUNK)
        own = (owners[0][rows], owners[1]) if owners else None
        found.append(_ranks((queries[rows] @ candidates.T).cpu(), wanted[rows], offered, own, start))
    return torch.cat(found).numpy()


def _ranks(
    similarity: Tensor, wanted: Tensor, offered: Tensor, owners: tuple[Tensor, Tensor] | None, first: int
) -> Tensor:
    if bool(similarity.isnan().any()):
        raise UserError(f"similarities of query {first + int(similarity.isnan().any(1).nonzero()[0])} hold NaN")
    hit = wanted[:, None] == offered[None]
    if not bool(hit.any(1).all()):
        raise UserError(f"query {first + int((~hit.any(1)).nonzero()[0])} has no candidate that would be right")
    best = similarity.masked_fill(~hit, -torch.inf).amax(1, keepdim=True)
    rival = ~hit if owners is None else ~hit & (owners[0][:, None] != owners[1][None])
    return 1 + (rival & (similarity >= best)).sum(1)


def recall_at(found: np.ndarray, k: int) -> float:
    """The share of ranks that are at most k."""
    return float((found <= k).mean())


def mean_reciprocal_rank(found: np.ndarray) -> float:
    return float((1 / found).mean())


def chance_ranks(query_groups: Groups, groups: Groups, patients: tuple[Groups, Groups] | None = None) -> np.ndarray:
    """The probability of each rank 1 .. C for a random order of the candidates, averaged over the queries: [C].

    ``patients`` as of :func:`ranks`: a query has fewer candidates by those that are left out. With m hits among n the
    first k are all wrong with probability (n - m)! (n - k)! / (n! (n - m - k)!).
    """
    sizes, left_out = Counter(groups), [0] * len(query_groups)
    if patients:
        of_patient, of_both = Counter(patients[1]), Counter(zip(patients[1], groups, strict=True))
        asked = zip(patients[0], query_groups, strict=True)
        left_out = [of_patient[patient] - of_both[patient, group] for patient, group in asked]
    kinds = Counter((sizes[group], len(groups) - less) for group, less in zip(query_groups, left_out, strict=True))
    later = np.zeros(len(groups) + 1)  # probability that the rank is above k = 0 .. C
    for (hits, total), count in kinds.items():
        steps = (total - hits - np.arange(total)).clip(0) / (total - np.arange(total))
        later[: total + 1] += count / len(query_groups) * np.concatenate([[1.0], np.cumprod(steps)])
    return later[:-1] - later[1:]


def summary(found: np.ndarray, chance: np.ndarray, ks: Sequence[int] = KS) -> dict[str, float]:
    """Ranks [Q] and the probability of each by chance [C] -> recall_at_k, median_rank, mrr, each with chance_ before.

    Raises UserError where k exceeds the number of candidates.
    """
    if max(ks) > len(chance):
        raise UserError(f"recall at {max(ks)} needs at least {max(ks)} candidates; there are {len(chance)}")
    out = {f"recall_at_{k}": recall_at(found, k) for k in ks}
    out |= {"median_rank": float(np.median(found)), "mrr": mean_reciprocal_rank(found)}
    out |= {f"chance_recall_at_{k}": float(chance[:k].sum()) for k in ks}
    out["chance_median_rank"] = float(np.searchsorted(np.cumsum(chance), 0.5 - 1e-9) + 1)
    out["chance_mrr"] = float((chance / np.arange(1, len(chance) + 1)).sum())
    return out


def retrieval_metrics(
    similarity: Tensor, image_groups: Groups, text_groups: Groups, ks: Sequence[int] = KS
) -> dict[str, float]:
    """[I, T] similarities, and the text that each image and each text belongs to -> all measures, both ways.

    Keys begin with ``image_to_text_`` or ``text_to_image_``; ``n_images``, ``n_texts`` and ``n_unique_texts`` beside.
    """
    out = {"n_images": float(len(image_groups)), "n_texts": float(len(text_groups))}
    out["n_unique_texts"] = float(len(set(text_groups)))
    for name, matrix, queries, candidates in (
        ("image_to_text", similarity, image_groups, text_groups),
        ("text_to_image", similarity.T, text_groups, image_groups),
    ):
        scores = summary(ranks(matrix, queries, candidates), chance_ranks(queries, candidates), ks)
        out |= {f"{name}_{key}": value for key, value in scores.items()}
    return out
