"""Draws chest phantoms: frontal and lateral films, and the findings where they are said to be.

Layers add up as attenuation (bright is dense); ``phantom_anatomy`` has the patient frame and the outlines.
"""

from collections.abc import Callable, Sequence

import cv2
import numpy as np

from data_prep.phantom_anatomy import (
    F32,
    MM_PER_UNIT,
    SIDES,
    U8,
    ZONES,
    Build,
    Canvas,
    Finding,
    Scene,
    Shot,
    bones,
    curve,
    heart_outline,
    lung_outline,
    vessel_layer,
)


def draw(build: Build, shot: Shot, findings: Sequence[Finding], width: int, height: int) -> tuple[F32, dict[int, U8]]:
    """Picture float32 [height, width] in 0..1 (bone white) and, by the finding's number, its mask uint8 0/1."""
    # Small pictures are drawn larger for clean edges; large ones are drawn smaller and get their noise at full size,
    # which is also where the time goes.
    side = min(width, height)
    scale = 1.5 if side < 160 else 1.0 if side <= 320 else max(320 / side, 0.625)
    canvas = Canvas(round(width * scale), round(height * scale), shot)
    scene = Scene(canvas, build, shot, findings)
    scene.extra = np.zeros((canvas.height, canvas.width), np.float32)
    scene.metal = canvas.layer()
    density = _lateral(scene) if shot.view == "LATERAL" else _frontal(scene)
    # Film: exposure scales the attenuation, the toe and shoulder of the curve keep air black and metal white.
    density = (density - 0.42) * (shot.contrast * shot.exposure) + 0.42 * shot.exposure
    metal = canvas.soften(scene.metal, 0.003)
    density += (0.98 - density) * (0.92 * metal)
    _markers(canvas, shot, density)
    if scale != 1:
        density = cv2.resize(density, (width, height), interpolation=cv2.INTER_AREA if scale > 1 else cv2.INTER_CUBIC)
    noise = np.random.default_rng([shot.seed, 1]).standard_normal((height, width), dtype=np.float32)
    noise *= shot.noise
    density += noise
    return np.clip(density, 0, 1, out=density), {n: _resize_mask(m, width, height) for n, m in scene.masks.items()}


def _resize_mask(mask: U8, width: int, height: int) -> U8:
    if mask.shape != (height, width):
        mask = cv2.resize(mask, (width, height), interpolation=cv2.INTER_LINEAR)
    return cv2.threshold(mask, 127, 1, cv2.THRESH_BINARY)[1]


def _frontal(s: Scene) -> F32:
    c, b, dx = s.canvas, s.build, s.shot.rotation
    portable = s.shot.view == "AP"
    for side in SIDES:
        s.outlines[side] = lung_outline(s, side)
        s.lungs[side] = c.fill(s.outlines[side])
    wall = b.half + b.wall
    trunk = [(0.2, -3), (0.21, -0.98), (0.3, -0.9), (0.62, -0.84), (1.0, -0.74), (1.5, -0.6), (1.5, -0.05)]
    trunk += [(1.02, -0.08), (wall + 0.02, 0.12), (wall, 0.5), (wall + 0.03, 1.0), (wall + 0.05, 3.0)]
    half_trunk = np.array(trunk)
    body = c.soften(c.fill(np.concatenate([half_trunk, half_trunk[::-1] * [-1, 1]])), 0.012)
    heart_mask = c.fill(heart_outline(s))
    heart = c.soften(heart_mask, 0.010)
    great = [(-0.10, -3), (-0.10, -0.62), (-0.135, -0.4), (-0.13, -0.1), (-0.05, 0.1), (0.1, 0.1), (0.16, -0.12)]
    great += [(0.175, -0.22), (0.135, -0.28), (0.185, -0.38), (0.16, -0.46), (0.10, -0.54), (0.09, -0.62), (0.09, -3)]
    middle = c.soften(c.fill(curve(np.array(great) + np.array([0.8 * dx, 0]))), 0.012)
    solid = np.maximum(heart, middle)
    lungs = cv2.max(s.lungs["left"], s.lungs["right"])
    s.air = c.soften(lungs, 0.006)
    s.vessels = s.air * c.soften(vessel_layer(s), 0.006)
    s.vessels *= 1 - 0.6 * heart
    _apply(s)
    s.air *= 1 - 0.78 * solid
    s.vessels *= 0.17
    rng = np.random.default_rng([b.seed, 2])
    density = 0.60 * body
    y = np.linspace(-1, 1, c.height, dtype=np.float32)[:, None] * (c.height / 2 / c.unit)
    density += body * np.clip(0.12 * (y - 0.25), -0.02, 0.09)  # the abdomen is thicker
    s.air *= 0.44 + 0.022 * c.texture(rng, 0.09)
    density -= s.air
    density += 0.13 * solid
    density += s.vessels
    density += bones(s, portable) * body
    if b.sex == "F":
        breast = curve([(0.2, 0.25), (0.3, 0.5), (0.52, 0.6), (0.74, 0.52), (0.82, 0.25), (0.6, -0.05)])
        density += 0.06 * c.soften(c.fill(np.stack([breast, breast * [-1, 1]])), 0.03)
    airway = c.stroke([np.array([(0.7 * dx, -1.3), (dx * 0.8 - 0.01, -0.62), (dx - 0.015, -0.3)])], 0.085)
    bronchi = [np.array([(dx - 0.015, -0.3), (dx - 0.2, -0.12)]), np.array([(dx - 0.015, -0.3), (dx + 0.2, -0.14)])]
    density -= 0.11 * c.soften(c.stroke(bronchi, 0.04, airway), 0.012)
    if rng.random() < 0.6:  # gas in the stomach under the left dome
        x0, y0 = 0.4 + rng.uniform(-0.05, 0.1), b.dome + 0.22
        bubble = curve([(x0 - 0.13, y0), (x0, y0 - 0.09), (x0 + 0.14, y0), (x0, y0 + 0.07)])
        density -= 0.13 * c.soften(c.fill(bubble), 0.03)
    density += s.extra
    if (f := s.of("cardiomegaly")) is not None:
        s.masks[s.findings.index(f)] = heart_mask
    return density


