"""What a dual encoder's recipe or data may have wrong: handled, or one sentence that names it."""

import json
import math
from contextlib import nullcontext

import hooks
import pytest
import torch
from conftest import launch, refused_for_memory
from dual_toy import BERT, CLIP_TEXT, RESNET, SIGLIP_TEXT, VIT
from dual_world import make_pairs, pairs_recipe
from plain import metrics
from test_dual_training import Alone, members_of
from toy import SIGLIP

from medvlm.config.load import load_recipe
from medvlm.data.pairs import EncodedPair
from medvlm.data.shards import ShardReader, write_shards
from medvlm.errors import LeftOut, UserError
from medvlm.planning.plan import make_job
from medvlm.planning.rehearsal import rehearse
from medvlm.training import feed
from medvlm.training.families import Pass, family_of
from medvlm.training.memory import pair_bound


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["model.similarity.temperature=.nan"], "model.similarity.temperature: Input should be"),
        (["model.similarity.temperature=0.001"], "1 / temperature is 1000, above max_scale 100"),
        (["model.similarity.bias=.inf"], "model.similarity.bias: Input should be a finite number"),
        (["objective.kind=sigmoid"], "model.similarity.bias: the sigmoid objective needs one"),
        (["objective.kind=clip"], "objective.kind: Input should be 'info_nce', 'sigmoid' or 'semantic_matching'"),
        (["objective=null"], "objective: a dual encoder needs one"),
        (["model.family=blip"], "model: family: must be llava or dual_encoder"),
        (["model.text_towr.pooling=cls"], "model.text_towr: unknown key; did you mean 'text_tower'?"),
        (["model.vision_head.kind=mpl"], "model.vision_head.kind: Input should be"),
        (["training.global_batch_size=1", "training.micro_batch_size=1"], "compares at least 2 pairs"),
        (["data.packing.tokens=128"], "data.packing: is for language models"),
        (["training.sequence_parallel=2"], "training.sequence_parallel: is for language models"),
        (["model.text_tower.pooling=pooler", "model.text_tower.pooling_layers=[1,-1]"], "is of the last layer"),
        (["model.vision_head.hidden_dim=64"], "model.vision_head.hidden_dim: does nothing with `kind: linear`"),
        (
            ["model.text_head.kind=none", "model.text_head.bias=true"],
            "model.text_head.bias: does nothing with `kind: none`",
        ),
        (["objective.label_similarity=dot"], "objective.label_similarity: does nothing with `kind: info_nce`"),
        (["data.pairs.labels=[Edema]"], "data.pairs.labels: does nothing with `objective.kind: info_nce`"),
        (["run.seed=-1"], "run.seed: Input should be greater than or equal to 0"),
        (["run.seed=4294967296"], "run.seed: Input should be less than 4294967296"),
    ],
)
def test_a_wrong_recipe_is_refused_with_one_sentence(folder, overrides, sentence):
    with pytest.raises(UserError) as refused:
        load_recipe(str(pairs_recipe(folder, "wrong")), overrides)
    assert sentence in str(refused.value) and "\n" not in str(refused.value)


def test_what_a_recipe_says_of_another_kind_is_left_behind():
    given = ["model.vision_head.kind=linear", "objective.kind=sigmoid", "model.similarity.bias=-10"]
    assert load_recipe("convirt", given).model.vision_head.kind == "linear"  # though its heads had two layers
    with pytest.raises(UserError, match="hidden_dim: does nothing"):
        load_recipe("convirt", [*given, "model.vision_head.hidden_dim=64"])


def test_texts_longer_than_the_towers_positions_are_refused_at_the_start(folder):
    message = launch(pairs_recipe(folder, "long"), "data.max_length=512", ranks=1, fails=True)
    assert "data.max_length: 512 is more than the 128 tokens that the text tower has positions for" in message
    assert "Traceback" not in message


def test_longer_texts_are_cut_and_counted(folder):
    launch(pairs_recipe(folder, "cut", data__max_length=12, training__steps=1), ranks=1)
    [row] = metrics(folder, "cut")
    assert row["truncated"] > 0 and row["tokens"] <= 12 * row["texts"]


