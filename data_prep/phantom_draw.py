"""Draws frontal chest phantoms: smooth attenuation fields, patient variation, findings where they are said to be.

Coordinates: x from -1 to 1 towards the viewer's right, which is the patient's left; y from -1 (top) to 1.
"""

from dataclasses import dataclass, field

import numpy as np

SIDES = {"right": -1.0, "left": 1.0}  # the sign of x
ZONES = {"upper": -0.42, "middle": -0.1, "lower": 0.2}  # y of a zone's centre


@dataclass(frozen=True)
class Finding:
    """``size`` is the share of the lung's height (or the cardiothoracic ratio); side, zone where they apply."""

    name: str
    side: str | None = None
    zone: str | None = None
    size: float = 0.0
    severity: str | None = None


@dataclass(frozen=True)
class Anatomy:
    """One patient's build. Lengths in half widths of the image."""

    width: float = 0.84
    lung: float = 0.31
    top: float = -0.72
    base: float = 0.5
    heart: float = 0.46
    rib_phase: float = 0.0
    rotation: float = 0.0
    exposure: float = 1.0
    noise: float = 0.02
    marker: str | None = None
    findings: tuple[Finding, ...] = field(default_factory=tuple)


def soft(value: np.ndarray, edge: float) -> np.ndarray:
    """A step from 0 to 1 at zero, about ``edge`` wide."""
    return 0.5 * (1 + np.tanh(value / edge))


def draw(a: Anatomy, width: int, height: int, rng: np.random.Generator) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Picture float32 [height, width] in 0..1 (bone white) and the findings' masks by number, bool."""
    x = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    x = x + a.rotation * (y + 0.2)
    edge = max(0.012, 2.0 / height)
    neck = 0.2 + (a.width - 0.2) * soft(y + 0.72 + 0.0 * x, 0.1)
    body = soft(neck - np.abs(x), 0.04)
    picture = 0.52 * body - 0.06 * body * (x / a.width) ** 2
    lungs = {side: lung_field(a, x, y, sign, edge) for side, sign in SIDES.items()}
    both = lungs["left"] + lungs["right"]
    picture = picture - 0.36 * both
    vessels = np.exp(-(((np.abs(x) - 0.2) / 0.16) ** 2) - ((y + 0.02) / 0.24) ** 2)
    picture = picture + 0.1 * both * vessels
    picture = picture + 0.2 * np.exp(-((x / 0.085) ** 2)) * body + 0.1 * soft(0.17 - np.abs(x), 0.03) * body
    picture = picture - 0.1 * soft(0.035 - np.abs(x + 0.01), 0.012) * soft(-0.1 - y, 0.05)  # trachea
    ratio = next((f.size for f in a.findings if f.name == "cardiomegaly"), a.heart)
    heart = heart_field(a, x, y, ratio, edge)
    picture = np.maximum(picture, picture * (1 - heart) + heart * 0.62)
    # Posterior ribs slope down and outwards; one periodic field draws them all.
    phase = (y - 0.35 * np.abs(x) ** 1.5 + a.rib_phase) / 0.155
    cage = soft(a.width - 0.06 - np.abs(x), 0.03) * soft(a.base - y, 0.05) * soft(y + 0.8, 0.05)
    picture = picture + 0.075 * np.clip(np.cos(2 * np.pi * phase), 0, 1) ** 2 * cage
    clavicle = np.abs(y + 0.7 + 0.16 * np.abs(x)) - 0.028
    picture = picture + 0.16 * soft(-clavicle, 0.012) * soft(0.72 - np.abs(x), 0.03) * soft(np.abs(x) - 0.07, 0.02)
    masks: dict[int, np.ndarray] = {}
    for number, finding in enumerate(a.findings):
        change = np.zeros_like(picture) + heart if finding.name == "cardiomegaly" else None
        if change is None:
            picture, change = FINDINGS[finding.name](finding, a, picture, x, y, lungs, edge)
        masks[number] = np.broadcast_to(change, picture.shape) > 0.5
    picture = picture * a.exposure + 0.04
    picture = picture + a.noise * rng.standard_normal(picture.shape, dtype=np.float32)
    return np.clip(picture, 0, 1), masks


def dome(a: Anatomy, x: np.ndarray, sign: float) -> np.ndarray:
    """y of the diaphragm; the right one is higher."""
    centre = sign * (0.14 + a.lung)
    return a.base + (0.05 if sign > 0 else 0.0) - 0.14 * (1 - ((x - centre) / a.lung) ** 2)


def lung_field(a: Anatomy, x: np.ndarray, y: np.ndarray, sign: float, edge: float) -> np.ndarray:
    middle, half = (a.top + a.base) / 2 + 0.1, (a.base - a.top) / 2 + 0.12
    inside = 1 - ((x - sign * (0.13 + a.lung)) / a.lung) ** 2 - np.clip((middle - y) / half, 0, None) ** 2.6
    return soft(inside, 6 * edge) * soft(dome(a, x, sign) - y, edge)


