"""Phrase grounding: does the similarity of a phrase with the places of an image rise within its boxes?"""

import re
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from PIL import Image
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from medvlm.errors import UserError
from medvlm.evaluation import heat_map
from medvlm.evaluation.metrics import bootstrap_interval
from medvlm.evaluation.pictures import Picture, described, drawn, load_pictures
from medvlm.evaluation.task import Context, Options, Row, Task, library

SCORES = ("cnr", "cnr_absolute", "miou", "miou_rescaled")
CONTROLS = {"cnr": "other_cnr", "miou": "whole_image_iou", "miou_rescaled": "other_miou_rescaled"}


class PatchModel(Protocol):
    def patches(self, images: Sequence[Image.Image], batch_size: int = ...) -> Tensor: ...
    def occlusions(self, images: Sequence[Image.Image], batch_size: int = ..., *, grid: int = ...) -> Tensor: ...
    def texts(self, texts: Sequence[str], batch_size: int = ...) -> Tensor: ...
    def pixels(self, images: list[Image.Image]) -> dict[str, Tensor]: ...


class GroundingOptions(Options):
    phrase: Literal["label", "sentence"] = "label"
    heat: Literal["similarity", "occlusion"] = "similarity"  # of patches, or lost where a square is hidden
    grid: int = Field(default=8, ge=2)  # of the squares
    pictures: int = Field(default=16, ge=0)  # heat maps to draw

    @field_validator("grid")
    @classmethod
    def _has_squares(cls, grid: int, info: ValidationInfo) -> int:
        if info.data.get("heat") != "occlusion":
            raise ValueError("is for --heat occlusion alone; similarities have the grid of the model's patches")
        return grid


class Phrase(NamedTuple):
    picture: Picture
    label: str
    text: str
    boxes: list[tuple[float, float, float, float]]


def load(reader: Any, limit: int | None, seed: int, options: GroundingOptions) -> list[Phrase]:
    """One phrase per picture and label of its boxes; all boxes with that label are its place."""
    pictures = load_pictures(
        reader, None, seed, views=options.view, wanted=lambda p: bool(p.boxes), missing="no image has boxes"
    )
    phrases = []
    for picture in pictures:
        for label in dict.fromkeys(box.label for box in picture.boxes):
            text = label if options.phrase == "label" else naming_sentence(picture, label)
            if text is not None:
                phrases.append(Phrase(picture, label, text, [b.xyxy for b in picture.boxes if b.label == label]))
    if not phrases or limit == 0:
        raise UserError("no report has a sentence with the label of a box; use --phrase label")
    return drawn(phrases, limit, seed)


def naming_sentence(picture: Picture, label: str) -> str | None:
    """The first sentence of findings, impression or another section that has the label as a word."""
    order = sorted(
        picture.report,
        key=lambda name: ("findings", "impression").index(name) if name in ("findings", "impression") else 2,
    )
    for name in order:
        for sentence in re.split(r"(?<=[.!?])\s+", picture.report[name].strip()):
            if re.search(rf"\b{re.escape(label)}\b", sentence, re.IGNORECASE):
                return sentence
    return None


