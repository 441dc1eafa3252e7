"""Tasks of dual encoders: by hand on models that know the answer, and end to end on folders of three classes."""

import io
import itertools
import json
import re
import shlex

import numpy as np
import pytest
import torch
from conftest import REPO
from dual import KINDS, make_dual
from PIL import Image
from sklearn import metrics as reference
from test_export_dual_encoder import exported

from data_prep import phantom
from medvlm import evaluation
from medvlm.data.schema import Sample
from medvlm.errors import UserError
from medvlm.evaluation import (
    embedding_space,
    grounding,
    intervals,
    linear_probe,
    precision_at_k,
    retrieval,
    zero_shot,
)
from medvlm.evaluation.pictures import load_pictures, only_class, truth
from medvlm.evaluation.task import Context

SIDE = 32


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 30)
    monkeypatch.setattr(linear_probe, "GRID", [0.01, 1.0])


class Reader:
    """Samples in memory whose picture is one grey value, by which a model of the test knows it."""

    def __init__(self, samples):
        self.samples = [Sample.model_validate({**BASE, "key": f"s{i}", **fields}) for i, fields in enumerate(samples)]

    def __len__(self):
        return len(self.samples)

    def sample(self, i):
        return self.samples[i]

    def images(self, i):
        out = []
        for n in range(len(self.samples[i].images)):
            buffer = io.BytesIO()
            Image.new("L", (SIDE, SIDE), i if n == 0 else 200 + i).save(buffer, "png")
            out.append(buffer.getvalue())
        return out


BASE = {
    "source": "toy",
    "license": "CC0-1.0",
    "split": "test",
    "images": [{"file": "0.png", "width": SIDE, "height": SIDE}],
}


class Model:
    """Embeds a picture by its grey value and a text by a table; ``grids`` are the patches of pictures."""

    def __init__(self, images, texts, grids=None):
        self.of_image, self.of_text, self.grids = images, texts, grids

    def rows(self, values, normalized):
        rows = torch.tensor(np.array(values), dtype=torch.float32)
        return torch.nn.functional.normalize(rows, dim=-1) if normalized else rows

    def images(self, images, batch_size=32, *, normalized=True):
        return self.rows([self.of_image[image.getpixel((0, 0))] for image in images], normalized)

    def texts(self, texts, batch_size=32, *, normalized=True):
        return self.rows([self.of_text[text] for text in texts], normalized)

    def patches(self, images, batch_size=32):
        return self.rows([self.grids[image.getpixel((0, 0))] for image in images], True)

    def pixels(self, images):
        return {"pixel_values": torch.stack([torch.tensor(np.asarray(i) / 255).permute(2, 0, 1) for i in images])}


def unit(*values):
    return list(map(float, values))


# ---- labels


def test_uncertain_and_blank_labels_follow_the_options():
    (picture,) = load_pictures(Reader([{"labels": {"A": 1, "B": -1, "C": None, "D": 0}}]), None, 0)
    assert [truth(picture, n, "ignore", "negative") for n in "ABCDE"] == [1, None, 0, 0, 0]
    assert [truth(picture, n, "positive", "ignore") for n in "ABCDE"] == [1, 1, None, 0, None]
    assert truth(picture, "B", "negative", "ignore") == 0


@pytest.mark.parametrize(
    ("labels", "exclusive", "expected"),
    [
        ({"A": 1, "B": 0, "C": None}, "all", "A"),
        ({"A": 1, "B": 1}, "classes", None),
        ({"A": 1, "B": -1}, "classes", None),
        ({"A": 1, "Other": 1}, "classes", "A"),
        ({"A": 1, "Other": 1}, "all", None),
        ({"A": 1, "Other": -1}, "all", None),
        ({"A": 1, "No Finding": 1}, "all", "A"),
        ({"A": 0, "B": 0}, "all", None),
    ],
)
def test_an_image_of_one_class_only(labels, exclusive, expected):
    (picture,) = load_pictures(Reader([{"labels": labels}]), None, 0)
    assert only_class(picture, ["A", "B", "C"], exclusive) == expected


