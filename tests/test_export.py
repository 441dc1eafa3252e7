"""Exports against transformers' own class, for each kind of vision tower and projector."""

import pytest
import torch
from conftest import launch, medvlm
from safetensors import safe_open
from toy import CLIP, LLAMA, SIGLIP, make_recipe, make_tokenizer
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

from medvlm.config.load import load_recipe
from medvlm.export.llava import verify, write_llava
from medvlm.models.build import build_components, build_model

pytestmark = pytest.mark.usefixtures("forked_proof")

TOWERS = {
    "siglip": (SIGLIP, "full", -1),
    "clip": (CLIP, "default", -2),
    "dinov2": ({**SIGLIP, "model_type": "dinov2", "mlp_ratio": 2}, "default", -1),
    "vit": ({**SIGLIP, "model_type": "vit"}, "default", [1, -1]),
}
LANGUAGE = {
    "llama": LLAMA,
    "mistral": {**LLAMA, "model_type": "mistral"},
    "qwen2": {**LLAMA, "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {**LLAMA, "model_type": "qwen3", "head_dim": 8},
    "phi3": {**LLAMA, "model_type": "phi3", "pad_token_id": 3},
    "gemma2": {**LLAMA, "model_type": "gemma2", "head_dim": 8, "final_logit_softcapping": 5.0},
}


@pytest.mark.parametrize("projector", ["mlp", "linear"])
@pytest.mark.parametrize("tower", TOWERS)
def test_each_tower_and_projector_exports_exactly(tmp_path, tower, projector):
    check(tmp_path, tower, "llama", projector)


@pytest.mark.parametrize("language", LANGUAGE)
def test_each_language_model_exports_exactly(tmp_path, language):
    check(tmp_path, "siglip", language, "mlp")


def check(folder, tower, language, projector):
    make_tokenizer(folder / "tokenizer")
    vision, strategy, layer = TOWERS[tower]
    recipe = make_recipe(
        folder,
        model__vision_tower__config=vision,
        model__vision_tower__select_strategy=strategy,
        model__vision_tower__feature_layer=layer,
        model__multi_modal_projector__kind=projector,
        model__language_model__config=LANGUAGE[language],
    )
    config = load_recipe(str(recipe))
    parts = build_components(config.model)
    model = build_model(config.model, parts, torch.float32).eval()
    write_llava(folder / "hf", dict(model.named_parameters()), parts, config)
    proof = verify(model, parts, folder / "hf")
    assert proof["max_abs_logit_diff"] <= 1e-5
    assert proof["max_abs_pixel_diff"] <= 1e-5


def test_a_zero3_run_in_bf16_exports_the_stock_key_set(world, tmp_path):
    recipe = make_recipe(world, "exported", training__steps=2, training__precision="bf16")
    launch(recipe)
    out = tmp_path / "hf"
    assert "max_abs_logit_diff" in medvlm("export", world / "runs" / "exported", "--out", out, FRESH="1")
    stock = LlavaForConditionalGeneration(AutoModelForImageTextToText.from_pretrained(out).config)
    stock.save_pretrained(tmp_path / "stock")
    with (
        safe_open(out / "model.safetensors", "pt") as ours,
        safe_open(tmp_path / "stock/model.safetensors", "pt") as its,
    ):
        names = set(its.keys())
        assert set(ours.keys()) == names
        assert {ours.get_tensor(name).dtype for name in names} == {torch.bfloat16}
    assert (out / "README.md").read_text().startswith("---\nlibrary_name: transformers")
    plain = tmp_path / "unproven"
    assert "left out" in medvlm("export", world / "runs" / "exported", "--out", plain, "--no-proof")
    assert (plain / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert "not its logits" in (plain / "README.md").read_text()


def test_a_wrong_export_is_refused(tmp_path):
    make_tokenizer(tmp_path / "tokenizer")
    config = load_recipe(str(make_recipe(tmp_path)))
    parts = build_components(config.model)
    model = build_model(config.model, parts, torch.float32).eval()
    write_llava(tmp_path / "hf", dict(model.named_parameters()), parts, config)
    with torch.no_grad():
        model.multi_modal_projector.linear_2.bias.add_(0.1)
    with pytest.raises(ValueError, match="logits differ"):
        verify(model, parts, tmp_path / "hf")
