"""MedCLIP's loss: images and texts need not be pairs, as both have labels that say how alike they are."""

from torch import Tensor
from torch.nn.functional import log_softmax, normalize, softmax

from medvlm.objectives.gather import gather_rows, sum_over_rows


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
    as in the paper, or ``dot``, as in the released code. Where no rank has an image, or none a text, it is 0.
    """
    if similarity not in ("cosine", "dot"):
        raise ValueError(f"similarity must be 'cosine' or 'dot', not {similarity!r}")
    image, text = normalize(image, dim=-1), normalize(text, dim=-1)
    image_labels, text_labels = image_labels.float(), text_labels.float()
    if similarity == "cosine":
        image_labels, text_labels = normalize(image_labels, dim=-1), normalize(text_labels, dim=-1)
    images, texts, all_image_labels, all_text_labels = (
        gather_rows(rows)[0] for rows in (image, text, image_labels, text_labels)
    )

    def one_way(mine: Tensor, labels: Tensor, others: Tensor, other_labels: Tensor) -> Tensor:
        def loss(rows: Tensor, row_labels: Tensor) -> Tensor:
            target = softmax(row_labels @ other_labels.T, dim=-1)
            return -(target * log_softmax(scale * rows @ others.T, dim=-1)).sum()

        return sum_over_rows(loss, len(others), mine, labels)

    to_text = one_way(image, image_labels, texts, all_text_labels) / max(1, len(images))
    to_image = one_way(text, text_labels, images, all_image_labels) / max(1, len(texts))
    return (to_text + to_image) / 2
