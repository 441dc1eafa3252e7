"""Procedural chest radiographs with reports, labels, boxes, masks and questions: embedded data with a known truth.

Every study is a pure function of (seed, patient, study). Nothing here comes from a patient, and every sample says so.
"""

import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import cv2
import numpy as np
import typer
from rich.progress import track

from data_prep.phantom_anatomy import Build, Finding, Shot
from data_prep.phantom_draw import LATERAL_FINDINGS, draw
from data_prep.phantom_text import DEVICES, NOUNS, easy_messages, full_messages, grade, lobe, write_report
from medvlm.data.schema import Sample, Split
from medvlm.data.shards import write_shards
from medvlm.errors import UserError

Preset = Literal["full", "easy"]
Format = Literal["auto", "jpg", "png"]
SPLITS: tuple[Split, Split, Split] = ("train", "validation", "test")
STUDIES = (0.72, 0.18, 0.07, 0.03)  # share of patients with one, two, three and four studies
WITHOUT_SIZE = (*DEVICES, "fracture", "atelectasis")


def split_of(patient: int, seed: int, shares: Sequence[float] = (0.8, 0.1, 0.1)) -> Split:
    """By a hash of the patient, so that no patient is in two splits."""
    digest = hashlib.sha256(f"{seed}/{patient}".encode()).digest()
    point = int.from_bytes(digest[:8], "big") / 2**64 * sum(shares)
    return SPLITS[(point >= shares[0]) + (point >= shares[0] + shares[1])]


def studies_of(seed: int, patient: int) -> int:
    """How many studies a patient has."""
    return 1 + int(np.searchsorted(np.cumsum(STUDIES), np.random.default_rng([seed, patient, 3]).random()))


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
    with_prior: bool = False,
    file_format: Format = "auto",
    shares: Sequence[float] = (0.8, 0.1, 0.1),
) -> tuple[Sample, dict[str, bytes]]:
    """One study and its members, ``0.jpg`` or ``0.png`` and, if asked for, the label map ``0.mask.png``.

    A follow-up (study 1, 2, ...) shows the same patient, findings grown, shrunk, gone or new. ``with_prior`` adds the
    image of the study before it (metadata ``role: prior``), where both are frontal or both lateral.
    """
    build, shot, findings, before, sex, age = plan_study(seed, patient, study, preset)
    picture, found = draw(build, shot, findings, width, height)
    members, file = encode(picture, bits, file_format)
    who, key = f"phantom-p{patient:06d}", f"phantom-p{patient:06d}-s{study:02d}"
    images = [{"file": file, "width": width, "height": height, "image_id": key, "view": shot.view}]
    if with_prior and study:
        earlier_build, earlier, seen, *_ = plan_study(seed, patient, study - 1, preset)
        if (earlier.view == "LATERAL") == (shot.view == "LATERAL"):
            more, file = encode(draw(earlier_build, earlier, seen, width, height)[0], bits, file_format, number=1)
            members |= more
            which = {"image_id": f"{who}-s{study - 1:02d}", "view": earlier.view, "metadata": {"role": "prior"}}
            images.append({"file": file, "width": width, "height": height, **which})
    rng = np.random.default_rng([seed, patient, study, 11])
    report = write_report(findings, shot.view, sex, age, rng, before)
    if preset == "easy":
        messages = easy_messages(findings, rng)
    else:
        askable = LATERAL_FINDINGS if shot.view == "LATERAL" else tuple(NOUNS)
        messages = full_messages(findings, shot.view, report.hedged, askable, rng)
    if masks:
        label_map = np.zeros(picture.shape, np.uint8)
        for n, mask in sorted(found.items(), key=lambda item: -int(item[1].sum())):  # small ones stay on top
            label_map[mask > 0] = n + 1
        members["0.mask.png"] = _png(label_map)
    messages[0]["content"] = [{"type": "image"} for _ in images[1:]] + messages[0]["content"]
    boxes = [{"label": findings[n].name, "xyxy": _box(mask)} for n, mask in sorted(found.items()) if mask.any()]
    metadata = {
        "synthetic": True,
        "generator": "medvlm data_prep.phantom",
        "sex": sex,
        "age": age,
        "study": study,
        "bits": bits,
        "findings": [describe(f) for f in findings],
    }
    if masks:
        metadata["mask_values"] = {str(n + 1): f.name for n, f in enumerate(findings)}
    sample = Sample.model_validate(
        {
            "key": key,
            "source": "phantom",
            "license": "CC0-1.0",
            "split": split_of(patient, seed, shares),
            "synthetic": True,
            "patient_id": who,
            "study_id": key,
            "images": images,
            "messages": messages,
            "report": report.text,
            "labels": report.labels,
            "boxes": boxes,
            "metadata": metadata,
        }
    )
    return sample, members


