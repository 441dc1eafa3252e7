"""The evaluation loss: over validation shards, in the training processes."""

import json
from collections.abc import Iterator

import torch

from medvlm.data.loader import load_batches
from medvlm.data.order import micro_batches
from medvlm.errors import UserError
from medvlm.training import distributed, watch
from medvlm.training.boundary import sum_and_agree
from medvlm.training.feed import make_dataset
from medvlm.training.setup import Session
from medvlm.training.step import read


def is_due(session: Session) -> bool:
    """Whether the weights of this step are to be evaluated."""
    every = session.config.training.evaluate_every
    due = session.step == session.total or bool(every and session.step % every == 0)
    return due and bool(session.config.data.validation)


def was_interrupted(session: Session) -> bool:
    """Whether the step that a run resumes at still lacks its evaluation. All ranks call this."""
    if not is_due(session) or session.step == 0:
        return False
    lacks = False
    if distributed.rank() == 0:
        path = session.run / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []
        lacks = not any(row["step"] == session.step and "eval_loss" in row for row in rows)
    return bool(distributed.sum_over_ranks([lacks])[0])


@torch.no_grad()
def evaluation_loss(session: Session) -> float:
    """Mean loss per supervised token over the validation shards. All ranks call this; may raise `boundary.Stop`."""
    engine, config = session.engine, session.config
    (rank, world), device = distributed.data_place(config.training.sequence_parallel), distributed.device()
    data = make_dataset(config, session.parts, config.data.validation, training=False)
    micro = config.training.micro_batch_size
    numbers = list(range(len(data.reader)))[: (config.training.evaluation_batches or len(data.reader)) * micro * world]
    batches = range(0, len(numbers), micro * world)  # the same number on every rank
    work: Iterator[list[tuple[int, int | None]]]
    work = (
        [(i, None) for i in micro_batches(numbers[b : b + micro * world], rank, world, micro, 1)[0]] for b in batches
    )
    loader = load_batches(data, work, 0)
    engine.eval()
    total, count = 0.0, 0
    try:
        for number in batches:
            watch.enter(f"evaluation, from sample {number}", session.step)
            found, trouble = read(loader, 1)
            sum_and_agree([], trouble)
            total += float(engine(**found[0].inputs(device)))
            count += found[0].supervised_tokens
    finally:
        engine.train()
    total, supervised = sum_and_agree([total, count / config.training.sequence_parallel], None)
    if not supervised:
        raise UserError(f"data.validation: no supervised tokens in {config.data.validation}")
    return total / supervised