def _markers(c: Canvas, shot: Shot, density: F32) -> None:
    """Lead letters: the side at the patient's side, and AP where the film was taken so."""
    scale, thick = c.unit / 250, max(1, round(c.unit / 110))
    texts = [("AP", (0.68, -0.88))] if shot.view == "AP" else []
    if shot.marker and shot.view != "LATERAL":
        texts.append((shot.marker, (-0.93 if shot.marker == "R" else 0.84, -0.72 if shot.marker == "L" else -0.88)))
    for text, where in texts:
        at = np.array(where) * c.unit + c.centre
        lead = c.layer()
        cv2.putText(lead, text, (int(at[0]), int(at[1])), cv2.FONT_HERSHEY_DUPLEX, scale, 255, thick, cv2.LINE_AA)
        density += (0.97 - density) * c.soften(lead, 0)


def _apply(s: Scene) -> None:
    """Findings of the lungs, pleura and devices, in an order that lets each stay visible."""
    for name, paint in PAINTERS.items():
        for number, f in enumerate(s.findings):
            if f.name == name:
                s.masks[number] = paint(s, f)


def blob(centre: tuple[float, float], rx: float, ry: float, rough: float, rng: np.random.Generator) -> np.ndarray:
    """An irregular closed outline [96, 2]."""
    angle = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    radius = 1 + rough * rng.uniform(-1, 1, 12)
    return curve(np.stack([centre[0] + rx * radius * np.cos(angle), centre[1] + ry * radius * np.sin(angle)], 1))


def _effusion(s: Scene, f: Finding) -> U8:
    """Fluid below a meniscus that climbs the chest wall; ``size`` is its height over the lung's."""
    sign, b = SIDES[f.side or "left"], s.build
    floor = s.outlines[f.side or "left"][:, 1].max()
    level = floor - f.size * (floor - b.apex)
    top = [
        (b.half + 0.1, level - 0.14),
        (0.97 * b.half, level - 0.07),
        (0.86 * b.half, level),
        (0.6 * b.half, level + 0.055),
    ]
    top += [(0.3 * b.half, level + 0.07), (0.0, level + 0.07), (0.0, 1.2), (b.half + 0.1, 1.2)]
    mask = s.clip(s.canvas.fill(np.array(top) * [sign, 1]), f.side or "left")
    fluid = s.canvas.soften(mask, 0.008)
    s.air *= 1 - 0.98 * fluid
    s.vessels *= 1 - fluid
    s.extra += 0.05 * fluid
    return mask


