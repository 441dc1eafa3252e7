"""Runs as Hugging Face folders. A family of models has an adapter here, a line of `EXPORTS`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from medvlm.errors import UserError


def _llava(*arguments: Any) -> dict[str, Any]:
    from medvlm.export.llava import export_run

    return export_run(*arguments)


def _dual_encoder(*arguments: Any) -> dict[str, Any]:
    from medvlm.export.dual_encoder import export_run

    return export_run(*arguments)


EXPORTS: dict[str, Callable[..., dict[str, Any]]] = {"llava": _llava, "dual_encoder": _dual_encoder}


def export_run(run: Path, out: Path, tag: str | None = None, ema: bool = False, prove: bool = True) -> dict[str, Any]:
    """Export a run's checkpoint (the newest, or ``tag``), or its moving average, to ``out``; returns what was proven.

    Raises UserError where ``run`` is none, or the folder's answers are not the trained model's.
    """
    if not (run / "config.yaml").exists():
        raise UserError(f"{run}: is not a run (it has no config.yaml)")
    family = yaml.safe_load((run / "config.yaml").read_text())["model"].get("family", "llava")
    return EXPORTS[family](run, out, tag, ema, prove)