def describe(f: Finding) -> dict[str, Any]:
    """A finding for the metadata."""
    size = None if f.name in WITHOUT_SIZE else round(f.size, 3)
    return {"finding": f.name, "side": f.side, "zone": f.zone, "lobe": lobe(f), "size": size, "severity": grade(f)}


def plan_study(
    seed: int, patient: int, study: int, preset: Preset
) -> tuple[Build, Shot, list[Finding], list[Finding] | None, str, int]:
    """What is to be drawn: the patient, the exposure, the findings now and in the prior study, if there is one."""
    person = np.random.default_rng([seed, patient])
    calm = 0.5 if preset == "easy" else 1.0
    sex, age = str(person.choice(["F", "M"])), int(np.clip(person.normal(58, 18), 18, 95))

    def u(middle: float, spread: float) -> float:
        return float(middle + calm * person.uniform(-spread, spread))

    build = Build(
        sex=sex,
        half=u(0.69 if sex == "M" else 0.67, 0.035),
        wall=u(0.155, 0.055),
        apex=u(-0.79, 0.03),
        dome=u(0.33, 0.06),
        heart=u(0.435, 0.035),
        rib_gap=u(0.13, 0.008),
        rib_phase=u(0.0, 0.03),
        seed=int(person.integers(2**31)),
    )
    history: list[list[Finding]] = []
    for n in range(study + 1):
        rng = np.random.default_rng([seed, patient, n, 5])
        if preset == "easy":
            history.append(easy_findings(rng))
        else:
            history.append(progress(history[-1], rng) if n else full_findings(rng))
    findings, before = history[-1], history[-2] if study else None
    rng = np.random.default_rng([seed, patient, study, 7])
    view = str(rng.choice(["PA", "AP", "LATERAL"], p=[0.58, 0.3, 0.12] if preset == "full" else [0.8, 0.2, 0.0]))
    if any(f.name in ("endotracheal tube", "chest tube", "central line") for f in findings) and view == "PA":
        view = "AP"  # the sick are imaged in bed
    if view == "LATERAL":
        findings = _on_lateral(findings)
        before = None if before is None else _on_lateral(before)
    shot = Shot(
        view=view,
        rotation=float(np.clip(calm * rng.normal(0, 0.018), -0.04, 0.04)),
        tilt=float(np.clip(calm * rng.normal(0, 0.02), -0.05, 0.05)),
        zoom=float(1 + calm * rng.uniform(-0.05, 0.05)),
        exposure=float(1 + calm * rng.uniform(-0.12, 0.10)),
        contrast=float(1 + calm * rng.uniform(-0.10, 0.12)),
        noise=float(rng.uniform(0.006, 0.02 + 0.012 * calm)),
        marker=[None, "R", "L"][int(rng.choice(3, p=[0.3, 0.45, 0.25]))],
        seed=int(rng.integers(2**31)),
    )
    return build, shot, findings, before, sex, age


def _on_lateral(findings: Sequence[Finding]) -> list[Finding]:
    """The findings that a lateral view shows, one of each kind and without a side."""
    kept = {f.name: replace(f, side=None) for f in findings if f.name in LATERAL_FINDINGS}
    return list(kept.values())


def _new(
    name: str,
    rng: np.random.Generator,
    side: str | None = None,
    zone: str | None = None,
    low: float = 0,
    high: float = 0,
) -> Finding:
    return Finding(name, side, zone, float(rng.uniform(low, high)), int(rng.integers(2**31)))


def easy_findings(rng: np.random.Generator) -> list[Finding]:
    """Large findings, each present in half of the studies, independent of each other and apart in the picture."""
    chance = rng.random(8) < 0.5
    found = [_new("cardiomegaly", rng, low=0.60, high=0.68)] if chance[0] else []
    for n, side in enumerate(("right", "left")):
        if chance[1 + n]:
            found.append(_new("pneumothorax", rng, side, low=0.22, high=0.30))
        if chance[3 + n]:
            found.append(_new("effusion", rng, side, low=0.22, high=0.36))
        if chance[5 + n]:
            found.append(_new("consolidation", rng, side, "middle", 0.36, 0.42))
    if chance[7]:
        found.append(_new("pacemaker", rng, "left"))
    return found


def full_findings(rng: np.random.Generator) -> list[Finding]:
    """Prevalences near a hospital's: a third of the studies are normal."""
    if rng.random() < 0.30:
        return []
    found: list[Finding] = []
    for name, share in PREVALENCE.items():
        if rng.random() < share:
            _add(found, name, rng)
    return found


PREVALENCE = {
    "cardiomegaly": 0.26,
    "edema": 0.15,
    "effusion": 0.30,
    "pneumothorax": 0.10,
    "consolidation": 0.22,
    "atelectasis": 0.14,
    "nodule": 0.09,
    "mass": 0.06,
    "fracture": 0.06,
    "pacemaker": 0.10,
    "endotracheal tube": 0.07,
    "central line": 0.10,
    "chest tube": 0.0,  # comes with a pneumothorax or a large effusion
}