def _pneumothorax(s: Scene, f: Finding) -> U8:
    """The lung shrinks towards its hilum; air without vessels and a thin pleural line stay around it."""
    side = f.side or "left"
    c, sign, outline = s.canvas, SIDES[side], s.outlines[side]
    hilum = np.array([sign * 0.1, 0.05])
    offset = outline - hilum
    collapsed = hilum + offset * np.stack(
        [np.full(len(offset), 1 - f.size), np.where(offset[:, 1] < 0, 1 - 0.9 * f.size, 1.0)], 1
    )
    # Air collects at the apex and the side; towards the base it thins out, and fluid replaces it.
    lung = c.fill(collapsed)
    mask = cv2.subtract(s.lungs[side], lung)
    outer = c.fill(np.array([(sign * 0.1, -3), (sign * 3, -3), (sign * 3, 3), (sign * 0.6, 3), (sign * 0.2, -0.5)]))
    mask = cv2.min(mask, outer)
    for number, other in enumerate(s.findings):
        if other.name == "effusion" and other.side == side:
            mask = cv2.subtract(mask, s.masks[number])
    air = c.soften(mask, 0.005)
    edge = cv2.min(
        c.stroke([np.vstack([collapsed, collapsed[:1]])], 0.011), cv2.dilate(mask, np.ones((3, 3), np.uint8))
    )
    line = c.soften(edge, 0.003)
    s.vessels *= 1 - air
    s.air *= 1 + 0.42 * air - 0.10 * f.size * c.soften(lung, 0.02)
    s.extra += 0.15 * line
    return mask


def _shrunk(s: Scene, f: Finding, x: float, y: float) -> tuple[float, float]:
    """A point of the lung, moved with it where a pneumothorax has made the lung smaller."""
    sign, air = SIDES[f.side or "left"], s.of("pneumothorax", f.side)
    k = 0.0 if air is None else air.size
    return sign * (0.1 + (x - 0.1) * (1 - k)), 0.05 + (y - 0.05) * (1 - 0.9 * k if y < 0.05 else 1.0)


def place(s: Scene, f: Finding, rng: np.random.Generator) -> tuple[float, float]:
    """Centre of a lesion in its zone, beside the heart rather than behind it."""
    zone = f.zone or "middle"
    x = {"upper": 0.38, "middle": 0.37, "lower": 0.5 if f.side == "left" else 0.42}[zone]
    if zone == "lower" and f.side == "left" and s.of("cardiomegaly"):
        x += 0.05
    return _shrunk(s, f, x + rng.uniform(-0.03, 0.03), ZONES[zone] + rng.uniform(-0.03, 0.03))


def _consolidation(s: Scene, f: Finding) -> U8:
    """A patchy dense zone with air bronchograms; ``size`` is its height in units."""
    side, c, rng = f.side or "left", s.canvas, np.random.default_rng([f.seed, 6])
    centre = place(s, f, rng)
    rx = min(0.62 * f.size, 0.24) * (0.8 if s.of("pneumothorax", side) else 1.0)
    mask = s.clip(c.fill(blob(centre, rx, 0.5 * f.size, 0.16, rng)), side)
    field = c.soften(mask, 0.022)
    field *= 0.85 + 0.16 * c.texture(rng, 0.05)
    np.clip(field, 0, 1, out=field)
    s.air *= 1 - 0.78 * field
    s.extra += 0.06 * field
    s.vessels *= 1 - 0.7 * field
    if c.unit > 90:
        root = np.array([SIDES[side] * 0.14, -0.02])
        ends = [
            np.array(centre) + np.array([0.6 * rx * np.cos(a), 0.35 * f.size * np.sin(a)])
            for a in rng.uniform(0, 6.3, 4)
        ]
        steps = np.array([0.35, 0.6, 0.8, 1.0])[:, None]
        tubes = [root + (end - root) * steps + np.array([0, 0.02]) * np.sin(5 * steps) for end in ends]
        s.extra -= 0.10 * c.soften(c.stroke(tubes, 0.014), 0.005) * field
    return mask


