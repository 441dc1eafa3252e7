"""Measures of embeddings against analytic cases and hand-made lists."""

import math

import numpy as np
import pytest
import torch

from medvlm.errors import UserError
from medvlm.measures import embedding_space as space
from medvlm.measures import retrieval


def orthogonal(n):
    return torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(0)))[0]


# ---- embedding space


def test_constant_embeddings_are_collapsed_by_every_measure():
    rows = torch.tensor([[3.0, 4.0, 0.0]]).expand(50, 3)
    found = space.diagnose(rows, rows)
    assert found["uniformity_image"] == pytest.approx(0, abs=1e-6)
    assert found["mean_off_diagonal_cosine_text"] == pytest.approx(1)
    assert found["effective_rank_image"] == pytest.approx(1, abs=1e-6)
    assert found["rankme_image"] == pytest.approx(1, abs=1e-4)
    assert found["participation_ratio_image"] == 0 and found["alignment"] == 0 and found["modality_gap"] == 0


def test_orthogonal_embeddings_have_full_rank():
    d = 16
    rows = 5 * orthogonal(d)
    assert space.effective_rank(rows) == pytest.approx(d, rel=1e-6)
    assert space.rankme(rows) == pytest.approx(d, rel=1e-4)
    assert space.mean_off_diagonal_cosine(rows) == pytest.approx(0, abs=1e-6)
    assert space.uniformity(rows) == pytest.approx(-4, abs=1e-5)  # every |x - y|^2 is 2, t = 2
    assert space.uniformity(rows, t=3) == pytest.approx(-6, abs=1e-5)
    # centring takes one of d equal directions away
    assert space.participation_ratio(rows) == pytest.approx(d - 1, rel=1e-5)


def test_ranks_follow_the_spectrum_by_hand():
    rows = torch.diag(torch.tensor([3.0, 1.0]))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert space.effective_rank(rows) == pytest.approx(math.exp(entropy))
    rows = torch.diag(torch.tensor([1.0] + [0.0] * 99))  # RankMe's eps stands in every p
    expected = -(1 + 1e-7) * math.log(1 + 1e-7) - 99 * 1e-7 * math.log(1e-7)
    assert space.rankme(rows) == pytest.approx(math.exp(expected), rel=1e-9)
    assert space.effective_rank(rows) == 1


def test_pairs_and_gap_by_hand():
    image, text = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 3.0], [0.0, -1.0]])
    assert space.alignment(image, text) == pytest.approx((2 + 4) / 2)
    assert space.modality_gap(image, text) == pytest.approx(math.hypot(0.5, 0.5))
    assert space.diagnose(image, text)["mean_pair_cosine"] == pytest.approx(-0.5)
    opposite = torch.tensor([[1.0, 0.0]] * 4)
    assert space.modality_gap(opposite, -opposite) == pytest.approx(2)


def test_uniform_directions_approach_the_theory_whatever_the_chunk(monkeypatch):
    rows = torch.randn(700, 64, generator=torch.Generator().manual_seed(1))
    whole = space.uniformity(rows)
    distances = torch.pdist(space.directions(rows).double())  # the definition of the paper's code
    assert whole == pytest.approx(float(distances.square().mul(-2).exp().mean().log()), abs=1e-5)
    monkeypatch.setattr(space, "CHUNK", 99)
    assert space.uniformity(rows) == pytest.approx(whole, abs=1e-9)
    assert whole == pytest.approx(-4, abs=0.2)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_named(value):
    rows = torch.ones(4, 3)
    rows[2, 1] = value
    for measure in (space.uniformity, space.rankme, space.effective_rank, space.participation_ratio):
        with pytest.raises(UserError, match="embedding 2 holds NaN"):
            measure(rows)


def test_zero_and_single_rows_are_refused():
    rows = torch.ones(3, 2)
    with pytest.raises(UserError, match="embedding 0 is zero"):
        space.alignment(rows * 0, rows)
    with pytest.raises(UserError, match="all embeddings are zero"):
        space.rankme(rows * 0)
    with pytest.raises(UserError, match="at least two"):
        space.uniformity(rows[:1])


# ---- retrieval