def test_a_limit_and_a_view_choose_pictures():
    views = ["PA", "LATERAL", "PA", "AP", "PA", None]
    reader = Reader([{"labels": {"A": 1}, "images": [{**BASE["images"][0], "view": v}]} for v in views])
    assert [p.key for p in load_pictures(reader, None, 0, views=["PA", "AP"])] == ["s0", "s2", "s3", "s4"]
    assert len(load_pictures(reader, 2, 0)) == 2 and load_pictures(reader, 2, 0) == load_pictures(reader, 2, 0)


def test_the_text_is_the_sections_asked_for_and_the_picture_not_an_earlier_one():
    own, before = BASE["images"][0], {**BASE["images"][0], "file": "1.png", "metadata": {"role": "prior"}}
    report = {"impression": "Clear.", "findings": " Lungs  are clear. ", "notes": "See above."}
    reader = Reader([{"report": report, "images": [own, before]}])
    for sections, text in (
        (("findings", "impression"), "Lungs are clear. Clear."),
        (("impression",), "Clear."),
        (("notes",), "See above."),
        (("history",), None),
    ):
        (picture,) = load_pictures(reader, None, 0, sections=sections)
        assert (picture.number, picture.text) == (0, text)


# ---- retrieval


def reports(texts, **fields):
    return Reader([{"report": {"findings": t}, "patient_id": f"p{i}", **fields} for i, t in enumerate(texts)])


def test_retrieval_counts_equal_reports_as_one_answer_and_says_how_many_there_are():
    options = retrieval.RetrievalOptions(k=[1, 2])
    pictures = retrieval.load(reports(["clear", "mass", "clear  ", "effusion"]), None, 0, options)
    model = Model(
        {0: unit(1, 0, 0), 1: unit(0.9, 0.8, 0), 2: unit(1, 0.1, 0), 3: unit(0, 0.6, 0.5)},
        {"clear": unit(1, 0, 0), "mass": unit(0, 1, 0), "effusion": unit(0, 0, 1)},
    )
    results, rows = retrieval.evaluate(model, pictures, options, Context(None))
    ranks = {d: [r["rank"] for r in rows if r["direction"] == d] for d in retrieval.DIRECTIONS}
    assert ranks["image_to_text"] == [1, 3, 1, 2]  # the second stands behind two copies of one text
    # of clear, mass, clear, effusion: the second text's nearest image is the fourth, then its own
    assert ranks["text_to_image"] == [1, 2, 1, 1]
    assert (results["n_texts"], results["n_unique_texts"]) == (4, 3)
    assert results["image_to_text_recall_at_1"] == 0.5 and results["image_to_text_recall_at_2"] == 0.75
    assert results["image_to_text_mrr"] == pytest.approx((1 + 1 / 3 + 1 + 1 / 2) / 4)
    shown = {row.label: row for row in retrieval.table(results)}
    assert shown["  unique"].value == 3 and shown["image to text: recall at 1"].shown == "50.0"


def test_a_sample_with_two_images_has_one_report():
    two = [{"file": f"{n}.png", "width": SIDE, "height": SIDE} for n in range(2)]
    options = retrieval.RetrievalOptions(k=[1])
    pictures = retrieval.load(reports(["a", "b"], images=two), None, 0, options)
    model = Model(
        {0: unit(1, 0), 200: unit(1, 0.1), 1: unit(0, 1), 201: unit(1, 0.2)}, {"a": unit(1, 0), "b": unit(0, 1)}
    )
    results, rows = retrieval.evaluate(model, pictures, options, Context(None))
    assert (results["n_image_to_text"], results["n_text_to_image"]) == (4, 2)
    assert [r["rank"] for r in rows] == [1, 1, 1, 2, 1, 1]


def test_other_reports_of_the_patient_are_left_out_when_asked():
    reader = Reader([{"report": {"findings": t}, "patient_id": p} for t, p in (("a", "x"), ("b", "x"), ("c", "y"))])
    model = Model(
        {0: unit(0.1, 1, 0), 1: unit(0, 1, 0), 2: unit(0, 0, 1)},
        {"a": unit(1, 0, 0), "b": unit(0, 1, 0), "c": unit(0, 0, 1)},
    )
    found = []
    for other in (False, True):
        options = retrieval.RetrievalOptions(k=[1], other_patients=other)
        results, _ = retrieval.evaluate(model, retrieval.load(reader, None, 0, options), options, Context(None))
        found.append(results["image_to_text_recall_at_1"])
    assert found == pytest.approx([2 / 3, 1])


