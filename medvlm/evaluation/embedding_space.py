"""Has the joint space collapsed? Alignment, uniformity, ranks and modality gap, beside those of random directions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medvlm.errors import UserError
from medvlm.evaluation.metrics import bootstrap_interval
from medvlm.evaluation.pictures import SECTIONS, Picture, described, lazy, load_pictures
from medvlm.evaluation.retrieval import Joint
from medvlm.evaluation.task import Context, Options, Row, Task, library
from medvlm.measures import embedding_space as measures


class SpaceOptions(Options):
    section: tuple[str, ...] = SECTIONS


def load(reader: Any, limit: int | None, seed: int, options: SpaceOptions) -> list[Picture]:
    """The first image of each sample that has a report."""
    return load_pictures(
        reader,
        limit,
        seed,
        sections=options.section,
        views=options.view,
        wanted=lambda picture: picture.number == 0 and picture.text is not None,
        missing=f"no image has a report with {' or '.join(options.section)}",
    )


def evaluate(
    embedder: Joint, pictures: Sequence[Picture], options: SpaceOptions, context: Context
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The measures of the pairs, and of as many random directions. Raises UserError for fewer than two pairs."""
    if len(pictures) < 2:
        raise UserError("a single pair has no space to measure; give more data")
    texts = [p.text or "" for p in pictures]
    image = embedder.images(lazy(pictures), context.batch_size, normalized=False)
    text = embedder.texts(texts, context.batch_size, normalized=False)
    random = torch.Generator().manual_seed(context.seed)
    noise = [torch.randn(rows.shape, generator=random) for rows in (image, text)]
    found, control = measures.diagnose(image, text), measures.diagnose(noise[0], noise[1])
    cosines = (measures.directions(image) * measures.directions(text)).sum(1).double().numpy()
    owners = [p.group for p in pictures]
    ci = {
        "alignment": bootstrap_interval(2 - 2 * cosines, owners, context.seed),
        "mean_pair_cosine": bootstrap_interval(cosines, owners, context.seed),
    }
    results = {
        **described(pictures),
        "n_unique_texts": len(set(texts)),
        "dimensions": image.shape[1],
        **{name: value for name, value in found.items() if name != "n"},
        **{f"random_{name}": value for name, value in control.items() if name != "n"},
        "ci95": ci,
        "plot": plot(context.out, image, text, cosines),
    }
    return results, [{**p.named, "cosine": float(c)} for p, c in zip(pictures, cosines, strict=True)]


def plot(out: Path, image: Tensor, text: Tensor, cosines: np.ndarray) -> str:
    """Write spectra, and cosines of pairs and of other pairs, as one picture; returns its name within ``out``."""
    figure = library("matplotlib.figure").Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, rows, color in (("image", image, "#4e79a7"), ("text", text, "#f28e2b")):
        sigma = torch.linalg.svdvals(rows.double()).numpy()
        left.semilogy(np.arange(1, len(sigma) + 1), np.maximum(sigma / sigma[0], 1e-8), label=name, color=color)
    left.set(xlabel="singular value", ylabel="share of the largest")
    left.legend(frameon=False)
    # each image with the text of the next one: as many wrong pairs as right ones
    wrong = (measures.directions(image) * measures.directions(text).roll(1, 0)).sum(1).numpy()
    bins = np.linspace(min(cosines.min(), wrong.min()) - 1e-6, max(cosines.max(), wrong.max()) + 1e-6, 40)
    right.hist([cosines, wrong], bins, label=["pairs", "other pairs"], color=["#59a14f", "#a0a0a0"])
    right.set(xlabel="cosine of image and text")
    right.legend(frameon=False)
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "embedding_space.png", dpi=110)
    return "embedding_space.png"


def table(results: dict[str, Any]) -> list[Row]:
    rows = []
    for key in (name.removeprefix("random_") for name in results if name.startswith("random_")):
        rows.append(Row(key.replace("_", " "), results[key], results["ci95"].get(key), results["n"], number=True))
        rows.append(Row("  random directions", results[f"random_{key}"], None, results["n"], True, True))
    return rows


TASK = Task(load=load, evaluate=evaluate, table=table, options=SpaceOptions)
