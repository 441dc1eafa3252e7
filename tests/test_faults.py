"""What fails is noticed, named and handled as the recipe says; no rank waits for another for ever."""

import json
import random
import re
import shutil
import signal
import time
from pathlib import Path

import hooks
import pytest
import torch
from killed import Killer
from plain import plain_pytorch
from toy import make_recipe
from zygote import Done, zygote

from medvlm.config.changes import check_changes
from medvlm.config.load import load_recipe
from medvlm.errors import UserError
from medvlm.training import checkpoint

UPDATE = "medvlm.training.loop:update"
FORWARD = "medvlm.models.vision_language_model:VisionLanguageModel.forward"
CHANGE = "medvlm.training.lifecycle:change"
READ = "medvlm.data.shards:ShardReader.load"


def run(recipe: Path, *arguments: str, hook: str = "", ranks: int = 2, **options) -> Done:
    """With a hook, if there is one; within seconds, not at the end of some time-out."""
    begun = time.monotonic()
    if hook:
        options |= {"script": hooks.SCRIPT, "HOOK": hook}
    done = zygote().run(["train", str(recipe), *arguments], ranks=ranks, **options)
    assert time.monotonic() - begun < 60
    done.stderr = "".join(line for line in done.stderr.splitlines(True) if not line.startswith("[transformers]"))
    return done


def steps(recipe: Path) -> list[int]:
    folder = recipe.parent / "runs" / recipe.stem
    return [checkpoint.step_of(path) for path in checkpoint.checkpoints(folder)]


def rows(recipe: Path, name: str = "metrics.jsonl") -> list[dict]:
    path = recipe.parent / "runs" / recipe.stem / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def recipe(world, request) -> Path:
    """Four steps; one name for each test."""
    return make_recipe(world, request.node.name.split("[")[0], training__collective_timeout=3)


def test_a_bug_of_one_rank_ends_all_with_its_traceback(recipe):
    done = run(recipe, hook=f"{UPDATE} 1 0 bug")
    assert done.returncode == 1
    assert "KeyError: 'a bug'" in done.stderr and "rank 1: stopped because of rank 0" in done.stderr


def test_a_killed_rank_is_named(recipe):
    done = run(recipe, hook=f"{UPDATE} 3 1 SIGKILL")
    assert done.returncode == -signal.SIGKILL
    assert "medvlm: error: rank 1 ended without a word (killed, or out of memory?), last seen in step" in done.stderr


def test_a_killed_rank_0_is_named_by_the_others(recipe):
    done = run(recipe, hook=f"{UPDATE} 3 0 SIGKILL")
    assert done.returncode == -signal.SIGKILL
    assert "rank 0, or the launcher, at which the ranks meet, has ended" in done.stderr


@pytest.mark.parametrize(
    ("action", "how"), [("hang", "is in step 2, reading"), ("SIGSTOP", "does not answer, and was")]
)
def test_a_hung_rank_is_named_with_its_place(recipe, action, how):
    done = run(recipe, "data.workers=0", hook=f"{READ} 7 1 {action}")
    assert done.returncode
    assert "error: no step forward for 3 s (training.collective_timeout): rank 1 is behind; it " + how in done.stderr
    assert ", batch s00" in done.stderr


def test_a_rank_that_hangs_between_collectives_is_told_from_those_that_wait(recipe):
    done = run(recipe, hook=f"{FORWARD} 3 0 hang")
    assert "rank 0 is behind; it is in step 2, forward, backward and update" in done.stderr


def test_a_vanished_mount_stops_with_everything_saved(world, tmp_path):
    shutil.copytree(world / "shards", tmp_path / "shards")
    shutil.copytree(world / "tokenizer", tmp_path / "tokenizer")
    recipe = make_recipe(tmp_path, "mount", training__steps=6, training__checkpoint_every=100)
    hook = f"{READ} 20 1 vanish"  # rank 1 reads four samples a step: in the fifth
    data = {"DATA": str(tmp_path / "shards")}
    full = f"{hook},medvlm.training.checkpoint.saving:complete 0 0 no_space,{CHANGE} 2 0 no_space"
    done = run(recipe, "data.workers=0", hook=full, **data)
    assert done.returncode == 2 and not steps(recipe)
    assert re.search(f"error: rank 1: {tmp_path}/shards/toy-00000.*; and then .* could not be written", done.stderr)
    assert "state.json could not be written: [Errno 28]" in done.stderr and "Traceback" not in done.stderr
    (tmp_path / "shards-away").rename(tmp_path / "shards")
    done = run(recipe, "data.workers=0", hook=hook, **data)
    assert done.returncode == 2
    assert done.stderr.count("medvlm: error: rank") == 1 == len(done.stderr.splitlines())
    assert f"{tmp_path}/shards/toy-00000" in done.stderr and "(saved at step 4)" in done.stderr
    assert steps(recipe) == [4]
    (tmp_path / "shards-away").rename(tmp_path / "shards")
    assert run(recipe).returncode == 0 and steps(recipe)[-1] == 6


