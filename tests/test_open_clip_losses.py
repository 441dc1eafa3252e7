"""Contrastive losses equal open_clip's: stored values of its own classes, and the classes where they import."""

import json

import make_open_clip_reference as reference
import pytest
import torch
from conftest import REPO, two_ranks

from medvlm.objectives.info_nce import info_nce
from medvlm.objectives.sigmoid import sigmoid

STORED = json.loads(reference.REFERENCE.read_text())["cases"]


def ours(case):
    leaves = reference.inputs(case)
    image, text, scale = leaves["image"], leaves["text"], leaves["log_scale"].exp()
    loss = sigmoid(image, text, scale, leaves["bias"]) if "bias" in leaves else info_nce(image, text, scale)
    return reference.result(loss, leaves)


def assert_equal(found, expected):
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert found["gradients"].keys() == expected["gradients"].keys() >= {"image", "text", "log_scale"}
    for name, values in expected["gradients"].items():
        torch.testing.assert_close(torch.tensor(found["gradients"][name]), torch.tensor(values), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", reference.CASES)
def test_losses_and_gradients_equal_stored_ones(case):
    assert_equal(ours(case), STORED[case])


@pytest.mark.parametrize("case", reference.CASES)
def test_losses_and_gradients_equal_those_of_open_clip_here(case):
    try:
        import open_clip  # noqa: F401
    except (ImportError, RuntimeError) as error:  # torchvision beside another PyTorch raises the latter
        pytest.skip(f"open_clip does not import ({error})")
    live = reference.by_open_clip(case)
    assert_equal(ours(case), live)
    assert_equal(live, STORED[case])


def test_shares_of_two_ranks_add_up_to_open_clips_loss(tmp_path):
    """With four and three of the seven pairs; gradients of rows on the rank that has them, of scale and bias in sum."""
    script = f"""
        import json, sys, torch
        sys.path.insert(0, {str(REPO / "tests")!r})
        import torch.distributed as dist
        import make_open_clip_reference as reference
        from medvlm.objectives.info_nce import info_nce
        from medvlm.objectives.sigmoid import sigmoid
        from medvlm.training import distributed

        distributed.start()
        rows = slice(0, 4) if dist.get_rank() == 0 else slice(4, None)
        found = {{}}
        for case in reference.CASES:
            leaves = reference.inputs(case)
            image, text, scale = leaves["image"][rows], leaves["text"][rows], leaves["log_scale"].exp()
            loss = sigmoid(image, text, scale, leaves["bias"]) if "bias" in leaves else info_nce(image, text, scale)
            result = reference.result(loss, leaves)
            values = {{"loss": torch.tensor(result["loss"], dtype=torch.float64)}}
            values |= {{k: torch.tensor(v, dtype=torch.float64) for k, v in result["gradients"].items()}}
            for value in values.values():
                dist.all_reduce(value)
            gradients = {{k: v.tolist() for k, v in values.items() if k != "loss"}}
            found[case] = {{"loss": float(values["loss"]), "gradients": gradients}}
        print(json.dumps(found), flush=True)
    """
    for row in two_ranks(script, tmp_path):
        for case, found in row.items():
            assert_equal(found, STORED[case])
