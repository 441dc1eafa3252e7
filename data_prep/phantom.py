"""Procedural chest radiographs with reports, labels, boxes, masks and questions: embedded data with a known truth.

Every study is a pure function of (seed, patient, study). Nothing here comes from a patient, and every sample says so.
"""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

import cv2
import numpy as np
import typer
from rich.progress import track

from data_prep.phantom_draw import Anatomy, Finding, draw
from data_prep.phantom_text import easy_messages, full_messages, labels_of, write_report
from medvlm.data.schema import Sample, Split
from medvlm.data.shards import write_shards
from medvlm.errors import UserError

Preset = Literal["full", "easy"]
FOLLOW_UPS = 0.25  # share of patients with a second study


def split_of(patient: int, seed: int) -> Split:
    """80 / 10 / 10 by a hash of the patient, so that no patient is in two splits."""
    bucket = int(hashlib.sha256(f"{seed}/{patient}".encode()).hexdigest(), 16) % 10
    return "train" if bucket < 8 else "validation" if bucket == 8 else "test"


def make_study(
    seed: int,
    patient: int,
    study: int,
    *,
    width: int,
    height: int,
    preset: Preset = "full",
    bits: int = 8,
    masks: bool = False,
) -> tuple[Sample, dict[str, bytes]]:
    """One study with its members. A follow-up (study 1) shows the same patient, findings grown, shrunk or gone."""
    person = np.random.default_rng([seed, patient])
    rng = np.random.default_rng([seed, patient, study, 7])
    findings = easy_findings(person) if preset == "easy" else full_findings(person)
    if study:
        findings = tuple(_progress(f, rng) for f in findings if rng.random() < 0.75)
    build: dict[str, Any] = {
        "width": person.uniform(0.78, 0.88),
        "lung": person.uniform(0.29, 0.325),
        "top": person.uniform(-0.76, -0.7),
        "base": person.uniform(0.46, 0.56),
        "heart": person.uniform(0.4, 0.48),
        "rib_phase": person.uniform(0, 0.15),
    }
    sex, age = str(person.choice(["F", "M"])), int(person.integers(18, 95))
    view = "AP" if rng.random() < 0.3 else "PA"
    anatomy = Anatomy(
        **build,
        rotation=float(rng.normal(0, 0.015)),
        exposure=float(rng.uniform(0.9, 1.1)),
        noise=float(rng.uniform(0.01, 0.03)),
        findings=findings,
    )
    picture, found = draw(anatomy, width, height, rng)
    _marker(picture, view, rng)
    members, file = _encode(picture, bits)
    boxes = [{"label": findings[n].name, "xyxy": box} for n, mask in found.items() if (box := _box(mask)) is not None]
    if masks:
        label_map = np.zeros(picture.shape, np.uint8)
        for n, mask in found.items():
            label_map[mask] = n + 1
        members["0.mask.png"] = _png(label_map)
    key = f"phantom-p{patient:06d}-s{study}"
    report = write_report(findings, view, sex, age, rng, study > 0)
    messages = easy_messages(findings, rng) if preset == "easy" else full_messages(findings, view, report, rng)
    sample = Sample.model_validate(
        {
            "key": key,
            "source": "phantom",
            "license": "CC0-1.0",
            "split": split_of(patient, seed),
            "synthetic": True,
            "patient_id": f"phantom-p{patient:06d}",
            "study_id": key,
            "images": [{"file": file, "width": width, "height": height, "image_id": key, "view": view}],
            "messages": messages,
            "report": report,
            "labels": labels_of(findings, report),
            "boxes": boxes,
            "metadata": {
                "synthetic": True,
                "generator": "medvlm data_prep.phantom",
                "sex": sex,
                "age": age,
                "findings": [vars(f) for f in findings],
                "mask_values": {str(n + 1): f.name for n, f in enumerate(findings)},
            },
        }
    )
    return sample, members


def easy_findings(rng: np.random.Generator) -> tuple[Finding, ...]:
    """Large findings, each present in half of the studies, independent of each other."""
    found = []
    if rng.random() < 0.5:
        found.append(Finding("cardiomegaly", size=float(rng.uniform(0.58, 0.66))))
    for side in ("right", "left"):
        if rng.random() < 0.5:
            found.append(Finding("pneumothorax", side, size=float(rng.uniform(0.22, 0.34))))
        if rng.random() < 0.5:
            found.append(Finding("effusion", side, size=float(rng.uniform(0.18, 0.34))))
    for side in ("right", "left"):
        if rng.random() < 0.5:
            found.append(Finding("consolidation", side, "middle", float(rng.uniform(0.3, 0.4))))
    if rng.random() < 0.5:
        found.append(Finding("pacemaker", "left"))
    return tuple(found)


def full_findings(rng: np.random.Generator) -> tuple[Finding, ...]:
    """Prevalences of a hospital: a third of the studies are normal."""
    if rng.random() < 0.33:
        return ()
    side = lambda: str(rng.choice(["right", "left"]))  # noqa: E731
    zone = lambda: str(rng.choice(["upper", "middle", "lower"]))  # noqa: E731
    found = []
    if rng.random() < 0.3:
        found.append(Finding("cardiomegaly", size=float(rng.uniform(0.57, 0.68))))
    if rng.random() < 0.2:
        found.append(Finding("edema", size=float(rng.uniform(0.04, 0.14))))
    if rng.random() < 0.12:
        found.append(Finding("pneumothorax", side(), size=float(rng.uniform(0.1, 0.35))))
    for where in ("right", "left"):
        if rng.random() < 0.22:
            found.append(Finding("effusion", where, size=float(rng.uniform(0.07, 0.4))))
    if rng.random() < 0.25:
        found.append(Finding("consolidation", side(), zone(), float(rng.uniform(0.2, 0.4))))
    if rng.random() < 0.2:
        found.append(Finding("atelectasis", side(), "lower"))
    if rng.random() < 0.15:
        found.append(Finding("nodule", side(), zone(), float(rng.uniform(0.08, 0.2))))
    if rng.random() < 0.18:
        found.append(Finding("pacemaker", "left"))
    return tuple(found)


