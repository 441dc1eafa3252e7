"""Weights that do not train: recognised by a digest, so that they need not be written with every checkpoint."""

import hashlib
from collections.abc import Collection
from typing import Any

import torch
from deepspeed import comm
from torch import nn

from medvlm.config.model import Backbone, Model
from medvlm.errors import UserError
from medvlm.models.trainable import part_config, part_parameters
from medvlm.training import distributed
from medvlm.training.checkpoint.folder import full_shape
from medvlm.training.checkpoint.fragments import held
from medvlm.training.checkpoint.stock import stock_name

CHUNK = 2**20  # elements digested at a time


def from_pretrained_folders(model: Any, config: Model, grown: bool) -> set[str]:
    """Frozen parameters that building the model gives again: those of a ``path``, if no checkpoint replaced them.

    ``grown``: the vocabulary was enlarged, with new rows from random numbers, so the embeddings do not count.
    """
    new: set[int] = set()
    if grown:
        for layer in (model.language_model.get_input_embeddings(), model.language_model.get_output_embeddings()):
            new |= {id(p) for p in layer.parameters()}
    return {
        f"{part}.{name}"
        for part in config.PARTS
        if isinstance(found := part_config(config, part), Backbone) and found.path
        for name, p in part_parameters(model, part).items()
        if not (p.requires_grad or id(p) in new or getattr(p, "from_checkpoint", False))
    }


def digests(model: nn.Module, names: Collection[str]) -> dict[str, str]:
    """A digest of some parameters, by part of the model: the same for every number of ranks, stage and precision, and
    with or without adapters on them.

    All ranks call this. Each takes the sum, modulo 2^64, of its elements (rounded to bf16, as 16-bit integers) times a
    number that depends on their place; sums add up over ranks. Finds accidents, not forgeries.
    """
    ordered = sorted(
        ((stock_name(name), p) for name, p in model.named_parameters() if name in names), key=lambda pair: pair[0]
    )
    if not ordered:
        return {}
    alone = not torch.distributed.is_initialized()
    sums = torch.tensor([_weighted_sum(p, writing=not alone) for _, p in ordered])
    if not alone:
        sums = sums.to(distributed.device())
        comm.all_reduce(sums)
    hashes: dict[str, hashlib._Hash] = {}
    for (name, p), value in zip(ordered, sums.tolist(), strict=True):
        found = hashes.setdefault(name.partition(".")[0], hashlib.sha256())
        found.update(f"{name}:{full_shape(p)}:{value}\n".encode())
    return {part: found.hexdigest()[:16] for part, found in hashes.items()}


def _weighted_sum(p: nn.Parameter, *, writing: bool) -> int:
    """Not as a tensor: small ones, kept between large temporary ones, would keep malloc from giving memory back."""
    with held(p, writing=writing) as (start, values):
        total = torch.zeros((), dtype=torch.int64, device=values.device)
        for at in range(0, len(values), CHUNK):
            chunk = values[at : at + CHUNK].to(torch.bfloat16).view(torch.int16).long()
            place = torch.arange(start + at, start + at + len(chunk), device=values.device)
            place *= -7046029254386353131  # odd, near 2^64 over the golden ratio: neighbours differ in all bits
            total += (chunk * ((place ^ (place >> 29)) | 1)).sum()
        return int(total)


def compare(expected: dict[str, str], found: dict[str, str], where: str) -> None:
    """Raise UserError where frozen weights are not those that a checkpoint was trained with."""
    for part, digest in expected.items():
        if found.get(part) != digest:
            raise UserError(
                f"model.{part}.path: gives other weights than {where} was trained with (digest {found.get(part)}, "
                f"expected {digest}); restore them"
            )
