"""Phantom pairs, a WordPiece tokenizer and recipes of small dual encoders on them."""

from pathlib import Path
from typing import Any

from dual_toy import BERT, VIT, dual_values
from toy import make_recipe

from data_prep import phantom, tokenizer


def make_pairs(folder: Path, images: int = 40) -> Path:
    phantom.generate(folder / "pairs", images=images, size=32, preset="easy", with_prior=True, workers=1)
    tokenizer.train_tokenizer_folder(
        folder / "bert-tokenizer", shards=[folder / "pairs" / "train"], vocab_size=200, kind="wordpiece"
    )
    return folder


def pairs_recipe(folder: Path, name: str, vision: dict = VIT, text: dict = BERT, **overrides: Any) -> Path:
    """Overrides of ``model`` as `dual_values` takes them, all others with their section in front."""
    model = {k.removeprefix("model__"): v for k, v in overrides.items() if k.startswith("model__")}
    others = {k: v for k, v in overrides.items() if not k.startswith("model__")}
    rates = {f"{part}__learning_rate": 1e-3 for part in ("vision_tower", "vision_head", "text_tower", "text_head")}
    text = {**text, "vocab_size": 200, "max_position_embeddings": 128}
    values = dual_values(folder, vision, text, **{**rates, **model})
    shards = str(folder / "pairs" / "train")
    options = {"model": values, "objective": {"kind": "info_nce"}, "data__train": [shards], "data__max_length": 64}
    return make_recipe(folder, name, **{**options, **others})