def test_too_few_reports_and_no_reports_are_said():
    options = retrieval.RetrievalOptions()
    with pytest.raises(UserError, match=r"--k 10: there are only 2 report"):
        retrieval.evaluate(Model({}, {}), retrieval.load(reports(["a", "b"]), None, 0, options), options, Context(None))
    with pytest.raises(UserError, match="no image has a report with impression"):
        retrieval.load(reports(["a"]), None, 0, retrieval.RetrievalOptions(section=["impression"]))


# ---- zero-shot


def labelled(rows, **more):
    return Reader([{"labels": r, "patient_id": f"p{i}", **more} for i, r in enumerate(rows)])


def test_binary_scores_and_areas_are_those_of_the_definition(tmp_path):
    prompts = tmp_path / "own.yaml"
    prompts.write_text(
        "kind: binary\nlabels: {A: a, Absent: b, Always: c}\npositive: ['{}', 'some {}']\nnegative: ['no {}']\n"
    )
    values = [1, 0, -1, None, 1, 0, 1]
    reader = labelled([{"A": v, "Always": 1} for v in values])
    random = np.random.default_rng(0)
    table = {i: random.normal(size=3) for i in range(7)}
    texts = {"a": unit(1, 0, 0), "some a": unit(0, 1, 0), "no a": unit(0, 0, 1), "c": unit(1, 0, 0)}
    model = Model(table, texts)
    cosine = np.array([table[i] / np.linalg.norm(table[i]) for i in range(7)])
    for aggregate, positive in (("mean", cosine[:, :2].sum(1) / np.sqrt(2)), ("max", cosine[:, :2].max(1))):
        options = zero_shot.ZeroShotOptions(prompts=str(prompts), aggregate=aggregate)
        results, rows = zero_shot.evaluate(model, zero_shot.load(reader, None, 0, options), options, Context(None))
        expected = np.exp(positive) / (np.exp(positive) + np.exp(cosine[:, 2]))
        np.testing.assert_allclose([r["score"]["A"] for r in rows], expected, atol=1e-6)
        kept = [0, 1, 3, 4, 5, 6]  # the uncertain one is left out, the blank one is negative
        y = [1, 0, 0, 1, 0, 1]
        found = results["labels"]["A"]
        assert found["auroc"] == pytest.approx(reference.roc_auc_score(y, expected[kept])) == results["mean_auroc"]
        assert found["average_precision"] == pytest.approx(reference.average_precision_score(y, expected[kept]))
        assert (found["n"], found["n_positive"], found["prevalence"]) == (6, 3, 0.5)
        assert results["left_out"] == {"Absent": "not in the data", "Always": "only positive"}
        assert found["auroc_ci95"][0] <= found["auroc"] <= found["auroc_ci95"][1]


def test_the_area_is_scikit_learns_with_ties_too():
    random = np.random.default_rng(0)
    for n in (2, 5, 300):
        y = np.array([0, 1, *random.integers(0, 2, n - 2)])
        for scores in (random.normal(size=n), random.integers(0, 4, n), np.ones(n)):
            assert zero_shot.auroc(y, scores) == pytest.approx(reference.roc_auc_score(y, scores))
    assert zero_shot.auroc(np.ones(3), np.arange(3)) is None


def test_classes_against_each_other(tmp_path):
    prompts = tmp_path / "own.yaml"
    prompts.write_text("kind: multiclass\nclasses: {A: [a, aa], B: [b]}\n")
    reader = labelled(
        [{"A": 1, "B": 0}, {"A": 1}, {"A": 0, "B": 1}, {"B": 1, "A": None}, {"A": 1, "B": 1}, {"A": 1, "C": 1}]
    )
    model = Model(
        {
            0: unit(1, 0, 0),
            1: unit(0, 1, 0),
            2: unit(0.9, 0, 1),
            3: unit(0, 0.3, 0.2),
            4: unit(1, 1, 1),
            5: unit(1, 1, 1),
        },
        {"a": unit(1, 0, 0), "aa": unit(0, 1, 0), "b": unit(0, 0, 1)},
    )
    options = zero_shot.ZeroShotOptions(prompts=str(prompts), aggregate="max")
    results, rows = zero_shot.evaluate(model, zero_shot.load(reader, None, 0, options), options, Context(None))
    assert [r["answer"] for r in rows] == ["A", "A", "B", "A"] and [r["truth"] for r in rows] == ["A", "A", "B", "B"]
    assert results["accuracy"] == 0.75 and results["chance_accuracy"] == 0.5 and results["majority_accuracy"] == 0.5
    assert results["macro_f1"] == pytest.approx(reference.f1_score([0, 0, 1, 1], [0, 0, 1, 0], average="macro"))
    assert results["classes"]["B"] == {"n": 2, "recall": 0.5, "said": 1, "prompts": ["b"]}
    scores = np.array([[r["score"]["A"], r["score"]["B"]] for r in rows])
    standardised = (scores - scores.mean(0)) / scores.std(0)
    assert results["accuracy_standardised"] == np.mean(standardised.argmax(1) == [0, 0, 1, 1])
    assert any("standardised" in row.label for row in zero_shot.table(results))