def _add(found: list[Finding], name: str, rng: np.random.Generator) -> None:
    """Add a finding where it does not hide behind, or hide, one that is there."""
    side = str(rng.choice(["right", "left"]))
    zone = str(rng.choice(["upper", "middle", "lower"]))

    def here(*names: str) -> bool:
        return any(f.name in names and f.side in (None, side) for f in found)

    taken = {f.zone for f in found if f.side == side and f.zone} | ({"lower"} if here("effusion") else set())
    if here("edema"):
        taken |= {"middle"}
    if name in ("consolidation", "nodule", "mass") and zone in taken:
        return
    if name == "cardiomegaly":
        found.append(_new(name, rng, low=0.575, high=0.69))
    elif name == "edema":
        found.append(_new(name, rng, low=0.3, high=0.85))
    elif name == "effusion":
        sides = ("right", "left") if rng.random() < 0.35 else (side,)
        found.extend(_new(name, rng, s, low=0.11, high=0.45) for s in sides)
    elif name == "pneumothorax":
        found.append(_new(name, rng, side, low=0.09, high=0.36))
        if rng.random() < 0.35:
            found.append(_new("chest tube", rng, side))
    elif name == "consolidation":
        found.append(_new(name, rng, side, zone, 0.26, 0.42))
    elif name == "atelectasis":
        if not here("effusion", "edema") and "lower" not in taken:
            found.append(_new(name, rng, side, "lower"))
    elif name in ("nodule", "mass"):
        found.append(_new(name, rng, side, zone, *((14, 29) if name == "nodule" else (34, 64))))
    elif name == "fracture":
        if not here("pneumothorax", "effusion", "consolidation", "edema"):
            found.append(_new(name, rng, side))
    else:
        side = {"pacemaker": "left" if rng.random() < 0.85 else "right", "central line": side}.get(name, "")
        found.append(_new(name, rng, side or None))


def progress(findings: Sequence[Finding], rng: np.random.Generator) -> list[Finding]:
    """The next study: findings resolve, grow, shrink or stay, and sometimes one is new."""
    after = []
    for f in findings:
        lasting = f.name in ("cardiomegaly", "nodule", "mass", "pacemaker", "fracture")
        if rng.random() < (0.0 if lasting else 0.28):
            continue
        factor = float(rng.choice([1.0, rng.uniform(0.6, 0.9), rng.uniform(1.1, 1.4)], p=[0.4, 0.35, 0.25]))
        low, high = LIMITS.get(f.name, (f.size, f.size))
        after.append(replace(f, size=float(np.clip(f.size * factor, low, high))))
    if rng.random() < 0.3:
        name = str(rng.choice([n for n, share in PREVALENCE.items() if share]))
        if all(f.name != name for f in after):
            _add(after, name, rng)
    return after


LIMITS = {  # sizes stay those of the finding, so that a shrunken cardiomegaly is still one
    "edema": (0.3, 0.85),
    "effusion": (0.11, 0.45),
    "pneumothorax": (0.09, 0.36),
    "consolidation": (0.26, 0.42),
    "nodule": (14, 29),
    "mass": (34, 64),
}


