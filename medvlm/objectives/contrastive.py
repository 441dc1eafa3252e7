"""The symmetric InfoNCE loss of CLIP (arXiv 2103.00020, figure 3) over the global batch."""

import torch
from torch import Tensor
from torch.distributed.nn.functional import all_gather


def clip_loss(image: Tensor, text: Tensor, scale: Tensor, *, gather: bool = False) -> Tensor:
    """image, text [B, D] (normalised here), scale [1] multiplies the cosines; the mean over the pairs, both ways.

    With ``gather`` the B pairs of every rank make the batch, and gradients flow back through the gather: averaged
    over ranks, as data parallelism does, they are those of one rank holding everything.
    """
    image, text = (torch.nn.functional.normalize(x, dim=-1) for x in (image, text))
    if gather:
        image, text = (torch.cat(all_gather(x.contiguous())) for x in (image, text))  # type: ignore[no-untyped-call]
    logits = scale * image @ text.T
    target = torch.arange(len(logits), device=logits.device)
    cross_entropy = torch.nn.functional.cross_entropy
    return 0.5 * (cross_entropy(logits, target) + cross_entropy(logits.T, target))
