"""One update: the micro-batches of every rank, one normalisation of the loss, forward, backward, the optimizer."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from medvlm.data.loader import Batch, load_batches
from medvlm.data.order import digest
from medvlm.data.plan import Draw
from medvlm.errors import UserError
from medvlm.models.trainable import part_config
from medvlm.training import distributed
from medvlm.training.flops import attended_pairs
from medvlm.training.gradients import clip_parts, part_norms
from medvlm.training.schedule import by_part, learning_rates
from medvlm.training.setup import Session


@dataclass
class Counts:
    """Of a step's batches, summed over ranks. ``interrupted`` is the number of ranks that got a signal, ``written`` of
    those whose part of a pending checkpoint is on the disk, ``pairs`` of tokens that attend, by window."""

    supervised: int
    tokens: int
    slots: int
    images: int
    quarantined: int
    interrupted: int
    written: int
    pairs: dict[int | None, int]


def batches_from(session: Session, step: int, last: int) -> Iterator[Batch]:
    """This rank's micro-batches of the steps ``step`` to ``last``, read ahead by the loader's workers."""
    rank, world = distributed.rank(), distributed.world_size()
    micro = session.config.training.micro_batch_size

    def work() -> Iterator[Sequence[Draw]]:
        for packs in session.plan.global_batches(step, last):
            for share in session.plan.share(packs, rank, world, micro, session.accumulation):
                yield [draw for pack in share for draw in pack]

    return load_batches(session.data, work(), session.config.data.workers)


def exchange_counts(
    batches: Sequence[Batch], interrupted: bool, written: bool, windows: Sequence[int | None] = ()
) -> Counts:
    """What a step exchanges before its forward pass: the tokens its loss is divided by, who wants to stop, who has
    written its part of a checkpoint."""
    values = distributed.sum_over_ranks(
        [
            sum(b.supervised_tokens for b in batches),
            sum(b.tokens for b in batches),
            sum(b.input_ids.numel() for b in batches),
            sum(b.pixel_values.shape[0] for b in batches),
            sum(len(b.quarantined) for b in batches),
            float(interrupted),
            float(written),
            *(sum(attended_pairs(b.lengths, window) for b in batches) for window in windows),
        ]
    )
    supervised, tokens, slots, images, quarantined, stops, done, *pairs = map(int, values)
    return Counts(supervised, tokens, slots, images, quarantined, stops, done, dict(zip(windows, pairs, strict=True)))


class Quarantine:
    """Lists the samples that could not be used, and stops the run above ``data.max_quarantined``."""

    def __init__(self, session: Session):
        self.run, self.limit = session.run, session.config.data.max_quarantined
        self.seen = self.quarantined = 0

    def check(self, step: int, batches: Sequence[Batch], counts: Counts, samples: int) -> None:
        rows = [{"step": step + 1, "key": key, "reason": reason} for b in batches for key, reason in b.quarantined]
        if rows:
            with (self.run / f"quarantine-rank{distributed.rank()}.jsonl").open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        self.seen, self.quarantined = self.seen + samples, self.quarantined + counts.quarantined
        # a share of few samples says little, so the first hundred are let pass, unless nothing is left of them
        if self.quarantined > self.limit * max(self.seen, 100) or not counts.supervised:
            raise UserError(
                f"step {step + 1}: {self.quarantined} of {self.seen} samples were quarantined, {counts.supervised} "
                f"supervised tokens are left in this batch; data.max_quarantined is {self.limit}, the "
                f"reasons are in {self.run}/quarantine-rank*.jsonl"
            )


def update(
    session: Session,
    step: int,
    batches: Sequence[Batch],
    counts: Counts,
    keys: Sequence[str],
    phase: Callable[[str], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, Any]:
    """Train on the step's batches; returns loss, gradient norm and learning rates. A NaN loss raises UserError."""
    engine, world, training = session.engine, distributed.world_size(), session.config.training
    device = distributed.device()
    rates = learning_rates(step, session.total, session.rates, training)
    for group, rate in zip(session.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    torch.manual_seed((session.config.run.seed * 1_000_003 + step) * 65_537 + distributed.rank())
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    for n, batch in enumerate(batches):
        with phase("forward"):
            loss = engine(**batch.inputs(device))
        # DeepSpeed divides by the accumulation steps and averages over ranks: undo both, then divide by the
        # global count, so that every supervised token weighs the same.
        with phase("backward"):
            engine.backward(loss * (world * session.accumulation / counts.supervised))
        loss_sum += loss.detach()
        if n + 1 < session.accumulation:
            engine.step()
    mean_loss = distributed.sum_over_ranks([loss_sum.item()])[0] / counts.supervised
    if not math.isfinite(mean_loss):
        some = ", ".join(keys[:8])
        raise UserError(f"step {step + 1}: the loss is {mean_loss}; no update was made; the batch is {some} ...")
    with phase("optimizer"):
        parts = clip_by_part(session)
        grad_norm = _plain_grad_norm(engine) if session.stage == 0 else None
        engine.step()
    return {
        "loss": mean_loss,
        "grad_norm": float(engine.get_global_grad_norm()) if grad_norm is None else grad_norm,
        **({"grad_norms": parts} if parts else {}),
        "lr": by_part(session.rates, rates),
    }


def clip_by_part(session: Session) -> dict[str, float]:
    """The norm of each part's gradient as it came; clips those parts that have a limit. Empty with offload."""
    if session.offload:
        return {}
    norms = part_norms(session.engine, session.owners)
    sections = {part: part_config(session.config.model, part) for part in norms}
    limits = {part: limit for part, section in sections.items() if (limit := section.gradient_clipping)}
    if limits:
        clip_parts(session.engine, session.owners, norms, limits)
    return norms


def record(session: Session, counts: Counts, packs: int, keys: Sequence[str]) -> dict[str, Any]:
    """What a step was made of, for its line in ``metrics.jsonl``."""
    packing = session.plan.packing
    return {
        "tokens": counts.tokens,
        "supervised_tokens": counts.supervised,
        "samples": len(keys),
        "padding_share": 1 - counts.tokens / (packs * packing.tokens if packing else counts.slots),
        "images": counts.images,
        "quarantined": counts.quarantined,
        "batch_digest": digest(keys),
    }


def _plain_grad_norm(engine: Any) -> float:
    """ZeRO-0 in fp32 does not report the norm; its gradients are whole and already averaged here."""
    return float(torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None]))
