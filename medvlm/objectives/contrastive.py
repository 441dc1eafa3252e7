"""Contrastive losses over the global batch: InfoNCE (CLIP, ConVIRT), sigmoid (SigLIP), semantic matching (MedCLIP).

Every rank passes the rows it has and gets its share of the loss: the shares of all ranks add up to the loss of one rank
that holds everything, and so do their gradients, since these flow back through the gather. A rank computes its own rows
of the similarity matrix, [b, B] for its b of the B pairs, never the whole. Ranks may have different numbers of rows.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather
from torch.nn.functional import cross_entropy, log_softmax, logsigmoid, normalize, pad, softmax


def gather_rows(rows: Tensor) -> tuple[Tensor, int]:
    """[b, ...] of each rank -> [B, ...] in the order of ranks, with gradient, and where this rank's rows begin."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows, 0
    world, rank = dist.get_world_size(), dist.get_rank()
    count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.empty_like(count) for _ in range(world)]
    dist.all_gather(counts, count)
    sizes = [int(c) for c in counts]
    filled = pad(rows, [0, 0] * (rows.dim() - 1) + [0, max(sizes) - len(rows)]).contiguous()
    every = all_gather(filled)  # type: ignore[no-untyped-call]
    return torch.cat([part[:size] for part, size in zip(every, sizes, strict=True)]), sum(sizes[:rank])


def info_nce(image: Tensor, text: Tensor, scale: Tensor | float, image_weight: float = 0.5) -> Tensor:
    """This rank's share of the mean over pairs of w l(image -> text) + (1 - w) l(text -> image).

    image, text [b, D], normalised here; ``scale`` multiplies the cosines (it is 1/tau). With w = 0.5 it is CLIP's loss
    (arXiv 2103.00020, figure 3), with w = lambda ConVIRT's (arXiv 2010.00747).
    """
    image, text = normalize(image, dim=-1), normalize(text, dim=-1)
    (images, first), (texts, _) = gather_rows(image), gather_rows(text)
    target = first + torch.arange(len(image), device=image.device)
    to_text = cross_entropy(scale * image @ texts.T, target, reduction="sum")
    to_image = cross_entropy(scale * text @ images.T, target, reduction="sum")
    return (image_weight * to_text + (1 - image_weight) * to_image) / len(images)


def sigmoid(image: Tensor, text: Tensor, scale: Tensor | float, bias: Tensor | float) -> Tensor:
    """This rank's share of SigLIP's loss (arXiv 2303.15343): every pair of an image and a text is a binary
    problem, and the sum over all B x B is divided by B."""
    image, text = normalize(image, dim=-1), normalize(text, dim=-1)
    texts, first = gather_rows(text)
    logits = scale * image @ texts.T + bias
    here = torch.arange(len(image), device=image.device)
    sign = torch.full_like(logits, -1.0)
    sign[here, first + here] = 1.0
    return -logsigmoid(sign * logits).sum() / len(texts)


def semantic_matching(
    image: Tensor,
    text: Tensor,
    image_labels: Tensor,
    text_labels: Tensor,
    scale: Tensor | float,
    similarity: str = "cosine",
) -> Tensor:
    """This rank's share of MedCLIP's loss (arXiv 2210.10163) of unpaired images [b, D] and texts [c, D].

    The target of an image is the softmax of its labels' similarity [b, L] with all texts' [C, L], and the reverse;
    cross-entropies against these are averaged over images, over texts, and over the two. ``similarity`` is ``cosine``,
    as in the paper, or ``dot``, as in the released code.
    """
    if similarity not in ("cosine", "dot"):
        raise ValueError(f"similarity must be 'cosine' or 'dot', not {similarity!r}")
    image, text = normalize(image, dim=-1), normalize(text, dim=-1)
    if similarity == "cosine":
        image_labels, text_labels = normalize(image_labels.float(), dim=-1), normalize(text_labels.float(), dim=-1)
    (images, _), (texts, _) = gather_rows(image), gather_rows(text)
    (all_image_labels, _), (all_text_labels, _) = gather_rows(image_labels.float()), gather_rows(text_labels.float())
    total = image.new_zeros(())
    for mine, others, labels, other_labels, count in (
        (image, texts, image_labels, all_text_labels, len(images)),
        (text, images, text_labels, all_image_labels, len(texts)),
    ):
        target = softmax(labels.float() @ other_labels.T, dim=-1)
        total = total - (target * log_softmax(scale * mine @ others.T, dim=-1)).sum() / (2 * count)
    return total