def evaluate(
    embedder: PatchModel, phrases: Sequence[Phrase], options: GroundingOptions, context: Context
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Scores of each phrase's heat map, and of the map that the same phrase has on another patient's image.

    The latter is what is gained by knowing where such a finding mostly is. Raises UserError if no box is seen.
    """
    unique = list(dict.fromkeys(p.text for p in phrases))
    texts = dict(zip(unique, embedder.texts(unique, context.batch_size), strict=True))

    occlude = options.heat == "occlusion"
    embed_places = partial(embedder.occlusions, grid=options.grid) if occlude else embedder.patches
    sigma = 0.0 if occlude else heat_map.SIGMA  # squares overlap already

    @cache
    def frame(width: int, height: int) -> heat_map.Frame:
        return heat_map.find_frame(lambda images: embedder.pixels(images)["pixel_values"], width, height)

    by_picture: dict[tuple[str, int], list[Phrase]] = {}
    for phrase in phrases:
        by_picture.setdefault((phrase.picture.key, phrase.picture.number), []).append(phrase)
    groups = list(by_picture.values())
    drawings = {id(p) for p in drawn(phrases, options.pictures, context.seed)}
    rows: list[dict[str, Any]] = []
    unseen = 0
    last = other = None  # pictures with their patches: the one before, and the newest one of another patient
    for start in range(0, len(groups), context.batch_size):
        batch = groups[start : start + context.batch_size]
        images = [group[0].picture.image() for group in batch]
        patches = embed_places(images, context.batch_size)
        if other is None:  # for the first patient
            other = (batch[-1][0].picture, patches[-1])
        for group, image, grid in zip(batch, images, patches, strict=True):
            if last is not None and last[0].group != group[0].picture.group:
                other = last
            for phrase in group:
                place = frame(*image.size)
                mask = heat_map.box_mask(phrase.boxes, *image.size)
                heat = heat_map.place(heat_map.similarity_map(grid, texts[phrase.text], sigma), place, *image.size)
                row = _row(phrase, heat, mask)
                if row is None:
                    unseen += 1
                    continue
                if other[0].group != phrase.picture.group:
                    elsewhere = heat_map.similarity_map(other[1], texts[phrase.text], sigma)
                    control = heat_map.place(elsewhere, place, *image.size)
                    row["other_cnr"] = heat_map.contrast_to_noise(control, mask)
                    row["other_miou_rescaled"] = heat_map.mean_iou(heat_map.rescaled(control), mask)
                if id(phrase) in drawings:
                    row["heat_map"] = _draw(context.out, len(rows), phrase, image, heat, row["cnr"], options.heat)
                rows.append(row)
            last = (group[0].picture, grid)
    if not rows:
        raise UserError("no box lies where the model sees: its image processor crops them all away")
    return {**_results(phrases, rows, unseen, context.seed), "heat": options.heat, "sigma": sigma}, rows


def _row(phrase: Phrase, heat: np.ndarray, mask: np.ndarray) -> dict[str, Any] | None:
    """None where the model does not see the box, or sees nothing else."""
    cnr = heat_map.contrast_to_noise(heat, mask)
    if cnr is None:
        return None
    seen = np.isfinite(heat)
    return {
        **phrase.picture.named,
        "label": phrase.label,
        "phrase": phrase.text,
        "boxes": [list(box) for box in phrase.boxes],
        "cnr": cnr,
        "cnr_absolute": abs(cnr),
        "miou": heat_map.mean_iou(heat, mask),
        "miou_rescaled": heat_map.mean_iou(heat_map.rescaled(heat), mask),
        "whole_image_iou": float((mask & seen).sum() / seen.sum()),
        "box_share_seen": float((mask & seen).sum() / mask.sum()),
    }


def _results(phrases: Sequence[Phrase], rows: list[dict[str, Any]], unseen: int, seed: int) -> dict[str, Any]:
    pictures = {(p.picture.key, p.picture.number): p.picture for p in phrases}
    out: dict[str, Any] = {**described(list(pictures.values())), "n_phrases": len(rows), "n_unseen": unseen}
    ci: dict[str, Any] = {}
    for name in (*SCORES, *CONTROLS.values()):
        having = [row for row in rows if row.get(name) is not None]
        out[name] = float(np.mean([row[name] for row in having])) if having else None
        out[f"n_{name}"] = len(having)
        if having:
            ci[name] = bootstrap_interval([row[name] for row in having], [row["group"] for row in having], seed)
    out["labels"] = {
        label: {"n": len(part), **{name: float(np.mean([row[name] for row in part])) for name in SCORES}}
        for label in sorted({row["label"] for row in rows})
        for part in [[row for row in rows if row["label"] == label]]
    }
    out["heat_maps"] = [row["heat_map"] for row in rows if "heat_map" in row]
    return {**out, "thresholds": list(heat_map.THRESHOLDS), "ci95": ci}


def _draw(out: Path, number: int, phrase: Phrase, image: Image.Image, heat: np.ndarray, cnr: float, of: str) -> str:
    """Write the picture with its heat map and boxes; returns its path within the folder ``out``."""
    matplotlib = library("matplotlib")
    figure = library("matplotlib.figure").Figure(figsize=(8, 4.2), layout="constrained")
    name = f"heat_maps/{number:04d}-{phrase.picture.key}.png"
    (out / "heat_maps").mkdir(parents=True, exist_ok=True)
    for axis, over in zip(figure.subplots(1, 2), (False, True), strict=True):
        axis.imshow(image, cmap="gray")
        if over:
            shown = axis.imshow(np.ma.masked_invalid(heat), cmap="inferno", alpha=0.55)
            figure.colorbar(shown, ax=axis, label="cosine lost" if of == "occlusion" else "cosine")
        for x0, y0, x1, y1 in phrase.boxes:
            axis.add_patch(
                matplotlib.patches.Rectangle(
                    (x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, color="#2dd4bf", lw=1.5
                )
            )
        axis.set_axis_off()
    figure.suptitle(f"{phrase.text[:90]}   CNR {cnr:.2f}", fontsize=9)
    figure.savefig(out / name, dpi=100)
    return name


def table(results: dict[str, Any]) -> list[Row]:
    titles = {
        "cnr": "CNR",
        "cnr_absolute": "CNR, absolute",
        "miou": "mIoU, map above .1 to .5",
        "miou_rescaled": "mIoU, map rescaled to 0 .. 1",
    }
    controls = {
        "other_cnr": "  map of another patient's image",
        "whole_image_iou": "  IoU of the whole image",
        "other_miou_rescaled": "  map of another patient's image",
    }
    rows = []
    for name in SCORES:
        number = name.startswith("cnr")
        rows.append(Row(titles[name], results[name], results["ci95"].get(name), results[f"n_{name}"], number=number))
        if name in CONTROLS:
            other = CONTROLS[name]
            rows.append(
                Row(controls[other], results[other], results["ci95"].get(other), results[f"n_{other}"], True, number)
            )
    rows += [Row(f"  CNR of {label}", v["cnr"], None, v["n"], number=True) for label, v in results["labels"].items()]
    return rows


TASK = Task(load=load, evaluate=evaluate, table=table, options=GroundingOptions)
