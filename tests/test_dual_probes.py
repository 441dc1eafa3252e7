"""Linear probe, grounding and embedding space by hand, on models that know the answer."""

import itertools

import numpy as np
import pytest
import torch
from dual_cases import Model, Reader, labelled, reports, unit
from PIL import Image

from medvlm.errors import UserError
from medvlm.evaluation import (
    embedding_space,
    grounding,
    intervals,
    linear_probe,
)
from medvlm.evaluation.task import Context

reference = pytest.importorskip("sklearn.metrics")


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 30)
    monkeypatch.setattr(linear_probe, "GRID", [0.01, 1.0])


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


def test_what_is_lost_by_hiding_a_place_is_mapped_as_it_is(tmp_path):
    """By the formula: columns of cells that lose 0.6 and 0.2 in the box, 0.1 and 0 outside; nothing is smoothed."""
    lost = np.zeros((2, 4, 2))
    lost[..., 0] = [[0.6, 0.2, 0.1, 0.0], [0.6, 0.2, 0.1, 0.0]]
    model = Model({}, {"mass": unit(1, 0)})
    model.occlusions = lambda images, batch_size, *, grid: torch.tensor(np.array([lost] * len(images))).float()
    reader = grounded([[{"label": "mass", "xyxy": [0, 0, 16, 32]}]])
    options = grounding.GroundingOptions(heat="occlusion", pictures=1)
    results, (row,) = grounding.evaluate(
        model, grounding.load(reader, None, 0, options), options, Context(tmp_path, batch_size=1)
    )
    heat = np.interp(np.arange(32) + 0.5, [4, 12, 20, 28], [0.6, 0.2, 0.1, 0.0])
    inside, outside = heat[:16], heat[16:]
    assert row["cnr"] == pytest.approx((inside.mean() - outside.mean()) / np.sqrt(inside.var() + outside.var()), 1e-5)
    assert results["heat"] == "occlusion" and results["sigma"] == 0 and len(results["heat_maps"]) == 1


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
