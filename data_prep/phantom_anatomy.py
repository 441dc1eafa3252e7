"""The chest phantom's anatomy: the patient frame, a canvas to draw in it, and the outlines of lungs, heart and bones.

Shapes are polygons in a patient frame whose unit is half the shorter image side: x from -1 to 1 towards the viewer's
right, which is the patient's LEFT on a frontal view; y from -1 (neck) to 1 (abdomen). Layers add up as attenuation.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

U8 = NDArray[Any]  # OpenCV's stubs do not say which dtype comes back
F32 = NDArray[Any]
Points = NDArray[np.float64]  # [K, 2]

SIDES = {"right": -1.0, "left": 1.0}  # the sign of x
ZONES = {"upper": -0.42, "middle": -0.1, "lower": 0.17}  # y of a zone's centre
COMPASS = [(1, 0), (0, 1), (-1, 0), (0, -1)]
MM_PER_UNIT = 200.0  # a thorax of 29 cm fills most of the picture


@dataclass(frozen=True)
class Finding:
    """What is drawn. ``size``: cardiothoracic ratio, share of the lung's height or width, or diameter in millimetres.

    ``seed`` fixes the shape, so that a follow-up shows the same lesion, grown or shrunk.
    """

    name: str
    side: str | None = None
    zone: str | None = None
    size: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Build:
    """One patient. Lengths in units of the patient frame."""

    sex: str = "M"
    half: float = 0.70  # from the midline to the inner chest wall
    wall: float = 0.15  # soft tissue outside the ribs
    apex: float = -0.80
    dome: float = 0.33  # y of the left dome; the right one is higher
    heart: float = 0.44  # cardiothoracic ratio when not enlarged
    rib_gap: float = 0.128
    rib_phase: float = 0.0
    seed: int = 0  # vessels and texture


@dataclass(frozen=True)
class Shot:
    """One exposure of a patient. ``rotation`` in units by which the heart leaves the midline, ``tilt`` in radians."""

    view: str = "PA"
    rotation: float = 0.0
    tilt: float = 0.0
    zoom: float = 1.0
    exposure: float = 1.0
    contrast: float = 1.0
    noise: float = 0.0
    marker: str | None = None
    seed: int = 0


@cache
def _catmull_rom(knots: int) -> NDArray[np.float64]:
    """Matrix [8 K, K] that takes K points of a closed uniform Catmull-Rom spline to 8 samples per span."""
    t = np.arange(8)[:, None] / 8
    basis = np.array([[0, 2, 0, 0], [-1, 0, 1, 0], [2, -5, 4, -1], [-1, 3, -3, 1]], float)
    weights = 0.5 * np.concatenate([t**0, t, t**2, t**3], 1) @ basis  # [8, 4]
    matrix = np.zeros((knots, 8, knots))
    for k in range(knots):
        for w in range(4):
            matrix[k, :, (k + w - 1) % knots] += weights[:, w]
    return matrix.reshape(-1, knots)


def curve(points: Sequence | Points, sign: float = 1.0) -> Points:
    """A closed smooth curve [8 K, 2] through [K, 2], mirrored for ``sign`` -1; a point given twice is a corner."""
    p = np.asarray(points, float)
    return _catmull_rom(len(p)) @ p * [sign, 1.0]


class Canvas:
    """Rasterises patient-frame shapes into pixels."""

    def __init__(self, width: int, height: int, shot: Shot) -> None:
        self.width, self.height = width, height
        self.unit = 0.5 * min(width, height) * shot.zoom  # pixels per unit
        c, s = np.cos(shot.tilt), np.sin(shot.tilt)
        self.matrix = self.unit * np.array([[c, s], [-s, c]])
        self.centre = np.array([width / 2 - 0.5, height / 2 - 0.5])

    def pixels(self, points: Points) -> NDArray[np.int32]:
        """Points [..., 2] in pixels, fixed point with 4 fractional bits."""
        return np.rint((points @ self.matrix + self.centre) * 16).astype(np.int32)

    def layer(self) -> U8:
        return np.zeros((self.height, self.width), np.uint8)

    def fill(self, polygons: Points, layer: U8 | None = None, value: int = 255) -> U8:
        """Fill a polygon [K, 2] or several [R, K, 2], which may overlap."""
        layer = self.layer() if layer is None else layer
        for polygon in self.pixels(np.asarray(polygons, float)).reshape(-1, *np.shape(polygons)[-2:]):
            cv2.fillPoly(layer, [polygon], value, cv2.LINE_AA, 4)
        return layer

    def stroke(self, lines: Sequence | Points, width: float, layer: U8 | None = None, value: int = 255) -> U8:
        """Open lines [R, K, 2], ``width`` in units, at least a pixel wide."""
        layer = self.layer() if layer is None else layer
        thickness = max(1, round(width * self.unit))
        cv2.polylines(layer, list(self.pixels(np.asarray(lines, float))), False, value, thickness, cv2.LINE_AA, 4)
        return layer

    def soften(self, layer: U8, sigma: float) -> F32:
        """Blur by ``sigma`` units and scale to 0..1. Wide blurs run on a smaller copy: the cost stays flat."""
        pixels, small = sigma * self.unit, layer
        factor = int(pixels // 2.5)
        if factor > 1:
            size = (max(8, self.width // factor), max(8, self.height // factor))
            small, pixels = cv2.resize(layer, size, interpolation=cv2.INTER_AREA), pixels / factor
        if pixels > 0.45:  # below, the drawn edges are as soft already
            small = cv2.GaussianBlur(small, (0, 0), pixels, borderType=cv2.BORDER_REPLICATE)
        if factor > 1:
            small = cv2.resize(small, (self.width, self.height), interpolation=cv2.INTER_LINEAR)
        soft = small.astype(np.float32)
        soft *= 1.0 / 255
        return soft

    def texture(self, rng: np.random.Generator, grain: float) -> F32:
        """Smooth noise of mean 0 and deviation about 0.6 with blobs of ``grain`` units."""
        shape = [max(3, int(side / (grain * self.unit)) + 2) for side in (self.height, self.width)]
        noise = rng.standard_normal(shape, dtype=np.float32)
        return cv2.resize(noise, (self.width, self.height), interpolation=cv2.INTER_CUBIC)


@dataclass
class Scene:
    """The picture while it is built. Fields are float32 [height, width]; masks of findings uint8 [height, width]."""

    canvas: Canvas
    build: Build
    shot: Shot
    findings: Sequence[Finding]
    lungs: dict[str, U8] = field(default_factory=dict)  # aerated lung including a pneumothorax
    outlines: dict[str, Points] = field(default_factory=dict)
    air: F32 = field(default_factory=lambda: np.zeros(0, np.float32))
    vessels: F32 = field(default_factory=lambda: np.zeros(0, np.float32))
    extra: F32 = field(default_factory=lambda: np.zeros(0, np.float32))
    metal: U8 = field(default_factory=lambda: np.zeros(0, np.uint8))
    masks: dict[int, U8] = field(default_factory=dict)

    def of(self, name: str, side: str | None = None) -> Finding | None:
        return next((f for f in self.findings if f.name == name and side in (None, f.side)), None)

    def clip(self, layer: U8, side: str) -> U8:
        return cv2.min(layer, self.lungs[side])


def lung_outline(s: Scene, side: str) -> Points:
    """Contour of a lung. The right dome is higher; atelectasis pulls its own dome up."""
    b, sign = s.build, SIDES[side]
    top, half = b.apex, b.half
    dome = b.dome - (0.055 if side == "right" else 0.0) - (0.09 if s.of("atelectasis", side) else 0.0)
    if s.shot.view == "AP":
        dome -= 0.05  # a shallower breath
    corner = (half, dome + 0.19)
    points = [(0.26, top), (0.42, top + 0.06), (0.80 * half, top + 0.26), (0.94 * half, -0.22), (0.99 * half, 0.1)]
    points += [corner, corner, (0.88 * half, dome + 0.075), (0.68 * half, dome + 0.004), (0.48 * half, dome)]
    points += [(0.3 * half, dome + 0.04), (0.13, dome + 0.12), (0.13, dome + 0.12), (0.10, 0.1), (0.09, -0.4)]
    return curve([*points, (0.13, top + 0.13)], sign)


def heart_outline(s: Scene) -> Points:
    """Two thirds of the width lie left of the midline; the width is the cardiothoracic ratio times the chest's."""
    enlarged = s.of("cardiomegaly")
    ratio = enlarged.size if enlarged else s.build.heart
    width = ratio * 2 * s.build.half
    r, l, y = 0.34 * width, 0.66 * width, s.build.dome - 0.33  # noqa: E741
    points = [(-0.5 * r, -0.3), (-0.82 * r, -0.1), (-r, 0.13), (-0.86 * r, 0.3), (-0.3 * r, 0.42), (0.35 * l, 0.45)]
    points += [(0.8 * l, 0.43), (0.97 * l, 0.36), (0.985 * l, 0.27), (0.86 * l, 0.1), (0.62 * l, -0.08)]
    points += [(0.16 + 0.1 * l, -0.22), (0.1, -0.32)]
    return curve(np.array(points) + np.array([s.shot.rotation, y]))