def encode(
    picture: np.ndarray, bits: int = 8, file_format: Format = "auto", number: int = 0
) -> tuple[dict[str, bytes], str]:
    """Members of picture ``number`` of a sample, in 0..1, and the image's name.

    ``auto``: JPEG from 256 px up, PNG below and for 16 bit.
    """
    if bits == 16:
        return {f"{number}.png": _png((picture * 65535 + 0.5).astype(np.uint16))}, f"{number}.png"
    gray = cv2.convertScaleAbs(picture, alpha=255)
    if file_format == "png" or (file_format == "auto" and max(gray.shape) < 256):
        return {f"{number}.png": _png(gray)}, f"{number}.png"
    data = cv2.imencode(".jpg", gray, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
    return {f"{number}.jpg": data}, f"{number}.jpg"


def _png(pixels: np.ndarray) -> bytes:
    return cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()


def _box(mask: np.ndarray) -> tuple[float, float, float, float]:
    x, y, w, h = cv2.boundingRect(mask)
    return float(x), float(y), float(x + w), float(y + h)


def _studies(seed: int, images: int | None, patients: int | None) -> list[tuple[int, int]]:
    """(patient, study) numbers: of the first ``patients``, or as many as fill ``images``."""
    jobs: list[tuple[int, int]] = []
    patient = 0
    while patient < patients if patients is not None else len(jobs) < cast(int, images):
        jobs += [(patient, study) for study in range(studies_of(seed, patient))]
        patient += 1
    return jobs[:images]


def _job(arguments: tuple[int, tuple[int, int], dict[str, Any]]) -> tuple[Sample, dict[str, bytes]]:
    seed, (patient, study), options = arguments
    return make_study(seed, patient, study, **options)


def _one_thread() -> None:
    cv2.setNumThreads(1)


def generate(
    out: Path,
    *,
    images: int | None = None,
    patients: int | None = None,
    size: int = 512,
    width: int | None = None,
    height: int | None = None,
    seed: int = 0,
    preset: Preset = "full",
    bits: int = 8,
    masks: bool = False,
    with_prior: bool = False,
    file_format: Format = "auto",
    shares: Sequence[float] = (0.8, 0.1, 0.1),
    workers: int = 2,
) -> dict[str, int]:
    """Write ``out/train``, ``out/validation``, ``out/test``, the same bytes for any ``workers``; returns the counts.

    Give either ``images`` or ``patients``. Raises UserError for a bad option or a split that would be empty.
    """
    width, height = width or size, height or size
    if (images is None) == (patients is None):
        raise UserError("phantom: give either a number of images or a number of patients")
    if preset not in ("full", "easy"):
        raise UserError(f"--preset: {preset!r} is neither full nor easy")
    if bits not in (8, 16):
        raise UserError(f"--bits: {bits} is neither 8 nor 16")
    if file_format not in ("auto", "jpg", "png") or (bits, file_format) == (16, "jpg"):
        raise UserError(f"--format: {file_format!r} is not auto, jpg or png, or not possible with {bits} bits")
    if not 32 <= min(width, height) <= max(width, height) <= 8192:
        raise UserError(f"--size: {width} x {height} pixels is outside 32 to 8192 a side")
    if (images or patients or 0) < 1 or workers < 1:
        raise UserError("--images and --workers must be positive")
    if len(shares) != 3 or min(shares) < 0 or sum(shares) <= 0:
        raise UserError("phantom: the shares of train, validation and test must be three numbers, none negative")
    options: dict[str, Any] = {"width": width, "height": height, "preset": preset, "bits": bits, "masks": masks}
    options |= {"with_prior": with_prior, "file_format": file_format, "shares": tuple(shares)}
    jobs: dict[str, list] = {split: [] for split in SPLITS}
    for job in _studies(seed, images, patients):
        jobs[split_of(job[0], seed, shares)].append((seed, job, options))
    empty = [split for split, share in zip(SPLITS, shares, strict=True) if share > 0 and not jobs[split]]
    if empty:
        raise UserError(f"{out}: too few images for a {empty[0]} split; ask for at least 100")
    # Spawned, not forked: OpenCV's threads do not survive a fork, and the children would wait for them for ever.
    spawn = get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, _one_thread) if workers > 1 else nullcontext() as pool:
        for split, chosen in jobs.items():
            if chosen:
                made: Iterable = pool.map(_job, chosen, chunksize=16) if pool else map(_job, chosen)
                progress_bar = track(made, description=f"phantom {split}", total=len(chosen))
                write_shards(progress_bar, out / split, f"phantom-{split}")
    return {split: len(chosen) for split, chosen in jobs.items()}


def prepare(
    out: Annotated[Path, typer.Argument(help="Folder for the train, validation and test shards.")],
    images: Annotated[int, typer.Option(help="Number of studies, one image each.")] = 2000,
    size: Annotated[int, typer.Option(help="Side of a square image in pixels.")] = 512,
    width: Annotated[int | None, typer.Option(help="Width in pixels instead of --size.")] = None,
    height: Annotated[int | None, typer.Option(help="Height in pixels instead of --size.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")] = 0,
    preset: Annotated[str, typer.Option(help="full, or easy: large findings and short questions.")] = "full",
    bits: Annotated[int, typer.Option(help="8 or 16.")] = 8,
    masks: Annotated[bool, typer.Option("--masks", help="Store a label map 0.mask.png with each image.")] = False,
    with_prior: Annotated[
        bool, typer.Option("--with-prior", help="Add the image of the patient's study before, with role: prior.")
    ] = False,
    file_format: Annotated[str, typer.Option("--format", help="auto (jpg from 256 px up), jpg or png.")] = "auto",
    workers: Annotated[int, typer.Option(help="Processes.")] = 2,
) -> None:
    """Draw synthetic chest radiographs with reports, labels, boxes and questions."""
    counts = generate(
        out,
        images=images,
        size=size,
        width=width,
        height=height,
        seed=seed,
        preset=cast(Preset, preset),
        bits=bits,
        masks=masks,
        with_prior=with_prior,
        file_format=cast(Format, file_format),
        workers=workers,
    )
    print(f"{out}: " + ", ".join(f"{n} {split}" for split, n in counts.items()) + " (synthetic, no patients)")
