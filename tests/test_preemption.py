"""A signal at any moment gives a checkpoint and status 85, and the run goes on as if nothing had been."""

import json
import re
from pathlib import Path

import hooks
import torch
from conftest import launch
from toy import make_recipe
from zygote import Done, zygote

from medvlm.training import checkpoint, preemption

FORWARD = "medvlm.models.vision_language_model:VisionLanguageModel.forward"


def signalled(recipe: Path, hook: str, *, ranks: int = 2, status: int = preemption.STATUS) -> Done:
    done = zygote().run(["train", str(recipe)], ranks=ranks, script=hooks.SCRIPT, HOOK=hook)
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def state(folder: Path, name: str) -> tuple[list[int], list[dict]]:
    """Steps of the complete checkpoints, and the lines of the metrics without what a clock says."""
    found = [checkpoint.step_of(path) for path in checkpoint.checkpoints(folder / "runs" / name)]
    path = folder / "runs" / name / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    keep = ("step", "loss", "grad_norm", "lr", "tokens", "batch_digest", "eval_loss", "skipped")
    return found, [{k: row[k] for k in keep if k in row} for row in rows]


def test_signals_at_every_point_of_a_run_change_nothing(world):
    """Start-up, a step, the writing of a checkpoint (two signals), an evaluation, the last step; each on one rank."""
    options = {
        "training__steps": 6,
        "training__checkpoint_every": 2,
        "training__keep_checkpoints": 9,
        "training__evaluate_every": 3,
        "data__validation": [str(world / "shards")],
    }
    launch(make_recipe(world, "calm", **options))
    recipe = make_recipe(world, "signalled", **options)

    output = signalled(recipe, "medvlm.training.families.llava:build_model 1 1 SIGTERM", status=preemption.NO_STEP)
    assert "before the first step" in output.stderr
    assert state(world, "signalled") == ([], [])

    output = signalled(recipe, "medvlm.training.loop:batches_from 1 1 SIGTERM", status=preemption.NO_STEP)
    assert "interrupted: at step 0, as it began; start again" in output.stdout
    assert state(world, "signalled") == ([], [])

    output = signalled(recipe, f"{FORWARD} 1 1 SIGUSR1")
    assert "checkpoint of step 1 written" in output.stdout
    signalled(recipe, "medvlm.training.checkpoint.saving:Saver._trained 1 0 twice")
    assert state(world, "signalled")[0] == [1, 2], "the step whose checkpoint was being written is the last"

    signalled(recipe, "medvlm.training.families.llava:sum_and_agree 2 1 SIGUSR1")
    found, rows = state(world, "signalled")
    assert found == [1, 2, 3] and not any("eval_loss" in row for row in rows)

    forwards = 6 + 2 + 2 + 1  # six batches of the evaluation that was left, two steps, and into the last one
    signalled(recipe, f"{FORWARD} {forwards} 0 SIGTERM")
    found, rows = state(world, "signalled")
    assert found[-1] == 6 and [row["step"] for row in rows if "eval_loss" in row] == [3]

    launch(recipe)
    assert state(world, "signalled")[1] == state(world, "calm")[1]
    a, b = (checkpoint.consolidate(checkpoint.newest(world / "runs" / name)) for name in ("calm", "signalled"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_signal_while_token_lengths_are_counted_ends_all_ranks(world):
    packing = {"tokens": 256, "images": 4}
    recipe = make_recipe(world, "counting", data__packing=packing, data__cache_dir=str(world / "nowhere"))
    output = signalled(recipe, "medvlm.training.setup:count_lengths 1 0 SIGUSR1", status=preemption.NO_STEP)
    assert re.search("before the first step", output.stderr)
    assert not (world / "runs" / "counting" / "checkpoints").exists()
