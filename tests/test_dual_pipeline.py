"""Every task of dual encoders on shards, end to end, on folders of transformers' classes and of medvlm's own form."""

import json
import re
import shlex

import pytest
from conftest import REPO
from dual import KINDS, make_dual
from test_export_dual_encoder import exported

from data_prep import phantom
from medvlm import evaluation
from medvlm.errors import UserError
from medvlm.evaluation import intervals, linear_probe

pytest.importorskip("sklearn")


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 30)
    monkeypatch.setattr(linear_probe, "GRID", [0.01, 1.0])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    phantom.generate(root / "data", images=200, size=64, preset="easy", seed=1, shares=(0.4, 0.1, 0.5), workers=1)
    (root / "own.yaml").write_text(
        "kind: binary\npositive: ['{}']\nnegative: ['no {}']\n"
        "labels: {Cardiomegaly: large heart, Pleural Effusion: effusion, Consolidation: consolidation}\n"
    )
    return root, {kind: make_dual(root / kind, kind) for kind in KINDS}


OPTIONS = {
    "retrieval": {},
    "precision_at_k": {"k": [5], "prompts": "own.yaml"},
    "zero_shot": {},
    "linear_probe": {},
    "grounding": {"pictures": 2},
    "embedding_space": {},
}


@pytest.mark.parametrize("task", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_task_runs_on_every_class(world, tmp_path, capsys, monkeypatch, kind, task):
    root, folders = world
    monkeypatch.chdir(root)
    arguments = (folders[kind], task, [root / "data" / "test"], tmp_path)
    results = evaluation.run(*arguments, options=OPTIONS[task])
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))
    assert results["synthetic"] and results["n"] >= 20 and (tmp_path / "predictions.jsonl").read_text().count("\n")
    shown = capsys.readouterr().out
    cut = results["n_truncated_texts"]  # phantoms' reports exceed the 64 tokens of these models, labels do not
    assert bool(cut) == (task in ("retrieval", "embedding_space")) == (f"{cut} text(s) were cut to 64 tokens" in shown)
    assert task in shown and "nan" not in shown.lower().replace("finance", "")
    for name in results.get("heat_maps", []):
        assert (tmp_path / name).exists()


@pytest.mark.parametrize("variant", ["convirt", "biovil_t", "siglip-linear"])
def test_medvlms_own_form_is_evaluated_with_the_code_of_its_folder(world, tmp_path, variant):
    root, _ = world
    exported(tmp_path, variant)
    arguments = (tmp_path / "hf", "grounding", [root / "data" / "test"], tmp_path / "out")
    with pytest.raises(UserError, match="add --trust-remote-code"):
        evaluation.run(*arguments)
    results = evaluation.run(*arguments, options={"pictures": 1}, limit=20, trust_remote_code=True)
    assert results["n_phrases"] == 20 and results["settings"]["logit_scale"] == pytest.approx(20, rel=1e-4)
    occluded = {"pictures": 1, "heat": "occlusion", "grid": 3}
    results = evaluation.run(*arguments, options=occluded, limit=4, trust_remote_code=True)
    assert results["n_phrases"] == 4 and results["heat"] == "occlusion"
    retrieved = evaluation.run(tmp_path / "hf", "retrieval", *arguments[2:], limit=20, trust_remote_code=True)
    assert retrieved["n"] == 20


def test_the_command_line_takes_the_options_of_a_task(world, tmp_path, capsys, monkeypatch):
    from medvlm import cli

    root, folders = world
    start = ["medvlm", "evaluate", str(folders["clip"]), "--data", str(root / "data" / "test"), "--out", str(tmp_path)]

    def run(*more):
        monkeypatch.setattr("sys.argv", [*start, *more])
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        return end.value.code, captured.out, captured.err

    code, out, _ = run(
        "--task",
        "retrieval",
        "--k",
        "1",
        "--k",
        "3",
        "--section",
        "findings",
        "--view",
        "PA",
        "--limit",
        "30",
        "--json",
    )
    results = json.loads(out)
    assert not code and results["settings"]["k"] == [1, 3] and results["n"] == 30
    assert (
        results["settings"]["section"] == ["findings"]
        and results["settings"]["view"] == ["PA"]
        and "image_to_text_recall_at_3" in results
    )
    for more, message in (
        (
            ("--task", "retrieval", "--prompts", "chexzero"),
            "--prompts: is no option of task retrieval; it is one of precision_at_k, zero_shot",
        ),
        (("--phrase", "label"), "--phrase: is no option of task vqa"),
        (("--task", "zero_shot", "--aggregate", "median"), "--aggregate: "),
        (("--task", "zero_shot", "--prompts", "nowhere"), "--prompts: no set 'nowhere'"),
        (("--task", "grounding", "--heat", "attention"), "--heat: Input should be 'similarity' or 'occlusion'"),
        (("--task", "grounding", "--grid", "4"), "--grid: is for --heat occlusion alone"),
        (("--task", "retrieval", "--k", "0"), "--k: must be positive"),
        (("--task", "zero_shot", "--view", "oblique"), "no image has labels of view oblique"),
    ):
        code, _, err = run(*more)
        assert code == 2 and message in err, err


def test_the_documented_commands_run(world, tmp_path, capsys, monkeypatch):
    """Those of docs/evaluate.md on phantoms, word by word, with a small model and few phantoms in their place."""
    from medvlm import cli

    _, folders = world
    monkeypatch.setattr(linear_probe, "GRID", [1.0])
    page = (REPO / "docs" / "evaluate.md").read_text()
    monkeypatch.chdir(tmp_path)
    phantom.generate(tmp_path / "phantom", images=170, size=64, shares=(0.4, 0.1, 0.5), workers=1)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "clip-model").symlink_to(folders["clip"])
    (tmp_path / "prompts.yaml").write_text(re.search(r"<!-- prompts -->\n```yaml\n(.*?)```", page, re.S).group(1))
    lines = [line for line in page.splitlines() if line.startswith("medvlm evaluate") and "--data phantom/" in line]
    assert {shlex.split(line)[shlex.split(line).index("--task") + 1] for line in lines} == set(OPTIONS)
    for line in lines:
        monkeypatch.setattr("sys.argv", shlex.split(line))
        with pytest.raises(SystemExit) as end:
            cli.main()
        shown = capsys.readouterr()
        assert not end.value.code, f"{line}: {shown.err}"
        assert "results.json" in shown.out.replace("\n", "")
