"""Retrieval, zero-shot and precision at k by hand, on models that know the answer."""

import sys

import numpy as np
import pytest
import torch
from dual_cases import BASE, SIDE, Model, Reader, labelled, reports, unit

from medvlm.errors import UserError
from medvlm.evaluation import (
    intervals,
    linear_probe,
    precision_at_k,
    retrieval,
    zero_shot,
)
from medvlm.evaluation.pictures import load_pictures, only_class, truth
from medvlm.evaluation.task import Context, library

reference = pytest.importorskip("sklearn.metrics")


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 30)
    monkeypatch.setattr(linear_probe, "GRID", [0.01, 1.0])


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(UserError, match=r"needs scikit-learn: pip install 'medvlm\[eval\]'"):
        library("sklearn.metrics")


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
    found, chance = [], []
    for other in (False, True):
        options = retrieval.RetrievalOptions(k=[1], other_patients=other)
        results, _ = retrieval.evaluate(model, retrieval.load(reader, None, 0, options), options, Context(None))
        found.append(results["image_to_text_recall_at_1"])
        chance.append(results["image_to_text_chance_recall_at_1"])
    assert found == pytest.approx([2 / 3, 1])
    assert chance == pytest.approx([1 / 3, (1 / 2 + 1 / 2 + 1 / 3) / 3])


def test_too_few_reports_and_no_reports_are_said():
    options = retrieval.RetrievalOptions()
    with pytest.raises(UserError, match=r"--k 10: there are only 2 report"):
        retrieval.evaluate(Model({}, {}), retrieval.load(reports(["a", "b"]), None, 0, options), options, Context(None))
    with pytest.raises(UserError, match="no image has a report with impression"):
        retrieval.load(reports(["a"]), None, 0, retrieval.RetrievalOptions(section=["impression"]))


# ---- zero-shot


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


def test_a_set_says_whether_other_labels_may_be_positive_too(tmp_path):
    """With ``exclusive: all``, as of CheXpert 5x200, an image with another label is of no class."""
    reader = labelled([{"A": 1, "Other": n % 2} for n in range(6)] + [{"B": 1}] * 6)
    model = Model({i: unit(i < 6, i >= 6) for i in range(12)}, {"a": unit(1, 0), "b": unit(0, 1)})
    seen = {}
    for exclusive in ("classes", "all"):
        prompts = tmp_path / f"{exclusive}.yaml"
        prompts.write_text(f"kind: multiclass\nclasses: {{A: [a], B: [b]}}\nexclusive: {exclusive}\n")
        options = precision_at_k.PrecisionOptions(prompts=str(prompts), k=[1])
        pictures = precision_at_k.load(reader, None, 0, options)
        results, _ = precision_at_k.evaluate(model, pictures, options, Context(None))
        seen[exclusive] = results["n_candidates"] + results["n_image_queries"]
    assert seen == {"classes": 12, "all": 9}


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
