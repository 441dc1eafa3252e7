"""LoRA under DeepSpeed beside plain PyTorch with peft's own model, and its merge."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from conftest import launch, medvlm
from plain import assert_same_run, initialised, metrics, plain_pytorch
from safetensors.torch import load_file, save_file
from test_training import weights
from toy import CLIP, make_recipe

from medvlm.config.load import load_recipe
from medvlm.models import lora
from medvlm.models.build import build_components, build_model
from medvlm.models.trainable import apply_trainable

LORA = {"rank": 4, "alpha": 8, "dropout": 0.0}
OPTIONS = {
    "model__language_model__train": "lora",
    "model__language_model__lora": LORA,
    "model__vision_tower__train": "lora",
    "model__vision_tower__lora": {**LORA, "rank": 2, "rslora": True, "targets": ["q_proj", "fc1"]},
    "model__vision_tower__gradient_checkpointing": True,
    "model__language_model__gradient_checkpointing": True,
}


def recipe(world: Path, name: str, **options) -> Path:
    return make_recipe(world, name, model__init_from=str(world / "runs" / "init"), **OPTIONS, **options)


def wrapped_by_peft(config, parts) -> torch.nn.Module:
    """The plain model, wrapped as peft's documentation does it; the layers are named by hand."""
    model = initialised(config, parts)
    everything = r"layers\.\d\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
    for part, values in (
        ("vision_tower", {"r": 2, "use_rslora": True, "target_modules": r".*layers\.\d\.(self_attn\.q_proj|mlp\.fc1)"}),
        ("language_model", {"r": 4, "target_modules": rf"model\.{everything}"}),
    ):
        torch.manual_seed(config.run.seed)
        peft.get_peft_model(getattr(model, part), peft.LoraConfig(lora_alpha=8, **values))
    return model


@pytest.fixture(scope="module")
def reference(world):
    path = recipe(world, "lora-plain", training__steps=6)
    return plain_pytorch(path, wrapped_by_peft)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_equal_plain_pytorch_with_peft(world, reference, stage):
    name = f"lora-zero{stage}"
    output = launch(recipe(world, name, training__steps=6, training__zero=f"zero{stage}"))
    rows = metrics(world, name)
    assert_same_run(rows, reference)
    # by hand, rank 4: q and o [32, 32], k and v [16, 32], gate and up [64, 32], down [32, 64], in two layers
    assert f"{2 * 4 * (2 * 64 + 2 * 48 + 3 * 96):,}" in output
    before, after = weights(world, "init"), weights(world, name)
    for key, value in before.items():
        part, _, rest = key.rpartition(".")
        now = after[key if key in after else f"{part}.base_layer.{rest}"]
        assert torch.equal(value, now) == (not key.startswith("multi_modal_projector")), key


def test_bf16_adapters_train_under_zero3(world):
    launch(recipe(world, "lora-bf16", training__precision="bf16", training__steps=6))
    losses = [row["loss"] for row in metrics(world, "lora-bf16")]
    assert losses[-1] < losses[0]


def test_interrupted_adapters_resume_bit_for_bit(world):
    options = {"training__steps": 5}
    dropout = {"model.language_model.lora.dropout": 0.1}
    overrides = [f"{key}={value}" for key, value in dropout.items()]
    launch(recipe(world, "lora-whole", **options), *overrides)
    launch(recipe(world, "lora-broken", **options), *overrides, "training.stop_after=3")
    launch(recipe(world, "lora-broken", **options), *overrides, "run.resume=require")
    a, b = weights(world, "lora-whole"), weights(world, "lora-broken")
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_merged_weights_give_peft_s_own_merge(world):
    config = load_recipe(str(recipe(world, "lora-merge")))
    parts = build_components(config.model)
    model = wrapped_by_peft(config, parts)
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    ours = dict(lora.merged(model.state_dict(), config.model))
    for part in ("vision_tower", "language_model"):
        for module in getattr(model, part).modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                module.merge()
    for name, value in model.state_dict().items():
        if not lora.is_adapter(name):
            torch.testing.assert_close(ours.pop(name.replace(".base_layer.", ".")), value, rtol=0, atol=2e-6)
    assert not ours


