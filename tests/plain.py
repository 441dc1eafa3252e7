"""A run beside DeepSpeed: plain single-process PyTorch on the same global batches, to compare with."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from medvlm.config.load import load_recipe
from medvlm.config.schema import RunConfig
from medvlm.data.order import digest
from medvlm.models.trainable import apply_trainable
from medvlm.training import checkpoint, feed
from medvlm.training.families import family_of
from medvlm.training.families.dual_encoder import loss_share
from medvlm.training.optimizer import parameter_groups
from medvlm.training.schedule import learning_rate_factor


def metrics(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]


def initialised(config: RunConfig, parts: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The model of a recipe with the weights of the run in its ``init_from``."""
    model = family_of(config.model).build(config, parts, dtype, None)
    source = checkpoint.newest(Path(str(config.model.init_from)))
    checkpoint.load_weights(model, checkpoint.consolidate(source), "init")
    return model


def whole_loss(config: RunConfig, model: Any, batch: Any) -> torch.Tensor:
    """Of a global batch that is one micro-batch of one rank."""
    out = model(**batch.inputs(torch.device("cpu")))
    if config.model.family == "llava":
        return out / batch.supervised_tokens
    loss = loss_share(config.objective, [out], [batch])
    masked = config.objective.masked_language_modeling
    return loss + masked.weight * out["masked_loss"] / batch.masked_tokens if masked else loss


def clip_by_global_norm(model: torch.nn.Module) -> float:
    return float(torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0))


def plain_pytorch(
    recipe: Path,
    build: Any = initialised,
    optimizer: Any = torch.optim.AdamW,
    clip: Any = clip_by_global_norm,
    rates: Any = None,
    after: Any = None,
    leave_out: Sequence[int] = (),
) -> list[dict]:
    """The same run without DeepSpeed, ranks, micro-batches or the loop: one padded batch and one backward a step.

    ``rates``: learning rates of the groups by step; ``after`` sees the model after each update; ``leave_out``: steps,
    from 0, without one. Of weights that are not in fp32 the optimizer has copies that are, as mixed precision means it.
    """
    config = load_recipe(str(recipe))
    family = family_of(config.model)
    parts = family.components(config)
    model = build(config, parts)
    apply_trainable(model, config.model, parts.unused)
    data = feed.training_data(config, parts)
    lengths = feed.count_lengths(config, data, progress=False) if feed.needs_lengths(config.data) else None
    plan = feed.make_plan(config, data, lengths)
    if config.model.family == "llava":
        data.collate = partial(data.collate, padding_free=False)  # padded, whatever the recipe says
    groups = parameter_groups(model, config)
    peaks = [g["lr"] for g in groups]
    low = [p for group in groups for p in group["params"] if p.dtype != torch.float32]
    copies = {p: p.detach().float().requires_grad_() for p in low}
    updates = optimizer([{**g, "params": [copies.get(p, p) for p in g["params"]]} for g in groups])
    rows = []
    for step, packs in enumerate(plan.global_batches(0, config.training.steps)):
        batch = data[[draw for pack in packs for draw in pack]]
        now = [peak * learning_rate_factor(step, config.training.steps, 1) for peak in peaks]
        for group, rate in zip(updates.param_groups, rates(step) if rates else now, strict=True):
            group["lr"] = rate
        loss = whole_loss(config, model, batch)
        model.zero_grad(set_to_none=False)
        loss.backward()
        norm = clip(model)
        for p, copy in copies.items():
            copy.grad = p.grad.float()
        if step not in leave_out:
            updates.step()
        with torch.no_grad():
            for p, copy in copies.items():
                p.copy_(copy)
        if after:
            after(model)
        rows.append({"loss": float(loss), "grad_norm": norm, "batch_digest": digest(batch.keys)})
    return rows


def assert_same_run(found: list[dict], expected: list[dict], loss: float = 1e-5, grad_norm: float = 1e-4) -> None:
    """``loss`` and ``grad_norm`` are relative tolerances."""
    assert len(found) == len(expected)
    for step, (row, plain) in enumerate(zip(found, expected, strict=True), 1):
        both = {key: (row[key], plain[key]) for key in plain}
        assert row["batch_digest"] == plain["batch_digest"], (step, both)
        assert row["loss"] == pytest.approx(plain["loss"], rel=loss), (step, both)
        assert row["grad_norm"] == pytest.approx(plain["grad_norm"], rel=grad_norm), (step, both)