def test_mistakes_in_zero_shot_data_are_named():
    options = zero_shot.ZeroShotOptions()
    model = Model({}, {})
    with pytest.raises(UserError, match="no image has labels"):
        zero_shot.load(reports(["a"]), None, 0, options)
    for rows, message in (
        ([{"Heart": 1}], "none of its labels is in the data, which have Heart"),
        ([{"Edema": 1}, {"Edema": 1}], "no label is both positive and negative"),
    ):
        with pytest.raises(UserError, match=message):
            zero_shot.evaluate(model, zero_shot.load(labelled(rows), None, 0, options), options, Context(None))
    options = zero_shot.ZeroShotOptions(prompts="chexpert_5x200")
    with pytest.raises(UserError, match="no image has Cardiomegaly as the only positive label"):
        pictures = zero_shot.load(labelled([{"Atelectasis": 1}]), None, 0, options)
        zero_shot.evaluate(model, pictures, options, Context(None))


# ---- precision at k


def test_precision_by_hand_and_ties_count_against_it():
    similarity = torch.tensor([[0.9, 0.8, 0.7, 0.6], [0.5, 0.5, 0.5, 0.5]])
    right = torch.tensor([[True, False, True, True], [True, True, False, False]])
    assert precision_at_k.precision_at(similarity, right, 2).tolist() == [0.5, 0]
    assert precision_at_k.precision_at(similarity, right, 3).tolist() == pytest.approx([2 / 3, 1 / 3])


def test_queries_and_candidates_have_no_patient_in_common_and_a_sighted_model_is_perfect(tmp_path):
    prompts = tmp_path / "own.yaml"
    prompts.write_text("kind: binary\nlabels: {A: a, B: b, C: c}\npositive: ['{}']\nnegative: ['no {}']\n")
    rows = [{"A": 1, "B": 0} if i % 2 else {"A": 0, "B": 1} for i in range(40)]
    reader = Reader([{"labels": r, "patient_id": f"p{i // 3}"} for i, r in enumerate(rows)])
    options = precision_at_k.PrecisionOptions(prompts=str(prompts), k=[1, 5], queries_per_class=2)
    pictures = precision_at_k.load(reader, None, 0, options)
    queries, candidates = precision_at_k.split(pictures, ["A", "B", "C"], options, 0)
    assert len(queries) == 4 and not {p.group for p, _ in queries} & {p.group for p, _ in candidates}
    sighted = Model({i: unit(i % 2, 1 - i % 2) for i in range(40)}, {"a": unit(1, 0), "b": unit(0, 1)})
    results, found = precision_at_k.evaluate(sighted, pictures, options, Context(None))
    assert results["image_precision_at_5"] == results["text_precision_at_5"] == 1
    assert results["classes_left_out"] == ["C"] and len(found) == 4 + 2
    assert results["chance_text_precision_at_1"] == pytest.approx(0.5, abs=0.1)
    blind = Model(dict.fromkeys(range(40), unit(1, 0)), {"a": unit(1, 0), "b": unit(1, 0)})
    assert precision_at_k.evaluate(blind, pictures, options, Context(None))[0]["image_precision_at_5"] == 0
    options = precision_at_k.PrecisionOptions(prompts=str(prompts), k=[50])
    with pytest.raises(UserError, match="--k 50: there are only"):
        precision_at_k.evaluate(sighted, pictures, options, Context(None))


