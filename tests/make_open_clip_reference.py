"""Writes tests/data/open_clip_losses.json: losses and gradients of open_clip's ClipLoss and SigLipLoss.

    python tests/make_open_clip_reference.py

open_clip needs a torchvision that belongs to the installed PyTorch: run this in an environment that has both. The
features are drawn by Python's `random`, which gives the same numbers everywhere, and everything is computed in fp64.
"""

import json
import math
import random
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import normalize

REFERENCE = Path(__file__).parent / "data" / "open_clip_losses.json"
PAIRS, DIM = 7, 5
# The scale is learned by its logarithm, as in CLIP and SigLIP.
CASES: dict[str, dict[str, float]] = {
    "ClipLoss, scale 1/0.07": {"log_scale": math.log(1 / 0.07)},
    "ClipLoss, scale 100": {"log_scale": math.log(100)},
    "SigLipLoss, scale 10, bias -10": {"log_scale": math.log(10), "bias": -10.0},
    "SigLipLoss, scale 3, bias -1": {"log_scale": math.log(3), "bias": -1.0},
}


def inputs(case: str) -> dict[str, torch.Tensor]:
    """image, text [PAIRS, DIM], not normalised; log_scale []; bias [] of SigLipLoss. Leaves, in fp64."""
    draw = random.Random(0)
    rows = {name: [[draw.gauss(0, 2) for _ in range(DIM)] for _ in range(PAIRS)] for name in ("image", "text")}
    values = {**rows, **CASES[case]}
    return {name: torch.tensor(v, dtype=torch.float64, requires_grad=True) for name, v in values.items()}


def result(loss: torch.Tensor, leaves: dict[str, torch.Tensor]) -> dict[str, Any]:
    loss.backward()
    gradients = {name: leaf.grad for name, leaf in leaves.items()}
    return {
        "loss": float(loss.detach()),
        "gradients": {name: g.tolist() for name, g in gradients.items() if g is not None},
    }


def by_open_clip(case: str) -> dict[str, Any]:
    from open_clip.loss import ClipLoss, SigLipLoss

    leaves = inputs(case)
    features = normalize(leaves["image"], dim=-1), normalize(leaves["text"], dim=-1)
    scale = leaves["log_scale"].exp()
    loss = SigLipLoss()(*features, scale, leaves["bias"]) if "bias" in leaves else ClipLoss()(*features, scale)
    return result(loss, leaves)


def main() -> None:
    import open_clip

    versions = {"open_clip": open_clip.__version__, "torch": torch.__version__}
    found = {"versions": versions, "cases": {case: by_open_clip(case) for case in CASES}}
    REFERENCE.parent.mkdir(exist_ok=True)
    REFERENCE.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