def test_no_adapter_where_nothing_could_be_learnt(world):
    """CLIP's last layer is after the features that LLaVA takes; the output layer is not adapted."""
    options = {"model__vision_tower__config": CLIP, "model__vision_tower__feature_layer": -2}
    config = load_recipe(str(make_recipe(world, "lora-unused", **OPTIONS, **options)))
    parts = build_components(config.model)
    model = build_model(config.model, parts, torch.float32)
    lora.add_adapters(model, config.model, parts.unused, 0)
    summaries = {s.name: s for s in apply_trainable(model, config.model, parts.unused)}
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert not [n for n in names if n.startswith("vision_tower") and "layers.1." in n]
    assert not [n for n in names if "lm_head" in n or "base_layer" in n]
    assert summaries["vision_tower"].trainable == 2 * (32 + 32) + 2 * (32 + 64)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("model.language_model.lora.targets=[q_proy]", "model.language_model.lora.targets: no linear layer 'q_proy'"),
        ("model.multi_modal_projector.train=lora", "takes no adapters"),
        ("model.language_model.lora.rank=0", "model.language_model.lora.rank"),
    ],
)
def test_wrong_settings_are_one_sentence(world, override, reason):
    output = launch(recipe(world, "lora-wrong"), override, ranks=1, fails=True)
    assert reason in output and "Traceback" not in output


@pytest.fixture(scope="module")
def trained(world) -> Path:
    launch(recipe(world, "lora-trained", training__steps=6, training__zero="zero3"))
    return world / "runs" / "lora-trained"


def test_merged_export_equals_the_adapter_model(trained, tmp_path):
    proof = json.loads(medvlm("export", trained, "--out", tmp_path / "hf", "--json").splitlines()[-1])
    assert proof["max_abs_logit_diff"] <= 1e-5
    keys = load_file(tmp_path / "hf" / "model.safetensors")
    assert not [key for key in keys if "lora" in key or "base_layer" in key]


def change(folder: Path, out: Path, key: str) -> Path:
    """A copy of a stock folder with one weight made zero."""
    shutil.copytree(folder, out)
    values = load_file(out / "model.safetensors")
    values[key].zero_()
    save_file(values, out / "model.safetensors", {"format": "pt"})
    return out


def test_adapter_folder_is_loaded_by_stock_peft(trained, tmp_path):
    done = json.loads(
        medvlm("export", trained, "--out", tmp_path / "a", "--adapter", "--json", FRESH="1").splitlines()[-1]
    )
    base = tmp_path / "a" / "base"
    assert done["max_abs_logit_diff"] <= 1e-5 and done["base"] == str(base)
    settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert settings["modules_to_save"] == ["multi_modal_projector"]
    # a given base need not have the trained projector, but must have the frozen weights
    other = change(base, tmp_path / "projector", "multi_modal_projector.linear_1.weight")
    medvlm("export", trained, "--out", tmp_path / "b", "--adapter", "--base", other)
    assert not (tmp_path / "b" / "base").exists()
    wrong = change(base, tmp_path / "wrong", "language_model.model.layers.0.mlp.up_proj.weight")
    output = medvlm("export", trained, "--out", tmp_path / "c", "--adapter", "--base", wrong, status=2)
    assert "logits differ" in output and not (tmp_path / "c").exists()


def test_weights_of_a_lora_run_start_a_full_run(trained, world, tmp_path):
    """init_from merges them: the first loss is that of the adapters' model."""
    launch(make_recipe(world, "after-lora", training__steps=1, model__init_from=str(trained)))
    continued = recipe(world, "lora-longer", training__steps=1)
    launch(continued, f"model.init_from={trained}")
    assert metrics(world, "after-lora")[0]["loss"] == pytest.approx(metrics(world, "lora-longer")[0]["loss"], rel=1e-5)