def _edema(s: Scene, f: Finding) -> U8:
    """Bat wings around both hila and Kerley B lines at the bases; ``size`` 0..1 is the strength."""
    c, layer, rng = s.canvas, s.canvas.layer(), np.random.default_rng([f.seed, 7])
    lines = []
    for sign in SIDES.values():
        wing = [(0.1, -0.32), (0.3, -0.42), (0.5, -0.2), (0.54, 0.05), (0.4, 0.24), (0.12, 0.3)]
        c.fill(curve(wing, sign), layer=layer)
        lines += [
            np.array([(sign * x, y), (sign * (x - rng.uniform(0.06, 0.1)), y + 0.004)])
            for x, y in zip([0.975 * s.build.half] * 7, 0.02 + 0.045 * np.arange(7), strict=True)
        ]
    mask = cv2.min(layer, cv2.max(s.lungs["left"], s.lungs["right"]))
    haze = c.soften(layer, 0.09)
    haze *= f.size * (1 + 0.16 * c.texture(rng, 0.03))
    s.air *= np.clip(1 - 1.05 * haze - 0.12 * f.size, 0.08, 1)
    both = cv2.max(s.lungs["left"], s.lungs["right"])
    s.extra += 0.03 * haze
    s.extra += 0.16 * c.soften(cv2.min(c.stroke(lines, 0.007), both), 0.003)
    return mask


def _atelectasis(s: Scene, f: Finding) -> U8:
    """Plates above a dome that is drawn up (``lung_outline``)."""
    side, c, rng = f.side or "left", s.canvas, np.random.default_rng([f.seed, 8])
    sign, top = SIDES[side], s.build.dome - 0.2
    first = 0.38 if side == "left" else 0.26
    plates = []
    for n in range(2):
        y = top - 0.02 - 0.09 * n + rng.uniform(-0.02, 0.02)
        inner, outer = first + rng.uniform(-0.04, 0.04), s.build.half - 0.05 - 0.06 * n
        plates.append(np.array([(sign * inner, y + 0.05), (sign * (inner + outer) / 2, y), (sign * outer, y + 0.015)]))
    mask = s.clip(c.stroke(plates, 0.028), side)
    s.extra += 0.27 * c.soften(mask, 0.006)
    return mask


def _nodule(s: Scene, f: Finding) -> U8:
    """Round and well seen, or larger and spiculated for a mass; ``size`` is the diameter in millimetres."""
    side, c, rng = f.side or "left", s.canvas, np.random.default_rng([f.seed, 9])
    centre, radius = place(s, f, rng), f.size / 2 / MM_PER_UNIT
    mask = s.clip(c.fill(blob(centre, radius, radius, 0.05 if f.name == "nodule" else 0.14, rng)), side)
    layer = mask
    if f.name == "mass":
        spikes = [
            np.array([centre, np.add(centre, 1.35 * radius * np.array([np.cos(a), np.sin(a)]))])
            for a in rng.uniform(0, 6.3, 12)
        ]
        layer = s.clip(c.stroke(spikes, 0.008, mask.copy()), side)
    field = c.soften(layer, 0.007)
    s.air *= 1 - 0.45 * field
    s.extra += 0.15 * field
    return mask


