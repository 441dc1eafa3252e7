"""Has a joint embedding space collapsed? Measures of paired embeddings [N, D] of images and texts.

A contrastive loss can fall while the embeddings shrink to few directions, where nothing is told apart by another task.
All measures but the ranks are of directions (rows scaled to length 1); the ranks are of the embeddings as they come.
"""

import torch
from torch import Tensor

from medvlm.errors import UserError

CHUNK = 2048  # rows of a similarity matrix that are in memory at a time


def directions(embeddings: Tensor) -> Tensor:
    """[N, D] -> the same in float32 with rows of length 1.

    Raises UserError naming the first row that is not finite, or is zero and has no direction.
    """
    rows = _checked(embeddings).float()
    norms = rows.norm(dim=-1, keepdim=True)
    if not bool((norms > 0).all()):
        raise UserError(f"embedding {int((norms[:, 0] == 0).nonzero()[0])} is zero, so it has no direction")
    return rows / norms


def alignment(image: Tensor, text: Tensor) -> float:
    """Mean squared distance of the pairs, 0 (equal) to 4 (opposite): Wang & Isola (arXiv 2005.10242), alpha = 2."""
    image, text = directions(image), directions(text)
    if image.shape != text.shape:
        raise ValueError(f"pairs need one shape, not {tuple(image.shape)} and {tuple(text.shape)}")
    return float((image - text).square().sum(-1).mean())


def uniformity(embeddings: Tensor, t: float = 2.0) -> float:
    """log of the mean of exp(-t |x - y|^2) over pairs of different rows (Wang & Isola): 0 where all rows are equal,
    about -2t in many dimensions where directions are uniform, and lower is more spread. Needs two rows."""
    rows = _several(directions(embeddings))
    total = torch.zeros((), dtype=torch.float64, device=rows.device)
    for start in range(0, len(rows), CHUNK):
        cosine = rows[start : start + CHUNK] @ rows.T  # [c, N]; |x - y|^2 = 2 - 2 cos
        weight = torch.exp(2 * t * (cosine.clamp(max=1.0) - 1))
        weight.diagonal(start).zero_()
        total += weight.sum(dtype=torch.float64)
    return float((total / (len(rows) * (len(rows) - 1))).log())


def mean_off_diagonal_cosine(embeddings: Tensor) -> float:
    """Mean cosine of pairs of different rows: 1 where all are one direction, about 0 where they are spread."""
    rows = _several(directions(embeddings)).double()
    n = len(rows)
    return float((rows.sum(0).square().sum() - rows.square().sum()) / (n * (n - 1)))


def modality_gap(image: Tensor, text: Tensor) -> float:
    """Distance of the mean image direction from the mean text direction (Liang et al., arXiv 2203.02053): 0 to 2."""
    return float((directions(image).mean(0) - directions(text).mean(0)).norm())


def rankme(embeddings: Tensor, eps: float = 1e-7) -> float:
    """exp of the entropy of p_k = sigma_k / sum sigma + eps, of the singular values (RankMe, arXiv 2210.02885).

    1 to min(N, D), of embeddings that are neither centred nor normalised. The paper takes 25,600 rows: values are
    comparable for one N and one kind of model.
    """
    return _rankme(_spectrum(embeddings), eps)


def effective_rank(embeddings: Tensor) -> float:
    """RankMe without its eps (Roy & Vetterli 2007): exactly 1 for one direction, d for d equal and orthogonal ones."""
    return _effective_rank(_spectrum(embeddings))


def participation_ratio(embeddings: Tensor) -> float:
    """(tr C)^2 / tr C^2 of the covariance C: how many directions carry the variance; 0 where there is no variance."""
    rows = _several(_checked(embeddings)).double()
    whole = rows.square().sum()
    rows = rows - rows.mean(0)
    trace = rows.square().sum()  # of C, times N - 1
    if trace <= torch.finfo(torch.float32).eps ** 2 * whole:  # what rounding leaves of a constant is no variance
        return 0.0
    small = rows.T @ rows if rows.shape[1] <= len(rows) else rows @ rows.T  # of one spectrum
    return float(trace.square() / small.square().sum())


def diagnose(image: Tensor, text: Tensor, paired: bool = True) -> dict[str, float]:
    """All measures of N >= 2 pairs, image and text [N, D]; those of one modality carry its name at the end.

    Of images and texts that are no pairs, whose numbers may differ, all but those of pairs.

    Works on 25,600 x 512 (a similarity matrix is never whole). Raises UserError for what is not finite or zero.
    """
    if paired:
        found = {"n": float(len(image)), "alignment": alignment(image, text)}
        found["mean_pair_cosine"] = float((directions(image) * directions(text)).sum(-1).mean())
    else:
        found = {"n_image": float(len(image)), "n_text": float(len(text))}
    found["modality_gap"] = modality_gap(image, text)
    for name, rows in (("image", image), ("text", text)):
        spectrum = _spectrum(rows)  # takes longest, by far
        found |= {
            f"uniformity_{name}": uniformity(rows),
            f"mean_off_diagonal_cosine_{name}": mean_off_diagonal_cosine(rows),
            f"rankme_{name}": _rankme(spectrum),
            f"effective_rank_{name}": _effective_rank(spectrum),
            f"participation_ratio_{name}": participation_ratio(rows),
        }
    return found


def _rankme(spectrum: Tensor, eps: float = 1e-7) -> float:
    p = spectrum + eps
    return float((-p * p.log()).sum().exp())


def _effective_rank(spectrum: Tensor) -> float:
    return float(torch.special.entr(spectrum).sum().exp())


def _spectrum(embeddings: Tensor) -> Tensor:
    """[N, D] -> its singular values as shares of their sum [min(N, D)]."""
    sigma = torch.linalg.svdvals(_checked(embeddings).double())
    if not float(sigma.sum()) > 0:
        raise UserError("all embeddings are zero, so they have no rank")
    return sigma / sigma.sum()


def _checked(embeddings: Tensor) -> Tensor:
    if embeddings.dim() != 2 or not len(embeddings):
        raise ValueError(f"embeddings must be [N, D] with N > 0, not {tuple(embeddings.shape)}")
    finite = torch.isfinite(embeddings).all(-1)
    if not bool(finite.all()):
        raise UserError(f"embedding {int((~finite).nonzero()[0])} holds NaN or infinity; the model is not usable")
    return embeddings.detach()


def _several(rows: Tensor) -> Tensor:
    if len(rows) < 2:
        raise UserError(f"{len(rows)} embedding is too few to compare; give at least two")
    return rows
