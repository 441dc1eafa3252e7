"""The evaluation loss: over validation shards, in the training processes."""

from collections.abc import Iterator

import torch

from medvlm.data.loader import load_batches
from medvlm.data.order import micro_batches
from medvlm.errors import UserError
from medvlm.training import distributed
from medvlm.training.feed import make_dataset
from medvlm.training.setup import Session


@torch.no_grad()
def evaluation_loss(session: Session) -> float:
    """Mean loss per supervised token over the validation shards. All ranks call this."""
    engine, config = session.engine, session.config
    rank, world, device = distributed.rank(), distributed.world_size(), distributed.device()
    data = make_dataset(config, session.parts, config.data.validation, training=False)
    micro = config.training.micro_batch_size
    numbers = list(range(len(data.reader)))[: (config.training.evaluation_batches or len(data.reader)) * micro * world]
    batches = range(0, len(numbers), micro * world)  # the same number on every rank
    work: Iterator[list[tuple[int, int | None]]]
    work = (
        [(i, None) for i in micro_batches(numbers[b : b + micro * world], rank, world, micro, 1)[0]] for b in batches
    )
    engine.eval()
    total, count = 0.0, 0
    for batch in load_batches(data, work, 0):
        total += float(engine(**batch.inputs(device)))
        count += batch.supervised_tokens
    engine.train()
    total, supervised = distributed.sum_over_ranks([total, count])
    if not supervised:
        raise UserError(f"data.validation: no supervised tokens in {config.data.validation}")
    return total / supervised