def vessel_layer(s: Scene) -> U8:
    """Branches that leave the hila and taper; the same for a patient in every study."""
    c, rng, layer = s.canvas, np.random.default_rng([s.build.seed, 3]), s.canvas.layer()
    t = np.linspace(0, 1, 7)[:, None, None]  # [7, 1, 1]
    for sign in SIDES.values():
        start = np.array([sign * 0.13 + s.shot.rotation, -0.08])
        start = np.tile(start, (11, 1)) + rng.normal(0, 0.025, (11, 2))
        angle = np.linspace(-1.35, 1.25, 11) + rng.normal(0, 0.08, 11)
        lines = start[None]
        for width, count in ((0.028, 0), (0.014, 2), (0.008, 2)):
            if count:  # each branch gives off two
                at = rng.uniform(0.35, 0.85, (count, len(angle)))
                knots = at * (len(lines) - 1)
                low = knots.astype(int)
                base = lines[low, np.arange(len(angle))[None]]  # [count, branches, 2]
                start = base.reshape(-1, 2)
                angle = (angle[None] + rng.choice([-0.5, 0.5], (count, len(angle))) * rng.uniform(0.6, 1.4)).ravel()
            length = rng.uniform(0.26, 0.46, len(angle)) * (1.0 if not count else 0.6)
            bend = angle[None, :, None] + t * rng.normal(0, 0.35, len(angle))[None, :, None]
            step = np.concatenate([sign * np.cos(bend), np.sin(bend)], 2) * length[None, :, None]
            lines = start + t * step  # [7, branches, 2]
            c.stroke(lines.transpose(1, 0, 2), width, layer, value=230 if not count else 150 if width > 0.01 else 105)
            if c.unit < 90:
                break
        hilum = curve([(0.1, -0.2), (0.2, -0.14), (0.22, -0.02), (0.17, 0.12), (0.1, 0.1)], sign)
        c.fill(hilum + np.array([s.shot.rotation, 0]), layer=layer, value=170)
    return layer


