"""Ranks that share every row, beside plain PyTorch on whole rows."""

import pytest
from cases import run_cases
from conftest import launch
from plain import assert_same_run, metrics, plain_pytorch
from toy import LLAMA, make_recipe

DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


def recipe(world, name, size=2, **options):
    start = {
        "training__steps": 4,
        "training__sequence_parallel": size,
        "model__init_from": str(world / "runs" / "init"),
    }
    return make_recipe(world, name, **start | options)


def test_parts_of_rows_on_several_ranks_equal_whole_rows(world):
    """No image, one or two per sample, uneven lengths, accumulation, recomputed layers; two ranks, and two pairs."""
    recompute = {"model__language_model__gradient_checkpointing": True}
    pairs = {f"sp-zero{stage}": recipe(world, f"sp-zero{stage}", training__zero=f"zero{stage}") for stage in (1, 2)}
    pairs["sp-zero3"] = recipe(world, "sp-zero3", **recompute)
    run_cases(pairs, 2, world)
    run_cases({"sp-four": recipe(world, "sp-four")}, 4, world)
    expected = plain_pytorch(recipe(world, "sp-plain"))
    for name in (*pairs, "sp-four"):
        rows = metrics(world, name)
        assert_same_run(rows, expected)
        assert [row["images"] for row in rows] == [row["images"] for row in metrics(world, "sp-zero1")]


def test_evaluation_counts_every_token_once(world):
    names = ("sp-eval", "whole-eval")
    for name, size in zip(names, (2, 1), strict=True):
        options = {"training__steps": 1, "data__validation": [str(world / "shards")]}
        launch(recipe(world, name, size, **options))
    shared, whole = (metrics(world, name)[-1]["eval_loss"] for name in names)
    assert shared == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "ranks", "message"),
    [
        ({"data__packing": {"tokens": 256, "images": 4}}, 1, "not with data.packing"),
        ({"data__padding_free": True}, 1, "not with data.packing or data.padding_free"),
        ({"training__compile": "eager"}, 1, "not with training.compile"),
        ({}, 1, "2 does not divide 1 rank(s)"),
        ({"model__attention": "eager"}, 2, "works with sdpa"),
        ({"model__attention": "varlen"}, 2, "works with sdpa"),
        (
            {"model__language_model__config": {**LLAMA, "num_attention_heads": 1, "num_key_value_heads": 1}},
            2,
            "1 heads",
        ),
        (
            {"model__language_model__config": {**LLAMA, "rope_parameters": DYNAMIC}},
            2,
            "rope of type dynamic depends on a row's length",
        ),
        (
            {"model__language_model__config": {**LLAMA, "model_type": "mistral", "sliding_window": 64}},
            2,
            "sliding window",
        ),
    ],
)
def test_what_would_not_be_exact_is_refused(world, options, ranks, message):
    output = launch(recipe(world, "sp-refused", model__init_from=None, **options), ranks=ranks, fails=True)
    assert message in output and "Traceback" not in output