def test_a_read_that_hangs_in_a_worker_stops_with_everything_saved(recipe):
    done = run(recipe, "data.workers=1", "training.checkpoint_every=100", hook=f"{READ} 10 0 hang")
    assert done.returncode == 2
    assert "medvlm: error: rank 0: " in done.stderr and "timed out after 1.5 seconds" in done.stderr
    assert "(saved at step" in done.stderr and steps(recipe)


@pytest.mark.parametrize("place", ["checkpoint", "metrics"])
def test_a_full_disk_ends_all_ranks_and_keeps_earlier_checkpoints(world, place):
    recipe = make_recipe(world, f"full-{place}", training__steps=3)
    assert run(recipe, "training.stop_after=1").returncode == 0
    if place == "checkpoint":
        done = run(recipe, file_size=100_000)
        assert "could not be written" in done.stderr
    else:
        done = run(recipe, hook="medvlm.training.meters:Meters.write 1 0 no_space")
        assert "a file of the run cannot be written" in done.stderr
    assert done.returncode == 2 and "is the disk full?" in done.stderr
    assert done.stderr.count("medvlm: error:") == 1
    assert steps(recipe) == [1]
    assert run(recipe).returncode == 0 and steps(recipe)[-1] == 3


def test_a_step_whose_loss_is_not_a_number_changes_nothing_and_is_named(recipe):
    done = run(recipe, hook=f"{FORWARD} 3 1 nan")
    assert done.returncode == 2
    found = re.search(
        r"error: step 2: the loss is nan \(samples of rank 1: (s\d+, s\d+)\); no update was made", done.stderr
    )
    assert found and "(saved at step 1)" in done.stderr and steps(recipe) == [1]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_skipped_step_is_a_step_that_was_never_made(world, stage):
    """Weights, moments and the losses after it equal those of plain PyTorch that leaves the step out."""
    name = f"skip-{stage}"
    init = str(world / "runs" / "init")
    options = {"training__steps": 5, "training__zero": f"zero{stage}", "model__init_from": init}
    recipe = make_recipe(world, name, training__non_finite="skip", **options)
    done = run(recipe, hook=f"{FORWARD} 5 1 nan")
    assert done.returncode == 0
    expected = plain_pytorch(make_recipe(world, f"plain-{name}", **options), leave_out={2})
    found = rows(recipe)
    assert "loss" not in found[2] and "the loss is nan" in found[2]["skipped"]
    for n in (0, 1, 3, 4):
        assert found[n]["loss"] == pytest.approx(expected[n]["loss"], rel=1e-5)
        assert found[n]["grad_norm"] == pytest.approx(expected[n]["grad_norm"], rel=1e-4)
    assert [row["step"] for row in rows(recipe, "skipped.jsonl")] == [3]


def test_a_gradient_that_is_not_finite_is_found_before_the_update_although_the_loss_is(recipe):
    done = run(recipe, hook=f"{FORWARD} 3 0 nan_gradient")
    assert done.returncode == 2
    assert "step 2: the gradient norm is not finite, though the loss is (samples of s0" in done.stderr
    assert steps(recipe) == [1]


def test_more_skipped_steps_than_allowed_end_the_run(recipe):
    done = run(recipe, "training.non_finite=skip", "training.max_skipped=2", hook=f"{FORWARD} 0 1 nan")
    assert done.returncode == 2 and steps(recipe) == [2]
    assert "step 3: the loss is nan" in done.stderr and "that makes 3, and training.max_skipped is 2" in done.stderr


SPIKE = {"loss_factor": 10, "grad_norm_factor": None, "window": 2}


