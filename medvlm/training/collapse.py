"""Whether an embedding space narrows while the loss still falls: the loss alone does not show it."""

import json
from pathlib import Path
from typing import Any

LOST = 0.7  # of the highest rank so far: less of it is said
RANKS = ("eval_rankme_image", "eval_rankme_text")


def earlier(metrics: Path) -> list[dict[str, Any]]:
    """The evaluations that a run's ``metrics.jsonl`` holds."""
    rows = [json.loads(line) for line in metrics.read_text().split("\n")[:-1]] if metrics.exists() else []
    return [row for row in rows if "eval_loss" in row]


def warning(before: list[dict[str, Any]], now: dict[str, Any]) -> str | None:
    """A sentence if the loss is lower than when a modality's RankMe was highest, and much of that rank is lost."""
    for name in RANKS:
        ranked = [row for row in before if name in row]
        if name not in now or not ranked:
            continue
        best = max(ranked, key=lambda row: row[name])
        if now["eval_loss"] < best["eval_loss"] and now[name] < LOST * best[name]:
            return (
                f"embeddings collapse: {name.removeprefix('eval_')} fell from {best[name]:.1f} at step {best['step']} "
                f"to {now[name]:.1f} while the loss fell from {best['eval_loss']:.4f} to {now['eval_loss']:.4f}; "
                "see temperature, learning rates and batch size"
            )
    return None
