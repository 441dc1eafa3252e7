"""``--tiny``: any recipe through the same code path with small random backbones and phantom data."""

from typing import Any

from medvlm.config.load import recipe_values

TINY_DATA = "runs/tiny-data"


def tiny_values(recipe: str) -> dict[str, Any]:
    """Overrides that shrink a recipe. What it trains, its projector and its schedule stay."""
    strategy = recipe_values(recipe).get("model", {}).get("vision_tower", {}).get("select_strategy", "default")
    vision = {
        "model_type": "clip_vision_model" if strategy == "default" else "siglip_vision_model",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 16,
    }
    language = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 640,
    }
    return {
        "run.root": "runs/tiny",
        "model.vision_tower.path": None,
        "model.vision_tower.config": vision,
        "model.vision_tower.feature_layer": -2,
        "model.language_model.path": None,
        "model.language_model.gguf_file": None,
        "model.language_model.config": language,
        "model.language_model.tokenizer": f"{TINY_DATA}/tokenizer",
        "model.init_from": None,
        "data.train": [f"{TINY_DATA}/train"],
        "data.validation": [f"{TINY_DATA}/validation"],
        "data.workers": 0,
        "training.global_batch_size": 8,
        "training.micro_batch_size": 2,
        "training.epochs": None,
        "training.steps": 10,
        "training.checkpoint_every": 5,
    }
