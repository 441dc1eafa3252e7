"""Dual encoders through the same loop: plain PyTorch with one large batch, gradient caching, uneven ranks."""

import json
from contextlib import nullcontext

import pytest
import torch
from conftest import launch
from dual_toy import BERT, CLIP_TEXT, RESNET, SWIN
from dual_world import make_pairs, pairs_recipe
from plain import assert_same_run, initialised, metrics, plain_pytorch, whole_loss

from medvlm.config.load import load_recipe
from medvlm.data.shards import ShardReader, write_shards
from medvlm.training import feed
from medvlm.training.families import Pass, family_of

MASKED = {"kind": "info_nce", "masked_language_modeling": {"weight": 0.3, "probability": 0.2}}
SIGMOID = {"objective": {"kind": "sigmoid"}, "model__similarity": {"temperature": 0.1, "bias": -3.0}}
CASES = {
    "convirt": {"objective": {"kind": "info_nce", "image_weight": 0.75}, "data__pairs": {"text": "sentence"}},
    "sigmoid": SIGMOID,
    "medclip": {"objective": {"kind": "semantic_matching"}, "model__text_tower__pooling": "mean"},
    "masked": {"objective": MASKED},
}
FAST = {"training__steps": 6, "training__global_batch_size": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make_pairs(tmp_path_factory.mktemp("pairs"))
    for name, options in CASES.items():
        first = {**options, "training__steps": 1, "training__zero": "zero1"}
        launch(pairs_recipe(folder, f"init-{name}", **first), ranks=1)
    return folder


def members_of(reader, n):
    sample, images = reader.load(n)
    return sample, {i.file: image for i, image in zip(sample.images, images, strict=True)}


def recipe(folder, case, name, **options):
    start = {"model__init_from": str(folder / "runs" / f"init-{case}")}
    return pairs_recipe(folder, name, **{**CASES[case], **FAST, **start, **options})


OTHER_STAGES = [("convirt", "zero1"), ("sigmoid", "zero2"), ("medclip", "zero1"), ("masked", "zero2")]


@pytest.mark.parametrize(("case", "zero"), [*((case, "zero3") for case in CASES), *OTHER_STAGES])
def test_two_ranks_and_cached_gradients_equal_one_large_batch(folder, case, zero):
    """Two ranks of two micro-batches of two pairs; plain PyTorch takes the eight at once."""
    path = recipe(folder, case, f"{case}-{zero}", training__zero=zero)
    launch(path)
    assert_same_run(metrics(folder, f"{case}-{zero}"), plain_pytorch(path))


def test_the_evaluation_loss_is_one_of_full_batches_for_any_number_of_ranks(folder):
    """Of 29 samples the first 24; a batch of the last five would have a lower loss."""
    reader = ShardReader(folder / "pairs" / "train")
    write_shards((members_of(reader, n) for n in range(29)), folder / "odd", "odd")
    options = {"data__validation": [str(folder / "odd")], "training__steps": 1, "training__evaluate_every": 1}
    options |= {"training__micro_batch_size": 2}
    found = []
    for ranks, batches in ((1, None), (2, None), (2, 3)):
        name = f"evaluated-{ranks}-{batches}"
        launch(recipe(folder, "convirt", name, **options, training__evaluation_batches=batches), ranks=ranks)
        found += [row["eval_loss"] for row in metrics(folder, name) if "eval_loss" in row]
    assert len(found) == 3 and found == pytest.approx([found[0]] * 3, rel=1e-5)


def test_ranks_may_lack_images_or_texts(folder):
    """Of three samples that have one side each a rank has the same side thrice in a third of the steps."""

    def sides():
        reader = ShardReader(folder / "pairs" / "train")
        for n in range(len(reader)):
            sample, members = members_of(reader, n)
            left_out = {"report": {}} if n % 3 else {"images": [], "boxes": [], "messages": []}
            yield sample.model_copy(update=left_out), members if n % 3 else {}

    write_shards(sides(), folder / "sides", "sides")
    shape = {"training__global_batch_size": 6, "training__micro_batch_size": 1, "data__train": [str(folder / "sides")]}
    path = recipe(folder, "medclip", "sides", **{**FAST, **shape}, training__zero="zero3")
    launch(path)
    assert_same_run(metrics(folder, "sides"), plain_pytorch(path))


def test_frozen_layers_and_their_statistics_stay(folder):
    first = {"model__vision_tower__frozen_layers": 1, "model__text_tower__frozen_layers": 2}
    shape = {"model__vision_head": {"kind": "conv", "norm": "batch"}, "model__vision_tower__image_size": 32}
    path = pairs_recipe(folder, "layers", RESNET, **first, **shape, **FAST, training__zero="zero1")
    config = load_recipe(str(path))
    before = family_of(config.model).build(config, family_of(config.model).components(config), torch.float32, None)
    launch(path)
    after = initialised(
        load_recipe(str(pairs_recipe(folder, "after", RESNET, **shape, model__init_from=str(folder / "runs/layers")))),
        family_of(config.model).components(config),
    ).state_dict()
    same = {name for name, value in before.state_dict().items() if torch.equal(value, after[name])}
    frozen = ("vision_tower.embedder.", "vision_tower.encoder.stages.0.", "text_tower.embeddings.")
    frozen += ("text_tower.encoder.layer.0.", "text_tower.encoder.layer.1.")
    assert same >= {name for name in after if name.startswith(frozen)}
    trained = ("vision_tower.encoder.stages.1.", "text_tower.encoder.layer.2.", "vision_head.", "text_head.")
    moved = {name for name in after if name.startswith(trained) and not name.endswith("key.bias")}
    assert moved and any("running_mean" in name for name in moved) and not same & moved


def test_three_ranks_share_the_last_batch_of_an_epoch_unevenly(folder):
    """32 phantoms or so in batches of 9: the last one leaves ranks with one pair, or with none."""
    options = {"training__global_batch_size": 9, "training__micro_batch_size": 3, "training__epochs": 1}
    path = recipe(folder, "convirt", "uneven", training__steps=None, training__zero="zero2", **options)
    launch(path, ranks=3)
    found = metrics(folder, "uneven")
    assert found[-1]["pairs"] < 9
    config = load_recipe(str(path))
    steps = {"training__steps": len(found), "training__epochs": None}
    again = recipe(folder, "convirt", "uneven-plain", **{**options, **steps}, training__zero="zero2")
    assert [row["batch_digest"] for row in found] == [row["batch_digest"] for row in plain_pytorch(again)]
    assert_same_run(found, plain_pytorch(again))
    assert config.training.epochs == 1


class Alone:
    """What the passes need of an engine, without DeepSpeed."""

    def __init__(self, model):
        self.model, self.module = model, model

    def __call__(self, **inputs):
        return self.model(**inputs)

    def backward(self, loss):
        loss.backward()

    def step(self):
        return


def gradients(config, batches, dropout_seed=7):
    family = family_of(config.model)
    parts = family.components(config)
    model = family.build(config, parts, torch.float64, None).train()
    counts = {name: sum(getattr(b, name) for b in batches) for name in family.counted}
    targets = sum(b.targets for b in batches)
    given = Pass(
        config, Alone(model), torch.device("cpu"), targets, counts, 1, 1, dropout_seed, lambda _: nullcontext()
    )
    outcome = family.passes(given, batches)
    return model, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, outcome


def batches_of(config, size):
    data = feed.training_data(config, family_of(config.model).components(config))
    return [data[[(n, 0) for n in range(start, start + size)]] for start in range(0, 12, size)]


@pytest.mark.parametrize("case", CASES)
def test_cached_gradients_equal_uncached_ones(folder, case):
    """In fp64, so that what differs is the method and not the order of sums."""
    config = load_recipe(str(recipe(folder, case, f"cached-{case}", model__init_from=None)))
    model, cached, outcome = gradients(config, batches_of(config, 3))
    [whole] = batches_of(config, 12)
    model.zero_grad()
    loss = whole_loss(config, model, whole)
    loss.backward()
    assert float(outcome.share) == pytest.approx(float(loss), rel=1e-7)
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(cached[name], p.grad, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize(
    ("vision", "text", "masked"),
    [(SWIN, CLIP_TEXT, False), (RESNET, CLIP_TEXT, False), (RESNET, BERT, True)],
    ids=["drop-path", "batch-norm", "masked"],
)
def test_what_is_random_or_of_a_batch_is_the_same_in_both_passes(folder, vision, text, masked):
    """Dropout draws the same masks, batch statistics are those of the micro-batch: the loss is one of features that
    the graph of the second pass gives again. Masked texts take part in the second alone, after the embeddings."""
    text = {**text, "attention_dropout" if text is CLIP_TEXT else "hidden_dropout_prob": 0.3}
    vision = {**vision, "drop_path_rate": 0.4} if vision is SWIN else vision
    options = {"model__text_tower__pooling": "mean", "model__init_from": None}
    options |= {"objective": MASKED} if masked else {}
    config = load_recipe(str(pairs_recipe(folder, "random", vision, text, **options)))
    batches = batches_of(config, 4)
    seen = []
    family = family_of(config.model)
    model = family.build(config, family.components(config), torch.float32, None).train()

    class Watched(Alone):
        def __call__(self, **inputs):
            out = self.model(**inputs)
            seen.append((torch.is_grad_enabled(), out["image"].detach(), out["text"].detach()))
            assert ("masked_loss" in out) == (masked and torch.is_grad_enabled())
            return out

    counts = {name: sum(getattr(b, name) for b in batches) for name in family.counted}
    given = Pass(config, Watched(model), torch.device("cpu"), 12, counts, 1, 3, 7, lambda _: nullcontext())
    outcome = family.passes(given, batches)
    assert ("masked_language_modeling" in outcome.components) == masked
    assert [enabled for enabled, *_ in seen] == [False] * 3 + [True] * 3
    for (_, *first), (_, *second) in zip(seen[:3], seen[3:], strict=True):
        for a, b in zip(first, second, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # SDPA has another kernel without gradients
    assert not torch.equal(seen[0][1], seen[1][1])


def test_a_nan_names_its_micro_batch(folder):
    config = load_recipe(str(recipe(folder, "convirt", "nan", model__init_from=None)))
    family = family_of(config.model)
    model = family.build(config, family.components(config), torch.float32, None)
    batches = batches_of(config, 4)

    class Broken(Alone):
        calls = 0

        def __call__(self, **inputs):
            out = self.model(**inputs)
            self.calls += 1
            return out | {"text": out["text"] * float("nan")} if self.calls % 3 == 2 else out

    given = Pass(config, Broken(model), torch.device("cpu"), 12, {}, 1, 3, 7, lambda _: nullcontext())
    assert family.passes(given, batches).finite == [True, False, True]


def test_a_run_goes_on_where_it_stopped(folder):
    """Running statistics of the batch, dropout, masks and sampled sentences included; on another number of ranks the
    batches are the same."""
    options = {**CASES["masked"], "data__pairs": {"text": "sentence"}, "training__zero": "zero2", **FAST}
    shape = {"model__vision_head": {"kind": "conv", "norm": "batch"}, "model__vision_tower__image_size": 32}
    whole = pairs_recipe(folder, "whole", RESNET, **options, **shape)
    launch(whole)
    parted = pairs_recipe(folder, "parted", RESNET, **options, **shape, training__checkpoint_every=3)
    launch(parted, "training.stop_after=3")
    launch(parted)
    rows = [metrics(folder, name) for name in ("whole", "parted")]
    assert [r["loss"] for r in rows[0]] == [r["loss"] for r in rows[1]]
    assert {"contrastive", "masked_language_modeling"} == rows[0][0]["losses"].keys()


def test_a_run_begins_with_anothers_statistics_of_batches(folder):
    options = {"model__vision_head": {"kind": "conv", "norm": "batch"}, "model__vision_tower__image_size": 32}
    first = pairs_recipe(folder, "first", RESNET, **options, **FAST)
    launch(first, ranks=1)
    second = pairs_recipe(folder, "second", RESNET, **options, model__init_from=str(folder / "runs" / "first"))
    config = load_recipe(str(second))
    model = initialised(config, family_of(config.model).components(config))
    found = {name: b for name, b in model.named_buffers() if name.endswith("running_var")}
    assert found and all(float((b - 1).abs().max()) > 1e-3 for b in found.values())


@pytest.mark.parametrize(("case", "pairs"), [("convirt", True), ("medclip", False)])
def test_embeddings_are_looked_at_during_training(folder, case, pairs):
    name, shards = f"watched-{case}", str(folder / "pairs" / "validation")
    path = recipe(folder, case, name, data__validation=[shards], training__evaluate_every=2)
    launch(path, "training.stop_after=2")
    file = folder / "runs" / name / "metrics.jsonl"
    *steps, evaluated = metrics(folder, name)
    assert evaluated["step"] == 2 and {"eval_rankme_image", "eval_rankme_text"} <= evaluated.keys()
    assert {"eval_uniformity_text", "eval_modality_gap"} <= evaluated.keys()
    assert pairs == ("eval_alignment" in evaluated) == ("eval_image_to_text_recall_at_1" in evaluated)
    once = evaluated | {"eval_rankme_text": 1000.0, "eval_loss": 99.0}
    file.write_text("".join(json.dumps(row) + "\n" for row in (*steps, once)))
    said = launch(path)
    assert "warning: embeddings collapse: rankme_text fell from 1000.0 at step 2 to" in said
    rows = [row for row in metrics(folder, name) if "eval_loss" in row]
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert ["warning" in row for row in rows] == [False, True, True] and json.dumps(rows)


def test_a_collapse_is_said():
    from medvlm.training import collapse

    rows = [{"step": 10, "eval_loss": 3.0, "eval_rankme_image": 40.0, "eval_rankme_text": 30.0}]
    rows += [{"step": 20, "eval_loss": 2.9, "eval_rankme_image": 38.0, "eval_rankme_text": 31.0}]
    assert collapse.warning(rows[:1], rows[1]) is None
    narrow = {"step": 30, "eval_loss": 2.5, "eval_rankme_image": 12.0, "eval_rankme_text": 30.0}
    assert "rankme_image fell from 40.0 at step 10 to 12.0 while the loss fell" in collapse.warning(rows, narrow)
    assert collapse.warning(rows, narrow | {"eval_loss": 3.5}) is None, "a loss that rises says it by itself"
