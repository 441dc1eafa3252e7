"""One update: the micro-batches of every rank, one normalisation of the loss, forward, backward, the optimizer."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from medvlm.data.loader import load_batches
from medvlm.data.order import digest
from medvlm.data.plan import Draw
from medvlm.models.trainable import part_config
from medvlm.training import distributed
from medvlm.training.boundary import Stop, sum_and_agree
from medvlm.training.families import Pass
from medvlm.training.families.base import Phase
from medvlm.training.flops import attended_pairs
from medvlm.training.gradients import clip_parts, part_norms
from medvlm.training.guard import Guard, Verdict
from medvlm.training.schedule import by_part, learning_rates
from medvlm.training.setup import Session


@dataclass
class Counts:
    """Of a step's batches, summed over ranks. ``written`` is the number of ranks whose part of a pending checkpoint is
    on the disk, ``pairs`` of tokens that attend, by window; ``more`` what the family counts besides."""

    targets: int
    tokens: int
    slots: int
    images: int
    quarantined: int
    written: int
    pairs: dict[int | None, int]
    more: dict[str, int] = field(default_factory=dict)


def batches_from(session: Session, steps: Iterable[int]) -> Iterator[Any]:
    """This rank's micro-batches of the steps, read ahead by the loader's workers."""
    training, workers = session.config.training, session.config.data.workers
    rank, world = distributed.data_place(training.sequence_parallel)

    def work() -> Iterator[Sequence[Draw]]:
        for step in steps:
            packs = session.plan.global_batch_at(step)
            for share in session.plan.share(packs, rank, world, training.micro_batch_size, session.accumulation):
                yield [draw for pack in share for draw in pack]

    return load_batches(session.data, work(), workers, training.collective_timeout / 2)


def exchange_counts(
    batches: Sequence[Any],
    trouble: str | None,
    written: bool,
    windows: Sequence[int | None] = (),
    copies: int = 1,
    more: Sequence[str] = (),
) -> Counts:
    """What a step exchanges before its forward pass: what its loss is divided by, who has trouble or got a signal
    (raises `boundary.Stop`), who has written its part of a checkpoint.

    ``copies`` of every batch are counted: the ranks that share sequences hold the same.
    """
    values = sum_and_agree(
        [
            sum(b.targets for b in batches),
            sum(b.tokens for b in batches),
            sum(b.slots for b in batches),
            sum(b.images for b in batches),
            sum(len(b.quarantined) for b in batches),
            float(written),
            *(sum(getattr(b, name) for b in batches) for name in more),
            *(sum(attended_pairs(b.lengths, window) for b in batches) for window in windows),
        ],
        trouble,
    )
    targets, tokens, slots, images, quarantined, _, *rest = (int(value) // copies for value in values)
    pairs = dict(zip(windows, rest[len(more) :], strict=True))
    return Counts(
        targets, tokens, slots, images, quarantined, int(values[5]), pairs, dict(zip(more, rest, strict=False))
    )


class Quarantine:
    """Lists the samples that could not be used, and stops the run above ``data.max_quarantined``; and those that the
    recipe does not ask for, of which it stops above ``data.pairs.max_left_out``."""

    def __init__(self, session: Session):
        data = session.config.data
        self.run, self.limit, self.most_left_out = session.run, data.max_quarantined, data.pairs.max_left_out
        self.targets, self.batch = session.family.targets.replace("_", " "), session.config.training.global_batch_size
        self.seen = self.quarantined = self.left_out = 0

    def check(self, step: int, batches: Sequence[Any], counts: Counts, samples: int) -> bool:
        """Whether there is something to train on: false where all of the batch is left out, as the few samples that an
        epoch ends with may be. Raises `Stop`."""
        at = {"step": step + 1}
        rows = [{**at, "key": key, "reason": reason} for b in batches for key, reason in b.quarantined]
        rows += [{**at, "key": key, "reason": reason, "left_out": True} for b in batches for key, reason in b.not_taken]
        if rows:
            with (self.run / f"quarantine-rank{distributed.rank()}.jsonl").open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        self.seen, self.quarantined = self.seen + samples, self.quarantined + counts.quarantined
        left_out = counts.more.get("left_out", 0)
        self.left_out += left_out
        reasons = f"the reasons are in {self.run}/quarantine-rank*.jsonl"
        # a share of few samples says little, so the first hundred are let pass, unless nothing is left of them
        few = max(self.seen, 100)
        all_so_far = self.left_out == self.seen and self.seen >= self.batch
        if self.left_out > self.most_left_out * few or all_so_far:
            raise Stop(
                f"step {step + 1}: {self.left_out} of {self.seen} samples have no image or no text such as data.pairs "
                f"asks for, {counts.targets} {self.targets} are left in this batch; data.pairs.max_left_out is "
                f"{self.most_left_out}, {reasons}"
            )
        if self.quarantined > self.limit * few or not (counts.targets or left_out):
            raise Stop(
                f"step {step + 1}: {self.quarantined} of {self.seen} samples were quarantined, {counts.targets} "
                f"{self.targets} are left in this batch; data.max_quarantined is {self.limit}, {reasons}"
            )
        return counts.targets > 0


def update(
    session: Session,
    step: int,
    batches: Sequence[Any],
    counts: Counts,
    guard: Guard,
    phase: Phase = nullcontext,
) -> tuple[dict[str, Any], Verdict | None, list[str]]:
    """Train on the step's batches, unless the guard refuses.

    Returns loss, gradient norm and learning rates; the guard's verdict; and the keys of this rank's batches whose loss
    is not finite.
    """
    engine, world, training = session.engine, distributed.world_size(), session.config.training
    device = distributed.device()
    rates = learning_rates(step, session.total, session.rates, training)
    for group, rate in zip(session.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    seed = ((session.config.run.seed * 1_000_003 + step) * 65_537 + distributed.rank()) % 2**63
    given = Pass(session.config, engine, device, counts.targets, counts.more, world, session.accumulation, seed, phase)
    outcome = session.family.passes(given, batches)
    shares = torch.stack([outcome.share, *outcome.components.values()]).double().tolist()
    mean_loss, *components = distributed.sum_over_ranks(shares)
    with phase("optimizer"):
        parts = {part: value for part, value in clip_by_part(session).items() if math.isfinite(value)}
        known_norm = _plain_grad_norm(engine) if session.stage == 0 else None
        judge = partial(guard.judge, step, mean_loss, outcome.values)
        norm, verdict = session.gate.step(judge, known_norm)
    values: dict[str, Any] = {"loss": mean_loss, "grad_norm": norm, **outcome.values}
    values = {name: value for name, value in values.items() if math.isfinite(value)}  # JSON has no NaN
    values |= {"grad_norms": parts} if parts else {}
    values |= {"losses": dict(zip(outcome.components, components, strict=True))} if components else {}
    values["lr"] = by_part(session.rates, rates)
    if verdict:
        values["spike" if verdict.action == "warn" else "skipped"] = verdict.reason
    if not verdict or verdict.action == "warn":
        guard.history.append((mean_loss, norm))
    suspects = [key for b, finite in zip(batches, outcome.finite, strict=True) if not finite for key in b.keys]
    return values, verdict, suspects


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
        session.family.targets: counts.targets,
        **counts.more,
        "samples": len(keys),
        "padding_share": 1 - counts.tokens / (packs * packing.tokens if packing else counts.slots),
        "images": counts.images,
        "quarantined": counts.quarantined,
        "batch_digest": digest(keys),
    }


def _plain_grad_norm(engine: Any) -> float:
    """ZeRO-0 in fp32 does not report the norm; its gradients are whole and already averaged here."""
    gradients = [p.grad.float() for p in engine.module.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))
