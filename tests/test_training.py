"""Training under DeepSpeed beside plain single-process PyTorch on the same global batches."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import launch
from plain import assert_same_run, metrics, plain_pytorch
from toy import make_recipe, make_shards

from medvlm.config.load import load_recipe
from medvlm.models.build import build_components, build_model
from medvlm.training import checkpoint

STEPS = 20


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return checkpoint.consolidate(checkpoint.newest(folder / "runs" / name))


@pytest.fixture(scope="module")
def reference(world) -> list[dict]:
    """The toy data mixes one image, several and none, and uneven answers, so ranks differ in both."""
    recipe = make_recipe(world, "plain", training__steps=STEPS, model__init_from=str(world / "runs" / "init"))
    return plain_pytorch(recipe)


@pytest.mark.parametrize("micro", [4, 2], ids=["no-accumulation", "accumulation"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_equal_plain_pytorch(world, reference, stage, micro):
    name = f"zero{stage}-micro{micro}"
    recipe = make_recipe(
        world,
        name,
        training__steps=STEPS,
        training__zero=f"zero{stage}",
        training__micro_batch_size=micro,
        model__init_from=str(world / "runs" / "init"),
    )
    launch(recipe)
    assert_same_run(metrics(world, name), reference)


@pytest.mark.parametrize("frozen", ["vision_tower", "language_model"])
def test_frozen_parts_and_checkpointing_under_zero3_equal_plain_pytorch(world, frozen):
    name = f"frozen-{frozen}"
    recipe = make_recipe(
        world,
        name,
        training__steps=6,
        model__init_from=str(world / "runs" / "init"),
        **{f"model__{frozen}__train": "frozen", "model__language_model__gradient_checkpointing": True},
    )
    launch(recipe)
    assert_same_run(metrics(world, name), plain_pytorch(recipe))
    unused = build_components(load_recipe(str(recipe)).model).unused["vision_tower"]
    untrainable = {f"vision_tower.{key}" for key in unused}
    before, after = weights(world, "init"), weights(world, name)
    for key, value in before.items():
        assert torch.equal(value, after[key]) == (key.startswith(frozen) or key in untrainable)


def test_text_only_steps_after_image_steps_use_no_stale_gradients(world, tmp_path):
    """ZeRO-3 reuses the gradients of a module that every rank skips: 16 samples with images, then 16 without."""
    make_shards(tmp_path / "shards", 32, images=lambda i: int(i % 8 == 0))
    shutil.copytree(world / "tokenizer", tmp_path / "tokenizer")
    options = {"training__global_batch_size": 2, "training__micro_batch_size": 1, "training__steps": 16}
    recipe = make_recipe(tmp_path, "mixed", model__init_from=str(world / "runs" / "init"), **options)
    launch(recipe)
    rows = metrics(tmp_path, "mixed")
    assert {row["images"] for row in rows} >= {0, 1}, "the order must hold steps with and without images"
    assert_same_run(rows, plain_pytorch(recipe))


def test_padding_free_batches_equal_padded_ones(world, reference):
    recipe = make_recipe(
        world,
        "padding-free",
        training__steps=STEPS,
        data__padding_free=True,
        model__init_from=str(world / "runs" / "init"),
    )
    launch(recipe)
    rows = metrics(world, "padding-free")
    assert_same_run(rows, reference)
    assert all(row["padding_share"] == 0 for row in rows)


def test_packed_training_equals_plain_padded_training(world):
    """Two ranks with packs of several samples under ZeRO-3, beside the same samples padded in one process."""
    recipe = make_recipe(
        world,
        "packed",
        training__steps=8,
        training__micro_batch_size=1,
        training__global_batch_size=4,
        data__packing={"tokens": 256, "images": 4},
        data__cache_dir=str(world / "cache"),
        model__init_from=str(world / "runs" / "init"),
    )
    launch(recipe)
    rows = metrics(world, "packed")
    assert_same_run(rows, plain_pytorch(recipe))
    assert max(row["samples"] for row in rows) > 8, "packs must hold several samples"


@pytest.mark.parametrize("stage", [2, 3])
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(world, stage):
    """Stopped twice, once not at a regular checkpoint, with a part frozen; all losses and weights equal."""
    whole, broken = f"whole{stage}", f"broken{stage}"
    options = {
        "training__steps": 9,
        "training__zero": f"zero{stage}",
        "training__checkpoint_every": 4,
        "model__vision_tower__train": "frozen",
        "data__shuffle_turns": True,
    }
    launch(make_recipe(world, whole, **options))
    recipe = make_recipe(world, broken, **options)
    launch(recipe, "training.stop_after=4")
    launch(recipe, "training.stop_after=7")
    launch(recipe, "run.resume=require")
    keep = ("step", "loss", "grad_norm", "lr", "tokens", "batch_digest")
    pick = [[{k: row[k] for k in keep} for row in metrics(world, name)] for name in (whole, broken)]
    assert pick[0] == pick[1]
    a, b = weights(world, whole), weights(world, broken)
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_frozen_weights_come_from_the_checkpoint_not_from_the_build(world):
    options = {"training__steps": 3, "model__vision_tower__train": "frozen"}
    recipe = make_recipe(world, "restore", model__init_from=str(world / "runs" / "init"), **options)
    launch(recipe, "training.stop_after=2")
    launch(recipe, "run.seed=0", "model.init_from=null")  # would build other frozen weights
    before, after = weights(world, "init"), weights(world, "restore")
    assert all(torch.equal(before[k], after[k]) for k in before if k.startswith("vision_tower"))


def test_bf16_keeps_rotary_frequencies_in_fp32(world):
    config = load_recipe(str(make_recipe(world, "bf16")))
    parts = build_components(config.model)
    model = build_model(config.model, parts, torch.bfloat16)
    assert next(model.language_model.parameters()).dtype == torch.bfloat16
    buffers = {n: b for n, b in model.named_buffers() if "inv_freq" in n}
    assert buffers and all(b.dtype == torch.float32 for b in buffers.values())


def test_bf16_trains_under_zero3(world):
    launch(make_recipe(world, "bf16-run", training__precision="bf16", training__steps=6, run__seed=2**32 - 1))
    losses = [row["loss"] for row in metrics(world, "bf16-run")]
    assert losses[-1] < losses[0]


def test_parameters_that_no_feature_depends_on_are_frozen(world):
    config = load_recipe(str(make_recipe(world, "unused", model__vision_tower__feature_layer=-2)))
    parts = build_components(config.model)
    assert any("layers.1." in name for name in parts.unused["vision_tower"])
    assert not any("layers.0." in name for name in parts.unused["vision_tower"])