def _progress(f: Finding, rng: np.random.Generator) -> Finding:
    return Finding(f.name, f.side, f.zone, f.size * float(rng.uniform(0.85, 1.1)), f.severity)


def _marker(picture: np.ndarray, view: str, rng: np.random.Generator) -> None:
    """A lead letter at the patient's side, as technicians place it."""
    height, width = picture.shape
    if height < 128 or rng.random() < 0.2:
        return
    letter, x = ("R", 0.03) if rng.random() < 0.7 else ("L", 0.93)
    scale, lead = height / 500, np.zeros(picture.shape, np.uint8)
    cv2.putText(lead, letter, (int(x * width), int(0.14 * height)), cv2.FONT_HERSHEY_SIMPLEX, scale, 255, 2)
    if view == "AP":
        where = (int(0.8 * width), int(0.06 * height))
        cv2.putText(lead, "AP", where, cv2.FONT_HERSHEY_SIMPLEX, 0.8 * scale, 255, 1)
    picture[lead > 127] = 1.0


def _encode(picture: np.ndarray, bits: int) -> tuple[dict[str, bytes], str]:
    if bits == 16:
        return {"0.png": _png((picture * 65535).astype(np.uint16))}, "0.png"
    gray = (picture * 255).astype(np.uint8)
    if max(gray.shape) < 256:
        return {"0.png": _png(gray)}, "0.png"
    return {"0.jpg": cv2.imencode(".jpg", gray, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()}, "0.jpg"


def _png(pixels: np.ndarray) -> bytes:
    return cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()


def _box(mask: np.ndarray) -> list[float] | None:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return None
    return [float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)]


def _studies(images: int, seed: int) -> list[tuple[int, int]]:
    """(patient, study) numbers of the first ``images`` studies."""
    jobs: list[tuple[int, int]] = []
    patient = 0
    while len(jobs) < images:
        jobs.append((patient, 0))
        if np.random.default_rng([seed, patient, 3]).random() < FOLLOW_UPS:
            jobs.append((patient, 1))
        patient += 1
    return jobs[:images]


def _job(arguments: tuple) -> tuple[Sample, dict[str, bytes]]:
    seed, (patient, study), options = arguments
    return make_study(seed, patient, study, **options)


def generate(
    out: Path,
    *,
    images: int,
    size: int = 512,
    width: int | None = None,
    height: int | None = None,
    seed: int = 0,
    preset: Preset = "full",
    bits: int = 8,
    masks: bool = False,
    workers: int = 2,
) -> dict[str, int]:
    """Write ``out/train``, ``out/validation``, ``out/test``, the same bytes for any ``workers``; returns counts."""
    options = {"width": width or size, "height": height or size, "preset": preset, "bits": bits, "masks": masks}
    jobs = _studies(images, seed)
    counts = {}
    with ProcessPoolExecutor(workers) if workers > 1 else nullcontext() as pool:
        for split in ("train", "validation", "test"):
            chosen = [(seed, job, options) for job in jobs if split_of(job[0], seed) == split]
            if not chosen:
                raise UserError(f"{images} images leave the {split} split empty; ask for at least 100")
            made: Iterator = pool.map(_job, chosen, chunksize=32) if pool else map(_job, chosen)
            progress = track(made, description=f"phantom {split}", total=len(chosen))
            write_shards(progress, out / split, f"phantom-{split}")
            counts[split] = len(chosen)
    return counts


def prepare(
    out: Annotated[Path, typer.Argument(help="Folder for the train, validation and test shards.")],
    images: Annotated[int, typer.Option(help="Number of studies, one image each.")] = 2000,
    size: Annotated[int, typer.Option(help="Side of a square image in pixels.")] = 512,
    width: Annotated[int | None, typer.Option(help="Instead of --size.")] = None,
    height: Annotated[int | None, typer.Option(help="Instead of --size.")] = None,
    seed: int = 0,
    preset: Annotated[str, typer.Option(help="full, or easy: large findings and short questions.")] = "full",
    bits: Annotated[int, typer.Option(help="8 or 16.")] = 8,
    masks: Annotated[bool, typer.Option("--masks", help="Store a label map 0.mask.png with each image.")] = False,
    workers: int = 2,
) -> None:
    """Draw synthetic chest radiographs with reports, labels, boxes and questions."""
    if preset not in ("full", "easy"):
        raise UserError(f"--preset: {preset!r} is neither full nor easy")
    if bits not in (8, 16):
        raise UserError(f"--bits: {bits} is neither 8 nor 16")
    if min(width or size, height or size) < 32 or images < 1 or workers < 1:
        raise UserError("--images and --workers must be positive and the sides at least 32 pixels")
    counts = generate(
        out,
        images=images,
        size=size,
        width=width,
        height=height,
        seed=seed,
        preset=preset,  # type: ignore[arg-type]  # checked above
        bits=bits,
        masks=masks,
        workers=workers,
    )
    print(f"{out}: " + ", ".join(f"{n} {split}" for split, n in counts.items()) + " (synthetic, no patients)")