def heart_field(a: Anatomy, x: np.ndarray, y: np.ndarray, ratio: float, edge: float) -> np.ndarray:
    """``ratio`` is the cardiothoracic ratio: the heart's width over the inner width of the chest."""
    chest = 2 * (0.13 + 2 * a.lung)
    half = ratio * chest / 2
    centre = 0.3 * half  # two thirds lie left of the midline
    tilt = y - 0.22 - 0.18 * (x - centre)
    return soft(1 - ((x - centre) / half) ** 2 - (tilt / (0.26 + 0.2 * half)) ** 2, 5 * edge)


def _effusion(f, a, picture, x, y, lungs, edge):  # type: ignore[no-untyped-def]
    sign = SIDES[f.side]
    outer = sign * (0.13 + 2 * a.lung)
    level = a.base + 0.05 - f.size * (a.base - a.top)
    meniscus = level - 0.12 * np.exp(-(((x - outer) / 0.16) ** 2)) + 0.05 * np.exp(-(((x - sign * 0.2) / 0.16) ** 2))
    whole = lung_field(_deep(a), x, y, sign, edge)
    mask = whole * soft(y - meniscus, edge)
    return picture * (1 - mask) + mask * 0.66, mask


def _deep(a: Anatomy) -> Anatomy:
    """The pleural space reaches below the lung."""
    return Anatomy(a.width, a.lung, a.top, a.base + 0.06)


def _pneumothorax(f, a, picture, x, y, lungs, edge):  # type: ignore[no-untyped-def]
    sign = SIDES[f.side]
    inner = Anatomy(a.width, a.lung * (1 - f.size), a.top + 0.9 * f.size, a.base)
    collapsed = lung_field(inner, x, y, sign, edge)
    air = np.clip(lungs[f.side] - collapsed, 0, 1) * soft(0.32 - y, 0.1)
    line = np.exp(-(((collapsed - 0.5) / 0.3) ** 2)) * lungs[f.side] * soft(0.32 - y, 0.1)
    return picture * (1 - air) + air * 0.04 + 0.12 * line * (1 - air), air


def _consolidation(f, a, picture, x, y, lungs, edge):  # type: ignore[no-untyped-def]
    sign = SIDES[f.side]
    distance = ((x - sign * (0.15 + a.lung)) / 0.2) ** 2 + ((y - ZONES[f.zone]) / (0.5 * f.size)) ** 2
    texture = 0.85 + 0.15 * np.sin(23 * x + 3 * np.sin(17 * y))
    mask = soft(1 - distance, 0.2) * lungs[f.side] * texture
    return picture + 0.3 * mask, mask


def _pacemaker(f, a, picture, x, y, lungs, edge):  # type: ignore[no-untyped-def]
    sign = SIDES[f.side]
    box = np.maximum(np.abs(x - sign * 0.52) / 0.12, np.abs(y + 0.5) / 0.1)
    can = soft(1 - box, 6 * edge)
    lead = np.exp(-(((x - sign * (0.36 - 0.5 * (y + 0.5))) / 0.016) ** 2)) * soft(y + 0.5, edge) * soft(0.2 - y, edge)
    mask = np.maximum(can, lead)
    return picture * (1 - mask) + mask * 0.98, can


def _nodule(f, a, picture, x, y, lungs, edge):  # type: ignore[no-untyped-def]
    sign = SIDES[f.side]
    distance = ((x - sign * (0.17 + a.lung)) ** 2 + (y - ZONES[f.zone]) ** 2) ** 0.5
    mask = soft(f.size / 2 - distance, edge) * np.broadcast_to(lungs[f.side], picture.shape)
    return picture + 0.28 * mask, mask


def _edema(f, a, picture, x, y, lungs, edge):  # type: ignore[no-untyped-def]
    wings = np.exp(-(((np.abs(x) - 0.28) / 0.2) ** 2) - ((y + 0.02) / 0.35) ** 2) * (lungs["left"] + lungs["right"])
    kerley = 0.15 * np.clip(np.sin(90 * y), 0, 1) * soft(np.abs(x) - 0.55, 0.03) * soft(y - 0.1, 0.05)
    return picture + (0.12 + f.size) * wings + kerley * wings.max() * (lungs["left"] + lungs["right"]), 1.2 * wings


def _atelectasis(f, a, picture, x, y, lungs, edge):  # type: ignore[no-untyped-def]
    band = np.abs(y - ZONES[f.zone] - 0.12 - 0.12 * (np.abs(x) - 0.4)) - 0.022
    mask = soft(-band, edge) * lungs[f.side] * soft(0.22 - np.abs(np.abs(x) - 0.42), 0.03)
    return picture + 0.26 * mask, mask


FINDINGS = {
    "effusion": _effusion,
    "pneumothorax": _pneumothorax,
    "consolidation": _consolidation,
    "pacemaker": _pacemaker,
    "nodule": _nodule,
    "edema": _edema,
    "atelectasis": _atelectasis,
}