# ---- linear probe


def probe_world(n=200, signal=2.0):
    random = np.random.default_rng(0)
    y = random.integers(0, 2, n)
    table = {i: random.normal(size=6) + signal * np.array([y[i], 0, 0, 0, 0, 0]) for i in range(n)}
    reader = Reader([{"labels": {"A": int(v), "B": 1}, "patient_id": f"p{i // 2}"} for i, v in enumerate(y)])
    return Model(table, {}), reader


def test_a_probe_learns_what_is_linear_and_more_labels_help():
    model, reader = probe_world()
    options = linear_probe.ProbeOptions()
    pictures = linear_probe.load(reader, None, 0, options)
    results, rows = linear_probe.evaluate(model, pictures, options, Context(None))
    whole = results["fractions"]["1"]["labels"]["A"]
    assert whole["auroc"] == pytest.approx(0.92, abs=0.06)  # of two normals 2 apart: Phi(2 / sqrt 2)
    assert results["left_out"] == {"B": "one class only in the test or the training patients"}
    assert (
        results["fractions"]["0.01"]["undefined"] == ["A"]
        or results["fractions"]["0.01"]["mean_auroc"] < whole["auroc"]
    )
    assert [results["fractions"][f]["n_train_patients"] for f in ("0.01", "0.1", "1")] == [1, 6, 60]
    y = [r["truth"]["A"] for r in rows]
    expected = np.mean([reference.roc_auc_score(y, [r["score"]["1"]["A"][s] for r in rows]) for s in range(3)])
    assert whole["auroc"] == pytest.approx(expected)
    _, noise_reader = model, reader
    blind = Model({i: np.random.default_rng(i).normal(size=6) for i in range(200)}, {})
    blind_results, _ = linear_probe.evaluate(
        blind, linear_probe.load(noise_reader, None, 0, options), options, Context(None)
    )
    assert blind_results["fractions"]["1"]["mean_auroc"] == pytest.approx(0.5, abs=0.2)


def test_splits_are_by_patient():
    patients = [f"p{i // 3}" for i in range(90)]
    parts = linear_probe.split(patients, (0.6, 0.2), 0)
    assert [len(p) for p in parts] == [18, 6, 6] and sorted(itertools.chain(*parts)) == sorted(set(patients))
    assert parts == linear_probe.split(patients, (0.6, 0.2), 0) != linear_probe.split(patients, (0.6, 0.2), 1)


def test_a_patient_in_both_sets_is_refused():
    model, reader = probe_world(20)
    options = linear_probe.ProbeOptions()
    with pytest.raises(UserError, match=r"--train-data: 10 patient\(s\) are in --data too"):
        linear_probe.evaluate(
            model, linear_probe.load(reader, None, 0, options), options, Context(None, train_reader=reader)
        )


def test_a_single_class_cannot_be_probed():
    reader = labelled([{"A": 1}] * 12)
    options = linear_probe.ProbeOptions()
    model = Model({i: unit(i, 1) for i in range(12)}, {})
    with pytest.raises(UserError, match=r"no label is both positive and negative .*\(A\)"):
        linear_probe.evaluate(model, linear_probe.load(reader, None, 0, options), options, Context(None))


# ---- grounding


def grounded(boxes, report=None):
    fields = [{"boxes": b, "report": report or {"findings": "x"}, "patient_id": f"p{i}"} for i, b in enumerate(boxes)]
    return Reader(fields)


