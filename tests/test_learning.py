"""A small dual encoder learns: held-out reports of phantoms are found by their images, as a bug would not let them."""

import json

import yaml
from conftest import launch

from data_prep import phantom, tokenizer
from medvlm.study.run import recipe_of
from medvlm.study.schema import load_study


def test_a_small_recipe_finds_held_out_reports(tmp_path):
    """The settings of ``medvlm study phantom_pairs``, with 120 steps on a seventh of its images."""
    data = tmp_path / "data"
    phantom.generate(data, images=900, size=64, preset="easy", shares=(0.8, 0.2, 0), workers=1)
    tokenizer.train_tokenizer_folder(tmp_path / "tokenizer", shards=[data / "train"], vocab_size=600, kind="wordpiece")
    study = load_study("phantom_pairs")
    study.overrides |= {
        "training.steps": 120,
        "training.global_batch_size": 32,
        "training.evaluate_every": 120,
        "training.evaluation_batches": 8,
    }
    paths = {"train": [str(data / "train")], "validation": [str(data / "validation")]}
    values = recipe_of(
        study, "convirt", study.entries["convirt"], {**paths, "tokenizer": str(tmp_path / "tokenizer")}, 1
    )
    values["run"]["root"] = str(tmp_path)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    launch(tmp_path / "recipe.yaml", ranks=1)
    lines = (tmp_path / "convirt" / "metrics.jsonl").read_text().splitlines()
    found = next(row for row in map(json.loads, lines) if "eval_loss" in row)
    for direction in ("image_to_text", "text_to_image"):
        chance = found[f"eval_{direction}_chance_recall_at_10"]
        assert found[f"eval_{direction}_recall_at_10"] > 3 * chance, found
