"""Every ZeRO mode that a CPU can run, and what changes how a step is computed, beside plain PyTorch."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import drive
import pytest
import torch
from cases import run_cases
from conftest import launch
from plain import assert_same_run, initialised, metrics, plain_pytorch
from toy import LLAMA, make_recipe, make_world

from medvlm.config.load import deepspeed_config_path, load_recipe
from medvlm.models.build import build_components, build_model
from medvlm.models.layers import repeated_layers
from medvlm.models.trainable import apply_trainable
from medvlm.training.checkpoint import consolidate, newest

STEPS = 4


def mode(world: Path, name: str, zero: str | Path, **overrides) -> Path:
    options = {"training__steps": STEPS, "training__zero": str(zero), "model__init_from": str(world / "runs" / "init")}
    return make_recipe(world, name, **options | overrides)


@pytest.fixture(scope="module")
def reference(world) -> list[dict]:
    return plain_pytorch(mode(world, "modes-plain", "zero1"))


@pytest.fixture(scope="session")
def cpu_adam() -> None:
    """DeepSpeed compiles its CPU Adam at first use, in about a minute: before the ranks, which are given less time."""
    build = "from deepspeed.ops.op_builder.cpu import CPUAdamBuilder; CPUAdamBuilder().load()"
    subprocess.run([sys.executable, "-c", build], env={**os.environ, "DS_ACCELERATOR": "cpu"}, check=True, timeout=600)


@pytest.fixture(params=["files", "async_io"])
def on_drive(request) -> dict[str, str]:
    """How to launch what offloads to a drive: with Python's files, and with DeepSpeed's `async_io` if it is built."""
    if request.param == "files":
        return {"script": drive.SCRIPT}
    from deepspeed.ops.op_builder.cpu import AsyncIOBuilder
    from torch.utils.cpp_extension import _get_build_directory

    if not (Path(_get_build_directory("async_io", verbose=False)) / "async_io.so").is_file():
        build = "python -c 'from deepspeed.ops.op_builder.cpu import AsyncIOBuilder as B; B().load()'"
        pytest.skip(f"DeepSpeed's async_io is not built: install libaio-dev, then DS_ACCELERATOR=cpu {build}")
    AsyncIOBuilder().load()
    return {}


def with_values(world: Path, name: str, of: str, **values) -> Path:
    """A DeepSpeed configuration like ``of``, with other values under ``zero_optimization``."""
    config = json.loads(deepspeed_config_path(of).read_text())
    config["zero_optimization"] |= values
    path = world / f"{name}.json"
    path.write_text(json.dumps(config))
    return path


def test_offload_to_the_cpu_equals_plain_pytorch(world, reference, cpu_adam):
    cases = {name: mode(world, name, name) for name in ("zero2_offload", "zero3_offload")}
    run_cases(cases, 2, world)
    for name in cases:
        assert_same_run(metrics(world, name), reference)


def test_offload_to_a_drive_equals_plain_pytorch(tmp_path, cpu_adam, on_drive):
    """Weights that train and frozen ones, of a model with matrices above 1 MiB a rank: DeepSpeed keeps smaller tensors
    in memory. Stopped after two steps and resumed, it goes on but for rounding: after a restart DeepSpeed's Adam
    computes its bias corrections otherwise."""
    world, place = make_world(tmp_path), tmp_path / "drive"
    place.mkdir()
    # weights of a usual size: with LLAMA's, Adam's first steps make rounding errors large
    llama = {**LLAMA, "hidden_size": 512, "intermediate_size": 1024, "initializer_range": 0.02}
    wide = {"model__language_model__config": llama}
    launch(make_recipe(world, "init", training__steps=1, training__zero="zero1", **wide), ranks=1)
    config = json.loads(deepspeed_config_path("zero3_nvme").read_text().replace("/local_nvme", str(place)))
    config["zero_optimization"]["offload_param"] |= {"buffer_size": 2**22, "max_in_cpu": 0}
    (world / "drive.json").write_text(json.dumps(config))
    whole = mode(world, "whole", world / "drive.json", **wide)
    frozen = mode(world, "frozen", world / "drive.json", model__language_model__train="frozen", **wide)
    launch(whole, "training.stop_after=2", **on_drive)
    launch(whole, "run.resume=require", **on_drive)
    assert "optimizer: DeepSpeedCPUAdam (its states are offloaded: nvme)" in launch(frozen, **on_drive)
    for recipe in (whole, frozen):
        assert {path.parts[-3] for path in (place / recipe.stem).rglob("*.swp")} >= {"float32params"}
        assert_same_run(metrics(world, recipe.stem), plain_pytorch(recipe))
    assert list((place / "whole").rglob("optimizer/*/*.swp"))
    kept, before = (consolidate(newest(world / "runs" / name)) for name in ("frozen", "init"))
    assert all(torch.equal(kept[name], before[name]) for name in before.shapes if name.startswith("language_model."))


def test_a_drive_that_is_not_there_is_refused(world):
    output = launch(mode(world, "no-drive", "zero3_nvme"), ranks=1, fails=True)
    assert "nvme_path: /local_nvme is not a folder that can be written" in output and "Traceback" not in output


def test_a_secondary_partition_within_each_node_equals_plain_pytorch(world, reference):
    """ZeRO++ hpZ on four ranks as two nodes of two; every parameter is divided, none kept whole for being small."""
    values = {"zero_hpz_partition_size": 2, "stage3_param_persistence_threshold": 0}
    config = with_values(world, "hpz", "zero3_hpz", **values)
    run_cases({"hpz": mode(world, "hpz-run", config, training__micro_batch_size=1)}, 4, world)
    assert_same_run(metrics(world, "hpz-run"), reference)


def test_a_node_size_that_does_not_divide_the_ranks_is_refused(world):
    output = launch(mode(world, "hpz-bad", "zero3_hpz"), fails=True)
    assert "zero_hpz_partition_size: 8 does not divide 2 rank(s)" in output and "Traceback" not in output


def test_every_stage_in_bf16_is_the_same_training(world):
    """DeepSpeed's bf16 optimizer of ZeRO-0 takes a step of its own when it is made, which has to be forgotten.

    bf16 has 8 bits: beside a padded batch in one piece, the sums over ranks and micro-batches round otherwise.
    """
    cases = {f"bf16-{s}": mode(world, f"bf16-{s}", f"zero{s}", training__precision="bf16") for s in range(4)}
    run_cases(cases, 2, world)
    rows = {name: metrics(world, name) for name in cases}
    assert [row["loss"] for row in rows["bf16-0"]] == [row["loss"] for row in rows["bf16-1"]]
    resumed = {"bf16-resumed": mode(world, "bf16-resumed", "zero0", training__precision="bf16")}
    run_cases(resumed, 2, world, "training.stop_after=2")
    run_cases(resumed, 2, world, "run.resume=require")
    assert [row["loss"] for row in metrics(world, "bf16-resumed")] == [row["loss"] for row in rows["bf16-0"]]
    plain = plain_pytorch(cases["bf16-1"], partial(initialised, dtype=torch.bfloat16))
    for name in cases:
        assert_same_run(rows[name], plain, loss=1e-3, grad_norm=2e-2)


def test_selective_checkpointing_and_compiled_layers_equal_plain_pytorch(world, reference):
    every_second = {
        "model__language_model__gradient_checkpointing": 2,
        "model__vision_tower__gradient_checkpointing": 2,
    }
    compiled = {"training__compile": "eager"}  # the graphs without a compiler; with one: `test_compile.py`
    cases = {
        "every-second": mode(world, "every-second", "zero3", **every_second),
        "compiled": mode(world, "compiled", "zero2", **compiled),
        "compiled-recomputed": mode(world, "compiled-recomputed", "zero1", **compiled, **every_second),
    }
    run_cases(cases, 2, world)
    for name in cases:
        assert_same_run(metrics(world, name), reference)


@pytest.mark.parametrize(
    ("which", "chosen"),
    [(False, [0, 0, 0, 0]), (True, [1, 1, 1, 1]), (2, [1, 0, 1, 0]), ([0, -1], [1, 0, 0, 1])],
)
def test_which_layers_recompute_their_activations(world, which, chosen):
    llama = load_recipe(str(mode(world, "layers", "zero1"))).model.language_model.config | {"num_hidden_layers": 4}
    options = {"model__language_model__config": llama, "model__language_model__gradient_checkpointing": which}
    config = load_recipe(str(mode(world, "layers", "zero1", **options)))
    parts = build_components(config.model)
    model = build_model(config.model, parts, torch.float32)
    apply_trainable(model, config.model, parts.unused)
    assert [int(layer.gradient_checkpointing) for layer in repeated_layers(model.language_model)] == chosen
    assert not any(layer.gradient_checkpointing for layer in repeated_layers(model.vision_tower))


def test_compiling_under_zero3_is_refused(world):
    output = launch(mode(world, "compiled-zero3", "zero3", training__compile="eager"), ranks=1, fails=True)
    assert "training.compile: ZeRO-3" in output and "Traceback" not in output


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model__language_model__gradient_checkpointing", [7], "[7] names a layer beyond the 2 there are"),
        ("model__language_model__gradient_checkpointing", 0, "a number k of at least 1"),
        ("training__compile", "indutor", "torch has no backend 'indutor'"),
    ],
)
def test_wrong_choices_are_refused(world, key, value, message):
    output = launch(mode(world, "wrong", "zero1", **{key: value}), ranks=1, fails=True)
    assert message in output and "Traceback" not in output