def test_a_map_that_knows_the_box_scores_above_its_controls(tmp_path):
    left, right = {"label": "mass", "xyxy": [0, 0, 16, 32]}, {"label": "mass", "xyxy": [16, 0, 32, 32]}
    reader = grounded([[left], [right], [left, {"label": "nodule", "xyxy": [0, 0, 8, 8]}]])
    half = np.zeros((16, 16, 2))
    half[..., 1] = 1
    half[:, :8] = [1, 0]
    model = Model({}, {"mass": unit(1, 0), "nodule": unit(0, 1)}, {0: half, 1: half[:, ::-1], 2: half})
    options = grounding.GroundingOptions(pictures=2)
    phrases = grounding.load(reader, None, 0, options)
    assert [(p.picture.key, p.text) for p in phrases] == [
        ("s0", "mass"),
        ("s1", "mass"),
        ("s2", "mass"),
        ("s2", "nodule"),
    ]
    results, rows = grounding.evaluate(model, phrases, options, Context(tmp_path, batch_size=2))
    assert all(row["cnr"] > 2 for row in rows[:3]) and rows[3]["cnr"] < -0.5 and rows[3]["cnr_absolute"] > 0.5
    assert rows[0]["miou"] > 0.8 and rows[0]["whole_image_iou"] == 0.5
    assert rows[0]["other_cnr"] < -2 and rows[1]["other_cnr"] < -2  # the other picture's mass is on the other side
    assert results["n_phrases"] == 4 and results["labels"]["mass"]["n"] == 3 and results["n_other_cnr"] == 4
    assert len(results["heat_maps"]) == 2
    for name in results["heat_maps"]:
        assert Image.open(tmp_path / name).size[0] > 300
    assert {row.label for row in grounding.table(results)} >= {"CNR", "  IoU of the whole image", "  CNR of mass"}


def test_phrases_from_sentences_and_no_boxes():
    report = {"impression": "No mass.", "findings": "The heart is big. A Mass is seen. Masses differ."}
    reader = grounded([[{"label": "mass", "xyxy": [0, 0, 9, 9]}, {"label": "tube", "xyxy": [0, 0, 9, 9]}]], report)
    phrases = grounding.load(reader, None, 0, grounding.GroundingOptions(phrase="sentence"))
    assert [p.text for p in phrases] == ["A Mass is seen."]
    with pytest.raises(UserError, match="no image has boxes"):
        grounding.load(reports(["a"]), None, 0, grounding.GroundingOptions())
    with pytest.raises(UserError, match="use --phrase label"):
        grounding.load(
            grounded([[{"label": "tube", "xyxy": [0, 0, 9, 9]}]]),
            None,
            0,
            grounding.GroundingOptions(phrase="sentence"),
        )


# ---- embedding space


def test_a_collapsed_space_shows_beside_random_directions(tmp_path):
    options = embedding_space.SpaceOptions()
    texts = [f"t{i}" for i in range(30)]
    pictures = embedding_space.load(reports(texts), None, 0, options)
    random = np.random.default_rng(0)
    noise = {i: random.normal(size=8) for i in range(30)}
    collapsed = Model({i: np.ones(8) + 0.01 * v for i, v in noise.items()}, {f"t{i}": -np.ones(8) for i in range(30)})
    results, rows = embedding_space.evaluate(collapsed, pictures, options, Context(tmp_path))
    assert results["modality_gap"] == pytest.approx(2, abs=1e-3) and results["uniformity_text"] == pytest.approx(
        0, abs=1e-6
    )
    assert results["rankme_image"] < 2 < 6 < results["random_rankme_image"] <= 8.01
    assert results["mean_pair_cosine"] == pytest.approx(-1, abs=1e-3) and len(rows) == 30
    assert (tmp_path / results["plot"]).stat().st_size > 5000
    assert any(row.control for row in embedding_space.table(results))


# ---- end to end


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    phantom.generate(root / "data", images=200, size=64, preset="easy", seed=1, shares=(0.4, 0.1, 0.5), workers=1)
    (root / "own.yaml").write_text(
        "kind: binary\npositive: ['{}']\nnegative: ['no {}']\n"
        "labels: {Cardiomegaly: large heart, Pleural Effusion: effusion, Consolidation: consolidation}\n"
    )
    return root, {kind: make_dual(root / kind, kind) for kind in KINDS}


OPTIONS = {
    "retrieval": {},
    "precision_at_k": {"k": [5], "prompts": "own.yaml"},
    "zero_shot": {},
    "linear_probe": {},
    "grounding": {"pictures": 2},
    "embedding_space": {},
}


@pytest.mark.parametrize("task", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_task_runs_on_every_class(world, tmp_path, capsys, monkeypatch, kind, task):
    root, folders = world
    monkeypatch.chdir(root)
    arguments = (folders[kind], task, [root / "data" / "test"], tmp_path)
    results = evaluation.run(*arguments, options=OPTIONS[task])
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))
    assert results["synthetic"] and results["n"] >= 20 and (tmp_path / "predictions.jsonl").read_text().count("\n")
    shown = capsys.readouterr().out
    cut = results["n_truncated_texts"]  # phantoms' reports exceed the 64 tokens of these models, labels do not
    assert bool(cut) == (task in ("retrieval", "embedding_space")) == (f"{cut} text(s) were cut to 64 tokens" in shown)
    assert task in shown and "nan" not in shown.lower().replace("finance", "")
    for name in results.get("heat_maps", []):
        assert (tmp_path / name).exists()


