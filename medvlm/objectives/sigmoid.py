"""SigLIP's loss: whether an image and a text belong together, for all pairs of the global batch."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from medvlm.objectives.gather import gather_rows, sum_over_rows


def sigmoid(image: Tensor, text: Tensor, scale: Tensor | float, bias: Tensor | float) -> Tensor:
    """This rank's share of SigLIP's loss (arXiv 2303.15343, algorithm 1): every pair of an image and a text is a binary
    problem with logit ``scale`` x cosine + ``bias``, and the sum over all B x B is divided by B.

    image, text [b, D], normalised here.
    """
    image, text = normalize(image, dim=-1), normalize(text, dim=-1)
    texts, first = gather_rows(text)
    own = first + torch.arange(len(image), device=image.device)

    def loss(rows: Tensor, target: Tensor) -> Tensor:
        logits = scale * rows @ texts.T + bias
        sign = torch.full_like(logits, -1.0).scatter_(1, target[:, None], 1.0)
        return -logsigmoid(sign * logits).sum()

    return sum_over_rows(loss, len(texts), image, own) / len(texts)
