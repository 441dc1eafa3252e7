"""An error is told by exactly one rank, and every rank ends with an error."""

import socket

import pytest
from conftest import launch
from toy import make_recipe, make_world
from zygote import zygote


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("failures"))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.global_batch_size=7", "training.global_batch_size: 7 is not a multiple of micro_batch_size 2 x 2"),
        ("training.stepps=3", "did you mean 'steps'?"),
    ],
)
def test_what_all_ranks_see_is_told_by_rank_0_alone(folder, override, words):
    output = launch(make_recipe(folder), override, fails=True)
    assert output.count("medvlm: error:") == output.count(words) == 1
    assert "Traceback" not in output and "rank 1" not in output


def test_a_wrong_command_line_is_told_by_rank_0_alone(folder):
    output = launch(make_recipe(folder), "--tinny", fails=True)
    assert output.count("No such option") == 1 and "Traceback" not in output


SCRIPT = """
import sys, torch
from medvlm import cli
from medvlm.errors import UserError
from medvlm.training import distributed, loop

def train(*_):
    if distributed.rank() == {guilty}:
        raise UserError("the disk is gone")
    torch.distributed.all_reduce(torch.zeros(1))  # never answered

loop.train = train
sys.argv = ["medvlm", "train", {recipe!r}]
cli.main()
"""


@pytest.mark.parametrize(("guilty", "said"), [(0, "medvlm: error: rank 0 on "), (1, "medvlm: error: rank 1 on ")])
def test_what_one_rank_sees_is_told_by_that_rank_while_the_others_wait_for_it(folder, guilty, said):
    script = folder / "script.py"
    script.write_text(SCRIPT.format(guilty=guilty, recipe=str(make_recipe(folder))))
    done = zygote().run([], script=str(script), ranks=2)
    assert done.returncode in (1, 2)
    assert done.stderr.count("medvlm: error:") == 1 and said in done.stderr
    assert "Traceback" not in done.stderr, done.stderr


def test_a_port_in_use_is_told_at_once(folder):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        places = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        done = zygote().run(["train", str(make_recipe(folder))], **places)
    assert done.returncode == 2
    assert f"127.0.0.1:{port} is in use by another program; set MASTER_PORT to a free one" in done.stderr


@pytest.mark.parametrize("late", [0, 1])
def test_a_rank_that_never_comes_is_told(folder, late):
    """Rank 0 holds the store; without it there is nothing to come to."""
    script = folder / "script.py"
    script.write_text(
        "import sys\n"
        "from datetime import timedelta\n"
        "from medvlm import cli\n"
        "from medvlm.training import distributed\n"
        "distributed.MEET = timedelta(seconds=2)\n"
        f'sys.argv = ["medvlm", "train", {str(make_recipe(folder))!r}]\n'
        "cli.main()\n"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    places = {"RANK": str(1 - late), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    done = zygote().run([], script=str(script), **places, MASTER_PORT=port)
    assert done.returncode == 2 and done.stderr.count("medvlm: error:") == 1 and "Traceback" not in done.stderr
    said = "not all 2 ranks came within 0:00:02" if late else f"rank 1 cannot meet rank 0 at 127.0.0.1:{port}"
    assert said in done.stderr
