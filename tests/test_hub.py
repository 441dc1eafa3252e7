"""Models by hub name: out of the hub's cache, laid out as `huggingface_hub` does, as nothing is downloaded here."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dual_toy import BERT, make_bert_tokenizer
from dual_world import make_pairs, pairs_recipe
from safetensors.torch import load_file
from toy import CLIP, LLAMA, make_recipe, make_tokenizer, make_world
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, CLIPImageProcessor

from medvlm.models.backbones import stock_processor

REVISION = "0" * 40


def build(auto, values: dict):
    return auto.from_config(AutoConfig.for_model(**values))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """The toy data, and a cache with an image tower, a language model and a text tower."""
    world = make_pairs(make_world(tmp_path_factory.mktemp("hub")))
    tower = world / "tower"
    build(AutoModel, CLIP).save_pretrained(tower)
    side = CLIP["image_size"]
    processor: CLIPImageProcessor = stock_processor("CLIPImageProcessor")(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    processor.save_pretrained(tower)
    build(AutoModelForCausalLM, LLAMA).save_pretrained(world / "llama")
    make_tokenizer(world / "llama")
    build(AutoModel, {**BERT, "vocab_size": 200, "max_position_embeddings": 128}).save_pretrained(world / "bert")
    make_bert_tokenizer(world / "bert")
    for name in ("tower", "llama", "bert"):
        place = world / "cache" / f"models--acme--{name}"
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text(REVISION)
        shutil.move(world / name, place / "snapshots" / REVISION)
    return world


def run(world: Path, *arguments: object) -> subprocess.CompletedProcess:
    """In a process that reads the cache's place when it starts, as the hub's library does."""
    environment = {**os.environ, "HF_HUB_CACHE": str(world / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [str(Path(sys.executable).with_name("medvlm")), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


def test_a_language_model_and_its_tower_are_trained_and_exported_by_name(world, tmp_path):
    recipe = make_recipe(
        world,
        "named",
        model__vision_tower={"path": "acme/tower", "train": "frozen", "feature_layer": -1, "select_strategy": "full"},
        model__language_model__config=None,
        model__language_model__tokenizer=None,
        model__language_model__path="acme/llama",
        training__steps=1,
    )
    done = run(world, "train", recipe)
    assert done.returncode == 0, done.stderr
    done = run(world, "export", world / "runs" / "named", "--out", tmp_path / "hf")
    assert done.returncode == 0 and "max_abs_logit_diff" in done.stdout, done.stderr
    given = load_file(world / "cache/models--acme--tower/snapshots" / REVISION / "model.safetensors")
    written = load_file(tmp_path / "hf" / "model.safetensors")
    end = "encoder.layers.0.mlp.fc1.weight"
    kept, before = (next(v for k, v in values.items() if k.endswith(end)) for values in (written, given))
    assert torch.equal(kept, before)


def test_a_dual_encoder_is_trained_from_names(world):
    named = {"config": None, "path": "acme/bert"}
    text = {f"model__text_tower__{key}": value for key, value in {**named, "tokenizer": None}.items()}
    vision = {"model__vision_tower__config": None, "model__vision_tower__path": "acme/tower"}
    done = run(world, "train", pairs_recipe(world, "named-pairs", **text, **vision, training__steps=1))
    assert done.returncode == 0, done.stderr
    absent = run(world, "train", pairs_recipe(world, "absent", **{**text, "model__text_tower__path": "acme/none"}))
    assert absent.returncode == 2 and "cannot load acme/none" in absent.stderr and "Traceback" not in absent.stderr