@pytest.mark.parametrize("variant", ["convirt", "biovil_t", "siglip-linear"])
def test_medvlms_own_form_is_evaluated_with_the_code_of_its_folder(world, tmp_path, variant):
    root, _ = world
    exported(tmp_path, variant)
    arguments = (tmp_path / "hf", "grounding", [root / "data" / "test"], tmp_path / "out")
    with pytest.raises(UserError, match="add --trust-remote-code"):
        evaluation.run(*arguments)
    results = evaluation.run(*arguments, options={"pictures": 1}, limit=20, trust_remote_code=True)
    assert results["n_phrases"] == 20 and results["settings"]["logit_scale"] == pytest.approx(20, rel=1e-4)
    retrieved = evaluation.run(tmp_path / "hf", "retrieval", *arguments[2:], limit=20, trust_remote_code=True)
    assert retrieved["n"] == 20


def test_the_command_line_takes_the_options_of_a_task(world, tmp_path, capsys, monkeypatch):
    from medvlm import cli

    root, folders = world
    start = ["medvlm", "evaluate", str(folders["clip"]), "--data", str(root / "data" / "test"), "--out", str(tmp_path)]

    def run(*more):
        monkeypatch.setattr("sys.argv", [*start, *more])
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        return end.value.code, captured.out, captured.err

    code, out, _ = run(
        "--task",
        "retrieval",
        "--k",
        "1",
        "--k",
        "3",
        "--section",
        "findings",
        "--view",
        "PA",
        "--limit",
        "30",
        "--json",
    )
    results = json.loads(out)
    assert not code and results["settings"]["k"] == [1, 3] and results["n"] == 30
    assert (
        results["settings"]["section"] == ["findings"]
        and results["settings"]["view"] == ["PA"]
        and "image_to_text_recall_at_3" in results
    )
    for more, message in (
        (
            ("--task", "retrieval", "--prompts", "chexzero"),
            "--prompts: is no option of task retrieval; it is one of precision_at_k, zero_shot",
        ),
        (("--phrase", "label"), "--phrase: is no option of task vqa"),
        (("--task", "zero_shot", "--aggregate", "median"), "--aggregate: "),
        (("--task", "zero_shot", "--prompts", "nowhere"), "--prompts: no set 'nowhere'"),
        (("--task", "retrieval", "--k", "0"), "--k: must be positive"),
        (("--task", "zero_shot", "--view", "oblique"), "no image has labels of view oblique"),
        (("--trust-remote-code",), "--trust-remote-code: task vqa"),
    ):
        code, _, err = run(*more)
        assert code == 2 and message in err, err


def test_the_documented_commands_run(world, tmp_path, capsys, monkeypatch):
    """Those of docs/evaluate.md on phantoms, word by word, with a small model and few phantoms in their place."""
    from medvlm import cli

    _, folders = world
    page = (REPO / "docs" / "evaluate.md").read_text()
    monkeypatch.chdir(tmp_path)
    phantom.generate(tmp_path / "phantom", images=170, size=64, shares=(0.4, 0.1, 0.5), workers=1)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "clip-model").symlink_to(folders["clip"])
    (tmp_path / "prompts.yaml").write_text(re.search(r"<!-- prompts -->\n```yaml\n(.*?)```", page, re.S).group(1))
    lines = [line for line in page.splitlines() if line.startswith("medvlm evaluate") and "--data phantom/" in line]
    assert {shlex.split(line)[shlex.split(line).index("--task") + 1] for line in lines} == set(OPTIONS)
    for line in lines:
        monkeypatch.setattr("sys.argv", shlex.split(line))
        with pytest.raises(SystemExit) as end:
            cli.main()
        shown = capsys.readouterr()
        assert not end.value.code, f"{line}: {shown.err}"
        assert "results.json" in shown.out.replace("\n", "")
