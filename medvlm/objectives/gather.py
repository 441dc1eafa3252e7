"""What the contrastive losses share: the rows of all ranks, and the similarity matrix a few rows at a time.

Every rank passes the rows it has and gets its share of a loss over the global batch: the shares of all ranks add up to
the loss of one rank that holds everything, and so do their gradients, since these flow back through the gather. Ranks
may have different numbers of rows.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

CHUNK = 2**24  # of the similarity matrix's entries are in memory at a time: 64 MiB in fp32


def row_counts(rows: Tensor) -> list[int]:
    """How many each rank has."""
    count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.empty_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    return torch.cat(counts).tolist()


def gather_rows(rows: Tensor) -> tuple[Tensor, int]:
    """[b, ...] of each rank -> [B, ...] in the order of ranks, with gradient, and where this rank's rows begin."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows, 0
    rank, sizes = dist.get_rank(), row_counts(rows)
    filled = pad(rows, [0, 0] * (rows.dim() - 1) + [0, max(sizes) - len(rows)]).contiguous()
    every = all_gather(filled)  # type: ignore[no-untyped-call]
    return torch.cat([part[:size] for part, size in zip(every, sizes, strict=True)]), sum(sizes[:rank])


def sum_over_rows(loss: Callable[..., Tensor], columns: int, *rows: Tensor) -> Tensor:
    """The sum [] of ``loss`` over chunks of ``rows``, tensors of [b, ...], for a [b, ``columns``] matrix that it makes.

    Where that has more than CHUNK entries, it is made chunk by chunk, and again in the backward pass.
    """
    size = max(1, CHUNK // max(1, columns))
    if len(rows[0]) <= size:
        return loss(*rows)
    chunks = zip(*(tensor.split(size) for tensor in rows), strict=True)
    parts = [checkpoint(loss, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    return torch.stack(parts).sum()
