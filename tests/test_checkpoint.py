"""Checkpoints that other numbers of ranks and other ZeRO stages go on from, beside an uninterrupted run."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import launch, medvlm
from safetensors.torch import load_file, save_file
from toy import LLAMA, make_recipe, make_shards, make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from medvlm.training import checkpoint

# 12 packs a step divide among 1, 2 and 3 ranks; the tower, from scratch, is frozen: built anew, it would be another
OPTIONS = {
    "training__global_batch_size": 12,
    "training__micro_batch_size": 2,
    "training__steps": 5,
    "training__stop_after": 3,
    "model__vision_tower__train": "frozen",
}


def rows(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Runs of ``zero`` on ``ranks`` from the same weights, stopped after three steps of five; made when asked for."""
    folder = tmp_path_factory.mktemp("elastic")
    make_tokenizer(folder / "tokenizer")
    make_shards(folder / "shards")
    start = make_recipe(folder, "start", training__steps=1, training__zero="zero1")
    launch(start, ranks=1)
    options = {**OPTIONS, "model__init_from": str(folder / "runs" / "start")}

    def make(zero: str, ranks: int, **more) -> Path:
        name = "-".join([zero, str(ranks), *map(str, more.values())])
        if not (folder / f"{name}.yaml").exists():
            launch(make_recipe(folder, name, **{**options, "training__zero": zero, **more}), ranks=ranks)
        return folder / "runs" / name

    return make


@pytest.fixture(scope="module")
def whole(stopped) -> list[dict]:
    run = stopped("zero1", 2, training__stop_after=5)
    return rows(run.parent.parent, run.name)


CASES = [
    ("zero3", 1, "zero3", 2),
    ("zero3", 2, "zero3", 1),
    ("zero3", 2, "zero3", 3),
    ("zero3", 2, "zero2", 2),
    ("zero2", 2, "zero3", 2),
    ("zero2", 2, "zero1", 3),
    ("zero3", 2, "zero0", 3),
    ("zero0", 2, "zero3", 1),
]


@pytest.mark.parametrize(("zero", "ranks", "then", "ranks_then"), CASES)
def test_other_ranks_and_stages_go_on_as_if_uninterrupted(stopped, whole, tmp_path, zero, ranks, then, ranks_then):
    source = stopped(zero, ranks)
    folder = source.parent.parent
    shutil.copytree(source, tmp_path / "runs" / "run")
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    options = {**OPTIONS, "training__zero": then, "training__stop_after": None}
    recipe = make_recipe(tmp_path, **options, data__train=[str(folder / "shards")])
    launch(recipe, "run.resume=require", "--allow-change", ranks=ranks_then)  # the tokenizer's path is another
    found = rows(tmp_path, "run")
    assert [row["batch_digest"] for row in found] == [row["batch_digest"] for row in whole]
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in whole], rel=1e-6)
    assert [row["grad_norm"] for row in found] == pytest.approx([row["grad_norm"] for row in whole], rel=1e-5)
    before = checkpoint.consolidate(source / "checkpoints" / "step-00000003")
    after = checkpoint.consolidate(checkpoint.newest(tmp_path / "runs" / "run"))
    frozen = [name for name in before if name.startswith("vision_tower")]
    assert frozen and all(torch.equal(before[name], after[name]) for name in frozen)


def test_frozen_weights_are_stored_once(stopped):
    folder = stopped("zero3", 2) / "checkpoints"
    (frozen,) = folder.glob("frozen-*")
    stored = [key for path in frozen.glob("*.safetensors") for key in load_file(path)]
    assert stored and all(key.startswith("param:vision_tower.") for key in stored)
    assert not any("vision_tower" in key for path in folder.glob("step-*/*.safetensors") for key in load_file(path))