@pytest.mark.parametrize("text", [BERT, CLIP_TEXT], ids=["bert", "clip"])
def test_texts_as_long_as_the_tower_has_positions_are_trained_on(folder, text):
    """21 positions, as CLIP has 77: rows are not padded beyond them. The seed is the largest."""
    options = {"model__text_tower__pooling": "mean", "run__seed": 2**32 - 1, "training__steps": 1}
    path = pairs_recipe(folder, f"full-{text['model_type']}", VIT, text, data__max_length=21, **options)
    launch(path, "model.text_tower.config.max_position_embeddings=21", ranks=1)
    [row] = metrics(folder, path.stem)
    assert row["truncated"] > 0 and math.isfinite(row["loss"])


def passes(config, rows):
    family = family_of(config.model)
    parts = family.components(config)
    model = family.build(config, parts, torch.float32, None)
    batch = feed.training_data(config, parts).collate(rows)
    given = Pass(config, Alone(model), torch.device("cpu"), batch.targets, {}, 1, 1, 0, lambda _: nullcontext())
    outcome = family.passes(given, [batch])
    return outcome, [p.grad for p in model.parameters() if p.grad is not None]


def row(n, labels=None):
    image = torch.full((1, 32, 32), 10 * n, dtype=torch.uint8)
    return EncodedPair([3, 5 + n, 4], image, image_labels=labels, text_labels=labels)