def test_ranks_by_hand_with_duplicate_texts():
    similarity = torch.tensor(
        [  # texts a, b, a, c
            [0.1, 0.5, 0.9, 0.2],  # image of a: its other copy is first
            [0.9, 0.5, 0.8, 0.1],  # image of b: both copies of a stand before it
            [0.3, 0.2, 0.3, 0.4],  # image of a: behind c
            [0.0, 0.7, 0.1, 0.7],  # image of c: a tie with b counts against it
        ]
    )
    assert retrieval.ranks(similarity, list("abac"), list("abac")).tolist() == [1, 3, 2, 2]
    assert retrieval.ranks(similarity.T, list("abac"), list("abac")).tolist() == [2, 3, 1, 1]
    found = retrieval.retrieval_metrics(similarity, list("abac"), list("abac"), ks=(1, 2))
    assert found["image_to_text_recall_at_1"] == 0.25 and found["image_to_text_recall_at_2"] == 0.75
    assert found["image_to_text_median_rank"] == 2
    assert found["image_to_text_mrr"] == pytest.approx((1 + 1 / 3 + 1 / 2 + 1 / 2) / 4)
    assert (found["n_texts"], found["n_unique_texts"]) == (4, 3)
    # a is right by chance in 2 of 4, b and c in 1 of 4; two places hold an a with 1 - 1/6
    assert found["image_to_text_chance_recall_at_1"] == pytest.approx((2 * 2 / 4 + 2 * 1 / 4) / 4)
    assert found["image_to_text_chance_recall_at_2"] == pytest.approx((2 * 5 / 6 + 2 * 2 / 4) / 4)


def test_a_candidate_of_the_same_patient_is_left_out():
    similarity = torch.tensor([[0.5, 0.9, 0.7], [0.1, 0.2, 0.3], [0.1, 0.2, 0.3]])
    assert retrieval.ranks(similarity, "abc", "abc").tolist() == [3, 2, 1]
    assert retrieval.ranks(similarity, "abc", "abc", patients=("xxy", "xxy")).tolist() == [2, 2, 1]


def test_a_collapsed_model_finds_nothing_and_a_perfect_one_everything():
    groups = range(20)
    assert retrieval.retrieval_metrics(torch.ones(20, 20), groups, groups)["image_to_text_recall_at_10"] == 0
    found = retrieval.retrieval_metrics(torch.eye(20), groups, groups)
    assert found["text_to_image_recall_at_1"] == 1 and found["text_to_image_mrr"] == 1
    assert found["text_to_image_chance_recall_at_5"] == pytest.approx(5 / 20)
    assert found["text_to_image_chance_median_rank"] == 10
    assert found["text_to_image_chance_mrr"] == pytest.approx(sum(1 / k for k in range(1, 21)) / 20)


def test_chance_is_what_random_similarities_give():
    groups = [0, 0, 0, 1, 1, 2, 3, 4, 5, 6]
    random = torch.Generator().manual_seed(0)
    drawn = np.concatenate([retrieval.ranks(torch.rand(10, 10, generator=random), groups, groups) for _ in range(4000)])
    chance = retrieval.chance_ranks(groups, groups)
    assert chance.sum() == pytest.approx(1)
    np.testing.assert_allclose(np.bincount(drawn, minlength=11)[1:] / len(drawn), chance, atol=0.007)
    patients = [0, 0, 1, 1, 1, 1, 2, 2, 2, 3]  # others' reports only, of which some have fewer than others
    ranks = [
        retrieval.ranks(torch.rand(10, 10, generator=random), groups, groups, (patients, patients)) for _ in range(4000)
    ]
    found = np.bincount(np.concatenate(ranks), minlength=11)[1:] / 40000
    fewer = retrieval.chance_ranks(groups, groups, (patients, patients))
    np.testing.assert_allclose(found, fewer, atol=0.007)
    assert fewer[0] > chance[0] + 0.02


def test_embeddings_in_chunks_rank_as_the_whole_matrix_does(monkeypatch):
    random = torch.Generator().manual_seed(0)
    image, text = torch.randn(50, 8, generator=random), torch.randn(50, 8, generator=random)
    groups = [i % 40 for i in range(50)]
    whole = retrieval.ranks(space.directions(image) @ space.directions(text).T, groups, groups)
    monkeypatch.setattr(retrieval, "CHUNK", 7)
    assert retrieval.embedding_ranks(image, text, groups, groups).tolist() == whole.tolist()
    patients = ([i % 9 for i in range(50)],) * 2
    fewer = retrieval.embedding_ranks(image, text, groups, groups, patients)
    assert (fewer <= whole).all() and (fewer < whole).any()


def test_mistakes_in_retrieval_are_named():
    with pytest.raises(UserError, match="query 1 has no candidate"):
        retrieval.ranks(torch.eye(2), "ab", "aa")
    with pytest.raises(UserError, match="at least 10 candidates; there are 3"):
        retrieval.retrieval_metrics(torch.eye(3), "abc", "abc")
    with pytest.raises(UserError, match="query 1 hold NaN"):
        retrieval.ranks(torch.tensor([[1.0, 0.0], [0.0, math.nan]]), "ab", "ab")