def _pacemaker(s: Scene, f: Finding) -> U8:
    """A generator under the clavicle and a lead through the superior vena cava to the right ventricle."""
    c, sign = s.canvas, SIDES[f.side or "left"]
    can = c.fill(
        curve(
            [(0.44, -0.60), (0.56, -0.60), (0.625, -0.55), (0.625, -0.47), (0.55, -0.42), (0.45, -0.43), (0.42, -0.5)],
            sign,
        )
    )
    x = s.shot.rotation
    path = [(sign * 0.44, -0.5), (sign * 0.3, -0.62), (0.12 * sign - 0.04, -0.58), (x - 0.1, -0.42), (x - 0.12, 0.0)]
    path += [(x - 0.06, 0.2), (x + 0.2, 0.3), (x + 0.2, 0.3)]
    lead = curve(path)[:49]
    c.stroke([lead], 0.013, s.metal)
    c.stroke([lead[-3:]], 0.026, s.metal)
    s.metal[:] = cv2.max(s.metal, can // 20 * 19)
    return can


def _tube(s: Scene, f: Finding) -> U8:
    """Lines and tubes: endotracheal tube, central venous line, chest tube."""
    c, sign, x = s.canvas, SIDES[f.side or "right"], s.shot.rotation
    line, width, value = {
        "endotracheal tube": ([(0.03, -1.6), (0.7 * x, -0.85), (x - 0.01, -0.45), (x - 0.01, -0.42)], 0.036, 150),
        "central line": (
            [(sign * 0.26, -1.3), (sign * 0.2, -0.9), (sign * 0.11 - 0.03, -0.6), (x - 0.12, -0.4), (x - 0.125, -0.1)],
            0.014,
            235,
        ),
        "chest tube": (
            [(sign * 1.1, 0.2), (sign * 0.8, 0.08), (sign * 0.62, -0.2), (sign * 0.42, -0.56), (sign * 0.32, -0.66)],
            0.032,
            160,
        ),
    }[f.name]
    path = curve([line[0], *line, line[-1]])[8 : 8 * len(line) + 1]
    mask = c.stroke([path], width)
    layer = cv2.convertScaleAbs(mask, alpha=value / 255)
    c.stroke([path], 0.008, layer)  # the radiopaque stripe
    s.metal[:] = cv2.max(s.metal, layer)
    return mask


# In this order each finding stays visible: a pneumothorax ends at the fluid, lesions sit in the lung that is left.
PAINTERS: dict[str, Callable[[Scene, Finding], U8]] = {
    "edema": _edema,
    "consolidation": _consolidation,
    "atelectasis": _atelectasis,
    "nodule": _nodule,
    "mass": _nodule,
    "effusion": _effusion,
    "pneumothorax": _pneumothorax,
    "pacemaker": _pacemaker,
    "endotracheal tube": _tube,
    "central line": _tube,
    "chest tube": _tube,
}
LATERAL_FINDINGS = ("cardiomegaly", "effusion", "consolidation", "nodule", "mass", "edema", "pacemaker")


def _lateral(s: Scene) -> F32:
    """The patient faces the viewer's left. Sides cannot be told apart, so findings carry none."""
    c, b = s.canvas, s.build
    rng = np.random.default_rng([b.seed, 4])
    deep = 0.04 * (b.wall - 0.15) / 0.05
    trunk = [(-0.18, -3), (-0.2, -0.95), (-0.5, -0.7), (-0.66 - deep, -0.25), (-0.68 - deep, 0.3), (-0.7 - deep, 3)]
    trunk += [(0.78 + deep, 3), (0.8 + deep, 0.2), (0.8, -0.35), (0.66, -0.72), (0.4, -0.98), (0.36, -3)]
    body = c.soften(c.fill(np.array(trunk)), 0.012)
    dome = b.dome - 0.05
    chest = [(0.0, -0.82), (-0.25, -0.62), (-0.45, -0.3), (-0.53, 0.05), (-0.5, dome + 0.12), (-0.5, dome + 0.12)]
    chest += [(-0.3, dome - 0.02), (-0.02, dome - 0.02), (0.3, dome + 0.1), (0.6, dome + 0.38), (0.6, dome + 0.38)]
    chest += [(0.66, 0.2), (0.62, -0.3), (0.45, -0.68), (0.2, -0.84)]
    outline = curve(chest)
    lung = c.fill(outline)
    s.lungs = {"left": lung, "right": lung}
    s.air, s.vessels = c.soften(lung, 0.006), np.zeros_like(s.extra)
    enlarged = s.of("cardiomegaly")
    width = (enlarged.size if enlarged else b.heart) * 2 * b.half
    y0, rx, ry = dome - 0.17, 0.40 * width, 0.37 * width**0.7
    x0 = -0.46 + rx
    t = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    oval = np.stack([x0 + rx * np.cos(t) - 0.3 * ry * np.sin(t) + 0.06, y0 + ry * np.sin(t)], 1)
    heart_mask = c.fill(curve(oval))
    great = [(-0.16, -0.45), (-0.05, -0.52), (0.08, -0.48), (0.14, -0.36), (0.1, -0.1), (-0.05, 0.0), (-0.22, -0.1)]
    solid = np.maximum(c.soften(heart_mask, 0.012), 0.6 * c.soften(c.fill(curve(great)), 0.03))
    hila = c.soften(c.stroke([np.array([(0.04, -0.14), (0.0, -0.02)])], 0.13), 0.035)
    if (f := s.of("edema")) is not None:
        haze = c.soften(c.fill(blob((0.08, -0.05), 0.33, 0.3, 0.1, rng)), 0.09)
        s.air *= 1 - 0.8 * f.size * haze * (1 + 0.2 * c.texture(rng, 0.035))
        hila *= 1 + f.size
        s.masks[s.findings.index(f)] = s.clip(c.fill(blob((0.08, -0.05), 0.33, 0.3, 0.0, rng)), "left")
    for number, f in enumerate(s.findings):
        shape = np.random.default_rng([f.seed, 6])
        if f.name == "cardiomegaly":
            s.masks[number] = heart_mask
        elif f.name == "effusion":  # the posterior angle fills first
            floor = float(outline[:, 1].max())
            level = floor - (0.12 + 0.75 * f.size)
            pool = [
                (0.9, level - 0.12),
                (0.62, level - 0.03),
                (0.48, level + 0.03),
                (0.2, level + 0.06),
                (-0.6, level + 0.08),
            ]
            mask = s.clip(c.fill(np.array([*pool, (-0.6, 1.2), (0.9, 1.2)])), "left")
            fluid = c.soften(mask, 0.008)
            s.air *= 1 - 0.95 * fluid
            s.extra += 0.04 * fluid
            s.masks[number] = mask
        elif f.name in ("consolidation", "nodule", "mass"):
            where = {"upper": (0.12, -0.5), "middle": (-0.16, 0.02), "lower": (0.32, 0.12)}[f.zone or "middle"]
            r = 0.5 * f.size if f.name == "consolidation" else f.size / 2 / MM_PER_UNIT
            mask = s.clip(c.fill(blob(where, r, r, 0.15 if f.name == "consolidation" else 0.06, shape)), "left")
            lesion = c.soften(mask, 0.03 if f.name == "consolidation" else 0.008)
            s.air *= 1 - 0.6 * lesion
            s.extra += 0.1 * lesion
            s.masks[number] = mask
        elif f.name == "pacemaker":
            can = c.fill(
                curve([(-0.56, -0.5), (-0.5, -0.52), (-0.42, -0.36), (-0.44, -0.32), (-0.5, -0.32), (-0.57, -0.46)])
            )
            lead = curve(
                [(-0.48, -0.45), (-0.2, -0.62), (-0.02, -0.5), (0.0, -0.1), (-0.12, 0.12), (-0.36, 0.2), (-0.36, 0.2)]
            )[:41]
            c.stroke([lead], 0.013, s.metal)
            s.metal[:] = cv2.max(s.metal, can)
            s.masks[number] = can
    spine = c.layer()
    for n in range(-3, 12):  # vertebral bodies along the kyphosis
        y = -0.95 + 0.15 * n
        x = 0.44 + 0.16 * np.sin(1.2 * (y + 0.75))
        c.fill(
            np.array([(x - 0.085, y), (x + 0.085, y + 0.015), (x + 0.085, y + 0.13), (x - 0.085, y + 0.115)]),
            layer=spine,
            value=200,
        )
    ribs = c.layer()
    for n in range(9):
        y = b.apex + 0.02 + b.rib_phase + b.rib_gap * n
        arc = np.array([(0.58, y), (0.66, y + 0.06), (0.4, y + 0.28), (0.0, y + 0.48), (-0.3, y + 0.5)])
        c.stroke([curve([arc[0], *arc, arc[-1]])[8:41]], 0.036, ribs, 90)
    s.air *= 1 - 0.72 * solid
    s.air *= 0.40 + 0.03 * c.texture(rng, 0.06)
    rows = np.linspace(-1, 1, c.height, dtype=np.float32)[:, None] * (c.height / 2 / c.unit)
    density = body * (0.60 - 0.07 * np.clip(rows, -0.5, 0.6)) - s.air + 0.1 * solid + 0.1 * hila * s.air * 2.5
    density += body * (0.17 * c.soften(spine, 0.008) + 0.11 * cv2.min(c.soften(ribs, 0.005), s.air * 4))
    front = np.array([(-0.28, -0.66), (-0.5, -0.3), (-0.585, 0.05), (-0.58, 0.25)])
    density += 0.14 * c.soften(c.stroke([front], 0.04), 0.008)
    shoulder = [(0.1, -0.95), (0.4, -0.95), (0.5, -0.62), (0.25, -0.5), (0.05, -0.65)]
    density += 0.09 * c.soften(c.fill(curve(shoulder)), 0.03)
    density -= 0.10 * c.soften(c.stroke([np.array([(0.02, -1.2), (0.03, -0.6), (0.05, -0.25)])], 0.075), 0.012)
    second = curve(
        [
            (-0.5, dome + 0.1),
            (-0.28, dome - 0.06),
            (0.0, dome - 0.08),
            (0.3, dome + 0.03),
            (0.6, dome + 0.33),
            (0.6, dome + 0.33),
        ]
    )[:33]
    density += 0.13 * c.soften(s.clip(c.fill(np.vstack([second, [(0.6, 1.2), (-0.6, 1.2)]])), "left"), 0.008)
    return density + s.extra
