"""Contrastive losses against their formulas written out by loops, and ranks against one rank with everything."""

import math

import pytest
import torch
from conftest import two_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from medvlm.objectives import gather
from medvlm.objectives.info_nce import info_nce
from medvlm.objectives.semantic_matching import semantic_matching
from medvlm.objectives.sigmoid import sigmoid

IMAGE = torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, 2.0]])  # of lengths 1, 5 and 2
TEXT = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, -4.0]])
# By hand: rows of IMAGE against rows of TEXT, each divided by its length.
COSINES = [[1.0, 0.0, 0.6], [0.6, 0.8, -0.28], [0.0, 1.0, -0.8]]


def cross(row: list[float], target: list[float]) -> float:
    total = sum(math.exp(v) for v in row)
    return -sum(t * math.log(math.exp(v) / total) for v, t in zip(row, target, strict=True))


def one_hot(n: int) -> list[float]:
    return [float(n == i) for i in range(3)]


@pytest.mark.parametrize(("weight", "tau"), [(0.5, 1 / 14), (0.75, 0.1)], ids=["CLIP", "ConVIRT"])
def test_info_nce_is_the_weighted_mean_of_both_directions(weight, tau):
    rows = [[c / tau for c in row] for row in COSINES]
    columns = [list(column) for column in zip(*rows, strict=True)]
    expected = sum(weight * cross(rows[i], one_hot(i)) + (1 - weight) * cross(columns[i], one_hot(i)) for i in range(3))
    assert float(info_nce(IMAGE, TEXT, 1 / tau, weight)) == pytest.approx(expected / 3, rel=1e-5)


def test_sigmoid_loss_takes_every_pair_as_a_binary_problem():
    scale, bias = 10.0, -10.0
    terms = [
        math.log(1 + math.exp(-(1 if i == j else -1) * (scale * COSINES[i][j] + bias)))
        for i in range(3)
        for j in range(3)
    ]
    assert float(sigmoid(IMAGE, TEXT, scale, bias)) == pytest.approx(sum(terms) / 3, rel=1e-5)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_semantic_matching_weighs_texts_by_their_labels(similarity):
    """Image labels (1,1), (1,0), (0,1) and text labels (1,0), (1,1), (0,0): dot products and cosines by hand."""
    image_labels = torch.tensor([[1, 1], [1, 0], [0, 1]])
    text_labels = torch.tensor([[1, 0], [1, 1], [0, 0]])
    r = 1 / math.sqrt(2)
    alike = {"dot": [[1, 2, 0], [1, 1, 0], [0, 1, 0]], "cosine": [[r, 1, 0], [1, r, 0], [0, r, 0]]}[similarity]
    softmax = [[math.exp(v) / sum(map(math.exp, row)) for v in row] for row in alike]
    turned = [list(column) for column in zip(*alike, strict=True)]
    softmax_turned = [[math.exp(v) / sum(map(math.exp, row)) for v in row] for row in turned]
    columns = [list(column) for column in zip(*COSINES, strict=True)]
    expected = sum(cross(COSINES[i], softmax[i]) + cross(columns[i], softmax_turned[i]) for i in range(3)) / 6
    found = semantic_matching(IMAGE, TEXT, image_labels, text_labels, 1.0, similarity)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_images_and_texts_of_semantic_matching_need_not_be_pairs():
    labels = torch.eye(3)
    assert semantic_matching(IMAGE, TEXT[:2], labels, labels[:2], 1.0).isfinite()
    assert semantic_matching(IMAGE, TEXT[:0], labels, labels[:0], 1.0) == 0
    assert semantic_matching(IMAGE[:0], TEXT, labels[:0], labels, 1.0) == 0


class Largest(TorchDispatchMode):
    """The entries of the largest tensor that was made, in forward or backward pass."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        made = [out] if isinstance(out, torch.Tensor) else [x for x in out or () if isinstance(x, torch.Tensor)]
        self.entries = max([self.entries, *(tensor.numel() for tensor in made)])
        return out


def losses_of(image, text, labels):
    """Each loss with its gradients."""
    for name in ("info_nce", "sigmoid", "semantic"):
        leaves = [x.clone().requires_grad_() for x in (image, text, *torch.tensor([3.0, -1.0]).to(image))]
        loss = {
            "info_nce": lambda i, t, s, b: info_nce(i, t, s, 0.75) + 0 * b,
            "sigmoid": sigmoid,
            "semantic": lambda i, t, s, b: semantic_matching(i, t, *labels, s) + 0 * b,
        }[name](*leaves)
        with Largest() as seen:
            loss.backward()
        yield loss.detach(), [leaf.grad for leaf in leaves], seen.entries


def test_chunks_of_rows_give_the_same_loss_and_gradients_in_less_memory(monkeypatch):
    torch.manual_seed(0)
    image, text = torch.randn(2, 50, 4, dtype=torch.float64)
    labels = torch.randint(0, 2, (2, 50, 3)).double()
    whole = list(losses_of(image, text, labels))
    monkeypatch.setattr(gather, "CHUNK", 350)  # seven rows; the last chunk has one
    with Largest() as seen:
        chunked = list(losses_of(image, text, labels))
    assert seen.entries == 50 * 8, "the features of both sides, and no matrix of 50 x 50"
    for (loss, gradients, entries), (expected, expected_gradients, expected_entries) in zip(
        chunked, whole, strict=True
    ):
        assert entries <= 50 * 8 < expected_entries == 50 * 50
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(gradients, expected_gradients, rtol=1e-9, atol=1e-12)


def test_uneven_ranks_give_the_loss_and_gradients_of_one_rank_with_the_whole_batch(tmp_path):
    """Two ranks with four and two of six pairs, each loss, its weights, temperature and bias."""
    script = """
        import json, os, torch
        import torch.distributed as dist
        from medvlm.objectives.info_nce import info_nce
        from medvlm.objectives.semantic_matching import semantic_matching
        from medvlm.objectives.sigmoid import sigmoid
        from medvlm.training import distributed

        rank = int(os.environ["RANK"])  # until the process group starts, each computes alone
        torch.manual_seed(0)
        images, texts = torch.randn(6, 5), torch.randn(6, 5)
        labels = torch.randint(0, 2, (2, 6, 3))
        share = slice(0, 4) if rank == 0 else slice(4, 6)

        def run(loss, rows, reduce):
            weight, scale, bias = (torch.nn.Parameter(x) for x in (torch.eye(5), torch.tensor([2.0]), torch.zeros(1)))
            value = loss(images[rows] @ weight, texts[rows] @ weight, scale, bias, rows)
            value.backward()
            bias.grad = torch.zeros(1) if bias.grad is None else bias.grad
            values = torch.cat([value.detach().reshape(1), weight.grad.flatten(), scale.grad, bias.grad])
            if reduce:
                dist.all_reduce(values)
            return values

        losses = {
            "info_nce": lambda i, t, s, b, r: info_nce(i, t, s, 0.75) + 0 * b.sum(),
            "sigmoid": lambda i, t, s, b, r: sigmoid(i, t, s, b),
            "semantic": lambda i, t, s, b, r: semantic_matching(i, t, labels[0, r], labels[1, r], s),
        }
        whole = {name: run(loss, slice(None), False) for name, loss in losses.items()}
        distributed.start()
        ranks = {name: run(loss, share, True) for name, loss in losses.items()}
        print(json.dumps({name: [float((ranks[name] - whole[name]).abs().max()), float(whole[name].abs().max())]
                          for name in losses}), flush=True)
    """
    for row in two_ranks(script, tmp_path):
        for difference, size in row.values():
            assert difference < 1e-6 < size