@pytest.fixture(scope="module")
def adapted(tmp_path_factory) -> Path:
    """A run of a pretrained language model that stays frozen, and its next stage."""
    folder = tmp_path_factory.mktemp("adapted")
    make_tokenizer(folder / "tokenizer")
    make_shards(folder / "shards")
    values = {k: v for k, v in LLAMA.items() if k != "model_type"}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **values)).save_pretrained(folder / "llama")
    config = json.loads((folder / "llama" / "config.json").read_text())  # files in fp32, whatever it says
    (folder / "llama" / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    launch(adapted_recipe(folder, "adapted"))
    return folder


def adapted_recipe(folder: Path, name: str, **more) -> Path:
    path = {"model__language_model__config": None, "model__language_model__path": str(folder / "llama")}
    options = {"model__language_model__train": "frozen", "training__steps": 3, "training__stop_after": 2}
    return make_recipe(folder, name, **{**path, **options, **more})


def test_pretrained_weights_that_stay_frozen_are_not_stored(adapted):
    folder = adapted / "runs" / "adapted" / "checkpoints"
    assert not any("language_model" in key for path in folder.glob("*/*.safetensors") for key in load_file(path))
    weights = checkpoint.consolidate(checkpoint.newest(adapted / "runs" / "adapted"))
    assert len(weights.absent) == 21 and not weights.absent & set(weights)
    shutil.copytree(adapted / "runs" / "adapted", adapted / "runs" / "goes-on")
    launch(adapted_recipe(adapted, "goes-on", training__zero="zero2", training__stop_after=None), ranks=1)


def test_other_pretrained_weights_than_the_run_started_with_are_refused(adapted):
    path = adapted / "llama" / "model.safetensors"
    shutil.copytree(adapted / "runs" / "adapted", adapted / "runs" / "changed")
    original = path.read_bytes()
    weights = load_file(path)
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] += 0.5
    save_file(weights, path, {"format": "pt"})
    try:
        resumed = launch(adapted_recipe(adapted, "changed", training__stop_after=None), fails=True)
        next_stage = {"model__language_model__train": "full", "model__init_from": str(adapted / "runs" / "adapted")}
        begun = launch(adapted_recipe(adapted, "stage2", **next_stage), fails=True)
        out = adapted / "refused"
        written = medvlm("export", adapted / "runs" / "adapted", "--out", out, "--no-proof", status=2)
    finally:
        path.write_bytes(original)
    assert not out.exists()
    for output in (resumed, begun, written):
        assert "model.language_model.path: gives other weights than" in output and "Traceback" not in output
    launch(adapted_recipe(adapted, "stage2", **next_stage))


def test_frozen_weights_that_a_run_began_from_are_stored_also_after_a_resume(adapted):
    """The recipe's `path` has other weights than the run that this one began from, where they had trained."""
    trained = {"model__language_model__train": "full", "model__init_from": str(adapted / "runs" / "adapted")}
    launch(adapted_recipe(adapted, "trained", **trained))
    recipe = adapted_recipe(adapted, "after", model__init_from=str(adapted / "runs" / "trained"))
    launch(recipe, "training.stop_after=1")
    launch(recipe, "training.stop_after=2")
    launch(recipe, "training.stop_after=3", ranks=1)
    before = checkpoint.consolidate(checkpoint.newest(adapted / "runs" / "trained"))
    after = checkpoint.consolidate(checkpoint.newest(adapted / "runs" / "after"))
    names = [name for name in before if name.startswith("language_model")]
    assert len(names) == 21 and not after.absent
    assert all(torch.equal(before[name], after[name]) for name in names)


def test_adapters_on_pretrained_weights_store_no_more_than_what_trains(adapted, tmp_path):
    lora = {"model__language_model__train": "lora", "model__language_model__lora": {"rank": 2}}
    launch(adapted_recipe(adapted, "lora", **lora))
    weights = checkpoint.consolidate(checkpoint.newest(adapted / "runs" / "lora"))
    assert len(weights.absent) == 21
    assert all("lora" in name for name in weights if name.startswith("language_model"))
    launch(adapted_recipe(adapted, "lora", **lora, training__zero="zero1"), "training.stop_after=3", ranks=1)
    medvlm("export", adapted / "runs" / "lora", "--out", tmp_path / "merged")
    medvlm("export", adapted / "runs" / "lora", "--out", tmp_path / "unproven", "--no-proof")
    proven, unproven = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("merged", "unproven"))
    assert proven == unproven
    medvlm("export", adapted / "runs" / "lora", "--out", tmp_path / "adapter", "--adapter")
    onward = {"model__init_from": str(adapted / "runs" / "lora"), "model__language_model__train": "full"}
    launch(
        adapted_recipe(adapted, "merged", **onward), "training.stop_after=1", "model.language_model.learning_rate=1e-9"
    )
    began = checkpoint.consolidate(checkpoint.newest(adapted / "runs" / "merged"))
    base = load_file(adapted / "llama" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    whole = checkpoint.StockWeights(
        checkpoint.consolidate(checkpoint.newest(adapted / "runs" / "lora")), merge=True
    ).added(f"language_model.{name}", 0, 64 * 32)
    assert whole.abs().max() > 1e-5
    torch.testing.assert_close(began[f"language_model.{name}"], base[name] + whole.view(64, 32), rtol=0, atol=1e-6)
