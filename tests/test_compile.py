"""`training.compile`: what is compiled, how often, and that it trains as plain PyTorch does."""

import itertools

import pytest
import torch
from conftest import launch
from plain import assert_same_run, metrics, plain_pytorch
from toy import LLAMA, SIGLIP, make_recipe, sample

from medvlm.config.load import load_recipe
from medvlm.data.conversation import IGNORE
from medvlm.data.loader import Encoded, collate
from medvlm.data.shards import write_shards
from medvlm.models.build import build_components, build_model
from medvlm.models.layers import compile_layers
from medvlm.training import feed
from medvlm.training.families import family_of
from medvlm.training.flops import CostRecorder

LAYERS = 12  # more than torch compiles of one function by default
DEEP = {
    "model__language_model__config": {**LLAMA, "num_hidden_layers": LAYERS},
    "model__vision_tower__config": {**SIGLIP, "num_hidden_layers": LAYERS},
}


@pytest.fixture
def dynamo():
    """What torch counts of its compilations."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@pytest.mark.parametrize(("layout", "count"), [("padded", 2), ("padding-free", 7)])
def test_layers_of_a_kind_are_compiled_once_whatever_the_length(world, tmp_path, dynamo, layout, count):
    """A tower and a language model of many layers, whose FLOPs are counted and hidden states taken, as in training.

    Attention by segments, as a CPU has it, is not compiled, and what surrounds it are several graphs.
    """
    write_shards((sample(i, 2, ["no " * (9 * i + 1)]) for i in range(12)), tmp_path / "data", "toy")
    options = {"data__train": [str(tmp_path / "data")], "data__padding_free": layout == "padding-free", **DEEP}
    config = load_recipe(str(make_recipe(world, f"deep-{layout}", **options)))
    parts = build_components(config.model)
    model = build_model(config.model, parts, torch.float32).train()
    compile_layers([model.vision_tower, model.language_model], "eager")
    recorder = CostRecorder(model, config.model.PARTS, family_of(config.model).unit, parts.unused)
    data = feed.training_data(config, parts)
    graphs = []
    for first in range(0, 12, 2):
        model(**data[[(first, 0), (first + 1, 0)]].inputs(torch.device("cpu"))).backward()
        graphs.append(dynamo["stats"]["unique_graphs"])
    assert recorder.done
    assert graphs == [0, *[count] * 5], dict(dynamo["graph_break"])
    assert len(dynamo["graph_break"]) == (layout == "padding-free"), dict(dynamo["graph_break"])


def test_every_form_of_a_batch_has_its_graph(world, dynamo, monkeypatch):
    """Of one row and of more, padded or not, with one image and with more, in training and in validation: none is above
    torch's limit, which would run it uncompiled."""
    config = load_recipe(str(make_recipe(world, "forms")))
    parts = build_components(config.model)
    model = build_model(config.model, parts, torch.float32)
    compile_layers([model.vision_tower, model.language_model], "eager")
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    for training, images, lengths in itertools.product((True, False), (1, 2, 3), ([8], [8, 8], [8, 3], [16, 4, 2])):
        rows = [Encoded([5] * n, [5] * n) for n in lengths]
        rows[0].images = [torch.zeros(1, 32, 32, dtype=torch.uint8)] * images
        rows[0].ids[:0] = [parts.image_token_id] * (parts.image_tokens * images)
        rows[0].labels = [IGNORE] * (len(rows[0].ids) - lengths[0]) + rows[0].labels
        batch = collate(rows, 0, 32, False)
        with torch.set_grad_enabled(training):
            model.train(training)(**batch.inputs(torch.device("cpu")))
    assert dynamo["stats"]["unique_graphs"] > 8, "torch's own limit"


def test_inductor_equals_plain_pytorch(world):
    recipe = make_recipe(
        world,
        "inductor",
        training__compile="inductor",
        training__zero="zero2",
        training__steps=3,
        model__init_from=str(world / "runs" / "init"),
        model__vision_tower__train="frozen",
    )
    launch(recipe, ranks=1)
    assert_same_run(metrics(world, "inductor"), plain_pytorch(recipe))
