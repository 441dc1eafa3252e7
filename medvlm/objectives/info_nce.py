"""InfoNCE of CLIP and ConVIRT: each image among all texts of the global batch, and each text among all images."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from medvlm.objectives.gather import gather_rows, sum_over_rows


def info_nce(image: Tensor, text: Tensor, scale: Tensor | float, image_weight: float = 0.5) -> Tensor:
    """This rank's share of the mean over pairs of w l(image -> text) + (1 - w) l(text -> image).

    image, text [b, D], normalised here; ``scale`` multiplies the cosines (it is 1/tau). With w = 0.5 it is CLIP's loss
    (arXiv 2103.00020, figure 3), with w = lambda ConVIRT's (arXiv 2010.00747).
    """
    pairs = torch.cat([normalize(image, dim=-1), normalize(text, dim=-1)], dim=-1)
    image, text = pairs.chunk(2, dim=-1)
    every, first = gather_rows(pairs)
    images, texts = every.chunk(2, dim=-1)
    own = first + torch.arange(len(image), device=image.device)

    def one_way(mine: Tensor, others: Tensor) -> Tensor:
        def loss(rows: Tensor, target: Tensor) -> Tensor:
            return cross_entropy(scale * rows @ others.T, target, reduction="sum")

        return sum_over_rows(loss, len(others), mine, own)

    return (image_weight * one_way(image, texts) + (1 - image_weight) * one_way(text, images)) / len(every)
