"""What fails is noticed, named and handled as the recipe says; no rank waits for another for ever."""

import json
import re
import shutil
import signal
import time
from pathlib import Path

import hooks
import pytest
from test_training import plain_pytorch
from toy import make_recipe
from zygote import Done, zygote

from medvlm.training import checkpoint

UPDATE = "medvlm.training.loop:update"
FORWARD = "medvlm.models.vision_language_model:VisionLanguageModel.forward"
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
    done = run(recipe, "data.workers=0", hook=hook, DATA=str(tmp_path / "shards"))
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