def test_one_pair_alone_teaches_nothing_and_harms_nothing(folder):
    outcome, gradients = passes(load_recipe(str(pairs_recipe(folder, "one"))), [row(1)])
    assert float(outcome.share) == 0 and outcome.finite == [True]
    assert all(not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("labels", [[0.0] * 14, [1.0] + [0.0] * 13], ids=["nothing said", "No Finding"])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_a_batch_of_normal_studies_matches_all_with_all(folder, labels, similarity):
    """Their labels are all alike, so each image is to match every text by a third."""
    objective = {"kind": "semantic_matching", "label_similarity": similarity}
    config = load_recipe(str(pairs_recipe(folder, "normal", objective=objective)))
    outcome, gradients = passes(config, [row(n, labels) for n in range(3)])
    assert outcome.finite == [True] and all(bool(g.isfinite().all()) for g in gradients)
    assert float(outcome.share) >= torch.log(torch.tensor(3.0)), "no less than the entropy of the target"


def test_a_temperature_that_is_no_number_any_more_is_named(folder):
    path = pairs_recipe(folder, "scale", training__steps=3)
    hook = "medvlm.models.joint_space:Similarity.forward 0 all nan_first"
    said = launch(path, ranks=1, fails=True, script=hooks.SCRIPT, HOOK=hook)
    assert "step 1: the loss is nan, and so is the similarity's scale (samples of" in said


@pytest.mark.parametrize(
    ("change", "options", "reason"),
    [
        ({"report": {"findings": " ", "impression": "Normal."}}, {}, "its report has less than 3 words"),
        ({"report": {"indication": "Cough and fever."}}, {}, "empty report: nothing to read in findings, impression"),
        ({"images": [], "boxes": []}, {}, "no image, and an image and a text make a pair"),
        (
            {"report": {"indication": "Cough."}, "labels": {}},
            {"objective": {"kind": "semantic_matching"}, "data__pairs": {"labels": ["Edema"]}},
            "has none of the labels Edema",
        ),
    ],
    ids=["few words", "empty", "no image", "no labels"],
)
def test_a_sample_that_makes_no_pair_is_left_out_with_the_reason(folder, change, options, reason):
    config = load_recipe(str(pairs_recipe(folder, "aside", **options)))
    data = feed.training_data(config, family_of(config.model).components(config))
    sample, members = data.reader.load(0)
    with pytest.raises(LeftOut, match=reason):
        data.encoder(sample.model_copy(update=change), [] if "images" in change else members, 0)


def test_a_run_without_any_pair_stops_and_says_so(folder):
    path = pairs_recipe(folder, "none", data__pairs={"sections": ["comparison"]})
    message = launch(path, ranks=1, fails=True)
    assert "samples have no image or no text such as data.pairs asks for, 0 pairs are left in this batch" in message
    rows = (folder / "runs" / "none" / "quarantine-rank0.jsonl").read_text()
    assert "empty report: nothing to read in comparison" in rows


def test_reports_without_the_sections_asked_for_are_left_out_and_counted(folder):
    """As of MIMIC-CXR, where 4 in 100 have neither findings nor impression: that is no damage."""

    def some():
        reader = ShardReader(folder / "pairs" / "train")
        for n in range(len(reader)):
            sample, members = members_of(reader, n)
            change = {"report": {"report": "Rotated. No effusion is seen."}} if n % 4 == 0 else {}
            yield sample.model_copy(update=change), members

    write_shards(some(), folder / "some", "some")
    path = pairs_recipe(folder, "some", data__train=[str(folder / "some")], training__epochs=1, training__steps=None)
    launch(path, ranks=2)
    rows = metrics(folder, "some")
    left_out = [json.loads(line) for p in (folder / "runs/some").glob("quar*") for line in p.read_text().splitlines()]
    assert sum(r["left_out"] for r in rows) == len(left_out) == -(-len(ShardReader(folder / "some")) // 4)
    assert {r["reason"] for r in left_out} == {"empty report: nothing to read in findings, impression"}
    assert not any(r["quarantined"] for r in rows)
    assert all(r["pairs"] == r["samples"] - r["left_out"] for r in rows)
    assert all(row["left_out"] for row in left_out)
    said = launch(path, "run.name=fewer", "data.pairs.max_left_out=0.05", ranks=1, fails=True)
    assert "data.pairs.max_left_out is 0.05, the reasons are in" in said


def test_a_last_batch_of_left_out_samples_alone_is_no_step(folder):
    """Nine samples in batches of eight, of which the one that comes last has no findings."""
    path = pairs_recipe(folder, "rest", training__epochs=1, training__steps=None, training__global_batch_size=8)
    config = load_recipe(str(path), [f"data.train=[{folder / 'nine'}]"])
    reader = ShardReader(folder / "pairs" / "train")
    write_shards((members_of(reader, n) for n in range(9)), folder / "nine", "nine")
    data = feed.training_data(config, family_of(config.model).components(config))
    [last] = [number for pack in feed.make_plan(config, data, None).global_batch_at(1) for number, _ in pack]

    def some():
        for n in range(9):
            sample, members = members_of(reader, n)
            yield sample.model_copy(update={"report": {"indication": "Cough."}} if n == last else {}), members

    write_shards(some(), folder / "last", "last")
    launch(path, f"data.train=[{folder / 'last'}]", ranks=2)
    first, second = metrics(folder, "rest")
    assert first["pairs"] == 8 and "skipped" not in first
    assert second["skipped"] == "all samples of the batch are left out" and second["left_out"] == 1


def test_training_is_refused_before_it_starts_where_it_cannot_fit(folder, tmp_path):
    recipe = pairs_recipe(folder, "large")
    said = refused_for_memory(recipe, tmp_path)
    assert "parameters and optimizer alone" in said and "take more ranks" in said


@pytest.mark.parametrize(("vision", "text"), [(VIT, BERT), (RESNET, BERT), (SIGLIP, SIGLIP_TEXT)])
def test_a_step_is_rehearsed_only_where_a_bound_that_it_keeps_is_too_much(folder, vision, text):
    """The bound is above the rehearsed peak: else a step that does not fit would pass unasked."""
    options = {} if text is BERT else {"model__embedding_dim": 32}
    config = load_recipe(
        str(pairs_recipe(folder, "bound", vision, text, **options)),
        ["training.micro_batch_size=64", "training.global_batch_size=64"],
    )
    parts = family_of(config.model).components(config)
    job = make_job(config, parts, "cpu", config.training.zero, 64, 1)
    (rehearsal,) = rehearse([job])
    assert rehearsal.peak < pair_bound(config, parts, job.ds_config, 1, 1) - 2**30 < 20 * rehearsal.peak