def rib_lines(s: Scene, side: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Centre lines of posterior ribs [10, 16, 2] and of anterior ribs [6, 12, 2]."""
    b, sign = s.build, SIDES[side]
    y0 = b.apex + 0.0 + b.rib_phase + b.rib_gap * np.arange(10)[:, None]
    t = np.linspace(0, 1, 16)[None]
    reach = b.half * np.clip(0.60 + 0.15 * np.arange(10), None, 1.01)[:, None]  # the cage narrows upwards
    x = 0.07 + (reach - 0.07) * np.sin(np.pi / 2 * t)
    y = y0 - 0.05 * np.sin(np.pi * np.clip(1.4 * t, 0, 1)) + (0.07 + 0.012 * np.arange(10)[:, None]) * t**3 * 1.3
    u = np.linspace(0, 1, 12)[None]
    first = slice(1, 7)
    ax = reach[first] - (reach[first] - 0.33) * (1 - np.cos(np.pi / 2 * u))
    ay = y[first, -1:] + (0.2 + 0.02 * np.arange(6)[:, None]) * np.sin(np.pi / 2 * u) ** 1.2
    return np.stack([sign * x, y], 2), np.stack([sign * ax, ay], 2)


def _ribbon(lines: NDArray[np.float64], width: float) -> NDArray[np.float64]:
    """Polygons [R, 2 K, 2] of ``width`` around centre lines [R, K, 2]."""
    along = np.empty_like(lines)
    along[:, 1:-1] = lines[:, 2:] - lines[:, :-2]
    along[:, 0], along[:, -1] = lines[:, 1] - lines[:, 0], lines[:, -1] - lines[:, -2]
    length = np.sqrt(along[..., :1] ** 2 + along[..., 1:] ** 2)
    normal = along[..., ::-1] * [-0.5 * width, 0.5 * width] / np.maximum(length, 1e-6)
    return np.concatenate([lines + normal, (lines - normal)[:, ::-1]], 1)


def bones(s: Scene, portable: bool) -> F32:
    """Ribs, clavicles, scapulae, shoulders and spine as attenuation."""
    c, dx = s.canvas, s.shot.rotation
    front, back = c.layer(), c.layer()
    for side, sign in SIDES.items():
        posterior, anterior = rib_lines(s, side)
        outlines = _ribbon(posterior, 0.046)
        broken = s.of("fracture", side)
        if broken is not None:
            outlines = _break(s, broken, posterior, outlines)
        c.fill(outlines, back, 120)
        c.stroke(outlines, 0.007, back, 185)  # the cortex
        c.fill(_ribbon(anterior, 0.05), front, 90)
        ends = [(0.07 + sign * dx, -0.60), (0.2, -0.665), (0.36, -0.655), (0.5, -0.70), (0.68, -0.80)]
        c.fill(_ribbon(np.array([ends]) * [sign, 1], 0.052), back, 210)
        inner = 0.56 if portable else 0.78  # in AP the shoulder blades lie over the lungs
        blade = [
            (inner + 0.08, -0.62),
            (inner + 0.26, -0.66),
            (inner + 0.3, -0.5),
            (inner + 0.12, -0.02),
            (inner, -0.2),
        ]
        c.fill(curve(blade, sign), layer=front, value=150 if portable else 80)
        head = [(1.02, -0.72), (1.13, -0.6), (1.02, -0.48), (0.91, -0.6)]
        c.fill(curve(head, sign), layer=front, value=170)
    spine = c.layer()
    c.fill(np.array([(-0.085, -3), (0.085, -3), (0.085, 3), (-0.085, 3)]), layer=spine, value=130)
    levels = np.arange(-1.15, 1.3, 0.135)[:, None, None] * [0, 1]  # [L, 1, 2]
    c.fill(levels + np.array([(-0.09, 0), (0.09, 0), (0.09, 0.025), (-0.09, 0.025)]), spine, 90)  # discs
    if c.unit > 90:
        for x in (-0.055, 0.055):  # pedicles
            c.stroke(levels + np.array([(x, 0.06), (x, 0.085)]), 0.03, spine, 165)
    total = c.soften(back, 0.004)
    total *= 0.19
    total += 0.15 * c.soften(front, 0.010)
    total += 0.19 * c.soften(spine, 0.008)
    return total


def _break(s: Scene, f: Finding, ribs: Points, outlines: Points) -> Points:
    """Outlines in which one rib is two displaced pieces; the mask is a disc around the gap."""
    rng = np.random.default_rng([f.seed, 5])
    number, at = int(rng.integers(3, 7)), int(rng.integers(6, 9))
    rib = ribs[number]
    inner, outer = rib[:at], rib[at:] + np.array([SIDES[f.side or "left"] * -0.02, 0.055])
    s.masks[s.findings.index(f)] = s.canvas.fill(curve((inner[-1] + outer[0]) / 2 + 0.1 * np.array(COMPASS)))
    # Both pieces are resampled to the length of a whole rib, so that all outlines stay one array.
    t = np.linspace(0, 1, rib.shape[0])
    pieces = [np.stack([np.interp(t, np.linspace(0, 1, len(p)), p[:, k]) for k in (0, 1)], 1) for p in (inner, outer)]
    return np.concatenate([np.delete(outlines, number, 0), _ribbon(np.array(pieces), 0.05)])
