"""``--tiny``: any recipe through the same code path with small random backbones and phantom data."""

from typing import Any

from medvlm.config.load import recipe_values
from medvlm.errors import UserError

TINY_DATA = "runs/tiny-data"
TINY_PAIRS = "runs/tiny-pairs"
IMAGE_SIZE = 64
TRANSFORMER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
# From scratch these learn in hundreds of steps only with a wide initialiser (0.02 is for a width of 768) and without
# dropout. All image towers have a grid of 8 x 8.
FRESH = {"initializer_range": 0.1, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
IMAGE_TOWERS: dict[str, dict[str, Any]] = {
    "resnet": {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 1], "layer_type": "basic"},
    "swin": {
        **{"image_size": IMAGE_SIZE, "embed_dim": 32, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
        **{**FRESH, "drop_path_rate": 0.0},
    },
    "vit": {**TRANSFORMER, **FRESH, "image_size": IMAGE_SIZE, "patch_size": 8},
    "siglip_vision_model": {**TRANSFORMER, "image_size": IMAGE_SIZE, "patch_size": 8},
}
TEXT_TOWERS: dict[str, dict[str, Any]] = {
    "bert": {**TRANSFORMER, **FRESH, "vocab_size": 640, "max_position_embeddings": 256},
    "siglip_text_model": {**TRANSFORMER, "vocab_size": 640, "max_position_embeddings": 128, "projection_size": 64},
}


def tiny_data(recipe: str) -> str:
    """The folder of what `tiny_values` trains on."""
    dual = recipe_values(recipe).get("model", {}).get("family") == "dual_encoder"
    return TINY_PAIRS if dual else TINY_DATA


def tiny_values(recipe: str) -> dict[str, Any]:
    """Overrides that shrink a recipe. What it trains, its projector or heads, objective and schedule stay."""
    values = recipe_values(recipe)
    model = values.get("model", {})
    return _tiny_dual(values) if model.get("family") == "dual_encoder" else _tiny_llava(model)


def _tiny_dual(recipe: dict[str, Any]) -> dict[str, Any]:
    """Towers of the same types. Fresh ones learn nothing at the rates of pretrained ones in ten steps."""
    model = recipe["model"]
    image = _kind(model["vision_tower"], IMAGE_TOWERS)
    text = _kind(model["text_tower"], TEXT_TOWERS)
    values: dict[str, Any] = {
        "model.vision_tower.path": None,
        "model.vision_tower.config": {"model_type": image, **IMAGE_TOWERS[image]},
        "model.text_tower.path": None,
        "model.text_tower.config": {"model_type": text, **TEXT_TOWERS[text]},
        "model.text_tower.tokenizer": f"{TINY_PAIRS}/tokenizer",
        "model.text_tower.frozen_layers": min(1, model["text_tower"].get("frozen_layers", 0)),
        "model.init_from": None,
        "data.max_length": min(128, recipe["data"].get("max_length", 128)),
        "data.pairs.sections": ["findings", "impression"],  # phantoms have no captions
        "data.pairs.synonyms": None,
        **_tiny_run(TINY_PAIRS),
    }
    if image == "resnet":
        values["model.vision_tower.image_size"] = IMAGE_SIZE
    if "none" in (model.get(head, {}).get("kind") for head in ("vision_head", "text_head")):
        values["model.embedding_dim"] = TRANSFORMER["hidden_size"]
    for part in ("vision_tower", "vision_head", "text_tower", "text_head", "similarity"):
        values[f"model.{part}.learning_rate"] = 1e-3
    return values


def _kind(part: dict[str, Any], known: dict[str, dict[str, Any]]) -> str:
    """The model type of a tower: its configuration's, or the one that the name of its weights holds."""
    if part.get("config"):
        named = part["config"]["model_type"]
    else:
        name = str(part.get("path", "")).lower()
        named = next((kind for kind in known if kind.split("_")[0] in name), "")
    if named not in known:
        raise UserError(f"--tiny: no small stand-in for {part.get('path') or named}; known: {', '.join(known)}")
    return named


def _tiny_llava(model: dict[str, Any]) -> dict[str, Any]:
    strategy = model.get("vision_tower", {}).get("select_strategy", "default")
    vision = {
        "model_type": "clip_vision_model" if strategy == "default" else "siglip_vision_model",
        **TRANSFORMER,
        "image_size": IMAGE_SIZE,
        "patch_size": 16,
    }
    language = {"model_type": "llama", **TRANSFORMER, "vocab_size": 640}
    return {
        "model.vision_tower.path": None,
        "model.vision_tower.config": vision,
        "model.vision_tower.feature_layer": -2,
        "model.language_model.path": None,
        "model.language_model.gguf_file": None,
        "model.language_model.config": language,
        "model.language_model.tokenizer": f"{TINY_DATA}/tokenizer",
        "model.init_from": None,
        **_tiny_run(TINY_DATA),
    }


def _tiny_run(data: str) -> dict[str, Any]:
    return {
        "run.root": "runs/tiny",
        "data.train": [f"{data}/train"],
        "data.validation": [f"{data}/validation"],
        "data.workers": 0,
        "training.global_batch_size": 8,
        "training.micro_batch_size": 2,
        "training.epochs": None,
        "training.steps": 10,
        "training.checkpoint_every": 5,
        "training.evaluate_every": None,
    }