def test_a_rollback_leaves_out_the_steps_up_to_the_spike_and_a_resume_repeats_that(world):
    """Step 6 spikes; from the checkpoint of step 4 the run goes on with step 7, interrupted or not."""
    options = {
        "training__steps": 8,
        "training__checkpoint_every": 4,
        "training__spike": {**SPIKE, "action": "rollback"},
    }
    whole, broken = (make_recipe(world, f"rollback-{name}", **options) for name in ("whole", "broken"))
    spike = f"{FORWARD} 11 0 spike"  # two micro-batches a step
    done = run(whole, hook=spike)
    assert done.returncode == 0 and "back to step-00000004, and on from there with step 7" in done.stdout
    assert run(broken, "training.stop_after=4").returncode == 0
    interrupted = run(broken, hook=f"{FORWARD} 3 0 spike,{UPDATE} 3 1 SIGTERM")  # while it takes step 7
    assert interrupted.returncode == 85
    assert run(broken).returncode == 0
    found = [[{k: row.get(k) for k in ("step", "loss", "skipped")} for row in rows(r)] for r in (whole, broken)]
    assert found[0] == found[1] and [row["step"] for row in found[0] if row["skipped"]] == [5, 6]
    assert [(row["from"], row["step"]) for row in rows(whole, "skipped.jsonl")] == [(5, 6)]
    a, b = (checkpoint.consolidate(checkpoint.newest(r.parent / "runs" / r.stem)) for r in (whole, broken))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_rollback_past_a_damaged_checkpoint_says_so_and_goes_on(world):
    """Before step 5 the checkpoint of step 4 loses a file; step 6 spikes."""
    options = {
        "training__steps": 8,
        "training__checkpoint_every": 2,
        "training__checkpoint_in_background": False,
        "training__spike": {**SPIKE, "action": "rollback"},
    }
    recipe, folder = make_recipe(world, "damaged", **options), world / "runs" / "damaged"
    done = run(recipe, hook=f"{UPDATE} 5 0 damage,{FORWARD} 11 0 spike", RUN=str(folder))
    assert done.returncode == 0, done.stderr
    assert "back to step-00000002, and on from there with step 7 (damaged: step-00000004)" in done.stdout
    assert [row["step"] for row in rows(recipe) if "skipped" in row] == [3, 4, 5, 6]
    kept = checkpoint.step_folders(folder)
    assert kept == checkpoint.checkpoints(folder) and kept[-1].name == "step-00000008"


@pytest.mark.parametrize(("action", "skipped"), [("skip", [3]), ("warn", [])])
def test_a_spike_is_skipped_or_told(world, action, skipped):
    recipe = make_recipe(world, f"spike-{action}", training__steps=4, training__spike={**SPIKE, "action": action})
    done = run(recipe, hook=f"{FORWARD} 5 0 spike,{FORWARD} 6 1 spike")
    assert done.returncode == 0
    assert "step 3: the loss" in done.stdout and "10 times" in done.stdout
    assert [row["step"] for row in rows(recipe) if "skipped" in row] == skipped
    assert [row["step"] for row in rows(recipe) if "spike" in row] == ([] if skipped else [3])


def test_a_changed_recipe_is_shown_and_refused_where_it_computes_something_else(recipe):
    assert run(recipe, "training.stop_after=1").returncode == 0
    refused = run(recipe, "training.weight_decay=0.2", "data.workers=1", "training.stop_after=2")
    assert refused.returncode == 2 and steps(recipe) == [1]
    assert (
        "another recipe (training.weight_decay: 0.05 -> 0.2);" in refused.stderr and "--allow-change" in refused.stderr
    )
    harmless = run(recipe, "training.micro_batch_size=1", "training.stop_after=2", ranks=1)
    assert harmless.returncode == 0
    assert (
        "changed since step-00000001: training.micro_batch_size: 2 -> 1; training.stop_after: 1 -> 2" in harmless.stdout
    )
    allowed = run(recipe, "training.weight_decay=0.2", "--allow-change")
    assert allowed.returncode == 0 and "training.weight_decay: 0.05 -> 0.2" in allowed.stdout


def test_a_precision_that_auto_makes_another_is_a_change(recipe):
    """As on a CPU after a GPU, of the same recipe."""
    config = load_recipe(str(recipe), ["training.precision=auto"])
    before = config.model_dump(mode="json")
    assert check_changes(before, config, False, (True, True)) == []
    with pytest.raises(UserError, match=r"another recipe \(training.precision: 'bf16' -> 'fp32'\);"):
        check_changes(before, config, False, (True, False))
    assert check_changes(before, config, True, (True, False)) == ["training.precision: 'bf16' -> 'fp32'"]


def test_ranks_that_do_not_divide_the_batch_are_told_what_does(recipe):
    done = run(recipe, ranks=3)
    assert (
        "8 is not a multiple of micro_batch_size 2 x 3 rank(s); the nearest that are: 6 or 12, or 2 or 4 rank(s)"
        in (done.stderr)
    )


def test_kill_9_loses_no_checkpoint_and_changes_nothing(world):
    """Four kills at random moments, four inside the writing of a checkpoint; benchmarks/kill.py makes a hundred."""
    options = {"training__steps": 12, "training__checkpoint_every": 2, "training__zero": "zero2"}
    options |= {"training__global_batch_size": 4, "model__vision_tower__train": "norm_and_bias"}
    calm = make_recipe(world, "calm-kill", **options)
    begun = time.monotonic()
    assert run(calm).returncode == 0
    longest = time.monotonic() - begun
    killer = Killer(make_recipe(world, "killed", **options), world / "runs" / "calm-kill", random.Random(0))
    while sum(killer.kills.values()) < 8:
        how = min(killer.kills, key=lambda name: killer.kills[name])
        if killer.start(how, longest if how == "seconds" else 8) == 0:
            killer.compare()
            shutil.rmtree(killer.run)
    if killer.run.exists():
        assert killer.start("calls", 0) == 0
        killer.compare()
    assert killer.rounds and max(killer.lost) <= 4, "steps since the last checkpoint, and while the next is written"
