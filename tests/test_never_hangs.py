"""ZeRO-3 neither hangs nor goes wrong, whatever a rank's micro-batch holds, beside plain PyTorch.

Each case is three steps of a data set that ends in the third: two full global batches, then one sample, so that most
ranks have empty micro-batches. Values of every dimension are dealt evenly, in an order drawn from a fixed seed.
"""

import json
import random
from itertools import cycle, islice
from pathlib import Path

import pytest
from cases import run_cases
from plain import assert_same_run, initialised, metrics, plain_pytorch
from toy import make_recipe, sample, volume_sample

from medvlm.config.load import deepspeed_config_path
from medvlm.data.shards import write_shards
from medvlm.models.lora import add_adapters

CASES = 7  # per number of ranks
IMAGES = {
    "text only": lambda i: 0,
    "one image": lambda i: 1,
    "many or none": lambda i: (3, 0, 0, 1, 0)[i % 5],
    "an image now and then": lambda i: int(i % 6 == 0),
}
MIXES = [*IMAGES, "volumes, pictures, text"]
TRAIN = {
    "all": {},
    "projector": {"model__vision_tower__train": "frozen", "model__language_model__train": "frozen"},
    "tower frozen": {"model__vision_tower__train": "frozen"},
    "norms": {"model__language_model__train": "norm_and_bias", "model__multi_modal_projector__train": "frozen"},
    "lora": {"model__language_model__train": "lora", "model__vision_tower__train": "lora"},
    "lora, tower frozen": {"model__language_model__train": "lora", "model__vision_tower__train": "frozen"},
}
CHECKPOINTING = {"kept": False, "recomputed": True, "every second": 2}
LAYOUT = {
    "padded": {},
    "grouped": {"data__length_grouped": True},
    "padding-free": {"data__padding_free": True},
    "packed": {"data__packing": {"tokens": 256, "images": 6}},
}


def dealt(rng: random.Random, values: list) -> list:
    chosen = list(islice(cycle(values), CASES))
    rng.shuffle(chosen)
    return chosen


def items(mix: str, count: int):
    for i in range(count):
        if mix in IMAGES:
            yield sample(i, IMAGES[mix](i), ["no effusion on the left " * (i % 4) + "no"])
        elif i % 4 < 2:
            yield volume_sample(i, 1 + i % 5, windows=3 * (i % 3 == 0), picture=bool(i % 2))
        else:
            yield sample(i, i % 2, ["yes"])


def make_cases(world: Path, ranks: int) -> dict[str, Path]:
    rng = random.Random(ranks)
    dimensions = [MIXES, list(TRAIN), list(CHECKPOINTING), list(LAYOUT), [1, 2], [1, 2]]
    recipes = {}
    zero = json.loads(deepspeed_config_path("zero3").read_text())
    zero["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # small ones would stay whole, never gathered
    (world / "gathered.json").write_text(json.dumps(zero))
    for n, (mix, train, recompute, layout, micro, accumulation) in enumerate(
        zip(*[dealt(rng, values) for values in dimensions], strict=True)
    ):
        batch = micro * ranks * accumulation
        folder = world / f"data-{mix.replace(' ', '-')}-{batch}"
        if not folder.exists():
            write_shards(items(mix, 2 * batch + 1), folder, "toy", 100)
        name = f"{ranks} ranks: {mix}; {train}; {recompute}; {layout}; {micro} x {accumulation}"
        lora = {"rank": 2, "alpha": 4, "dropout": 0.0}
        recipes[name] = make_recipe(
            world,
            f"hang-{ranks}-{n}",
            data__train=[str(folder)],
            data__volume_slices=2,
            data__volume_window=[128, 256],
            data__cache_dir=str(world / "cache"),
            training__zero=str(world / "gathered.json"),
            training__steps=3,
            training__global_batch_size=batch,
            training__micro_batch_size=micro,
            training__checkpoint_every=100,
            model__init_from=str(world / "runs" / "init"),
            **{f"model__{part}__lora": lora for part in ("vision_tower", "language_model")},
            **{
                f"model__{p}__gradient_checkpointing": CHECKPOINTING[recompute]
                for p in ("vision_tower", "language_model")
            },
            **TRAIN[train],
            **LAYOUT[layout],
        )
    return recipes


def with_adapters(config, parts):
    """Adapters as training adds them; `test_lora.py` compares those with peft's own."""
    model = initialised(config, parts)
    add_adapters(model, config.model, parts.unused, config.run.seed)
    return model


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_any_mix_on_any_ranks_ends_and_equals_plain_pytorch(world, ranks):
    recipes = make_cases(world, ranks)
    run_cases(recipes, ranks, world)
    seen = set()
    for name, recipe in recipes.items():
        rows = metrics(world, recipe.stem)
        try:
            assert_same_run(rows, plain_pytorch(recipe, with_adapters))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
        seen |= {(row["images"] > 0, row["samples"] == 1) for row in rows}
    assert seen == {(a, b) for a in (True, False) for b in (True, False)}, "steps with and without images, full and not"
