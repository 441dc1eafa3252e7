import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
REPO = Path(__file__).parent.parent
DATA = Path(os.environ.get("MEDVLM_TEST_DATA", REPO / ".." / "shared" / "data")).resolve()


@pytest.fixture(scope="session")
def test_data() -> Path:
    if not DATA.is_dir():
        pytest.skip(f"MEDVLM_TEST_DATA: {DATA} is missing")
    return DATA


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """A tokenizer, 24 uneven samples in shards, and a finished one-step run to initialise others from."""
    from toy import make_recipe, make_world

    folder = make_world(tmp_path_factory.mktemp("world"))
    launch(make_recipe(folder, "init", training__steps=1, training__zero="zero1"), ranks=1)
    return folder


def launch(recipe: Path, *arguments: str, ranks: int = 2, fails: bool = False, **environment: str) -> str:
    """Run ``medvlm train`` under torchrun in a process of its own; returns what it printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", "0"]
    command = [*command, "--standalone"] if ranks > 1 else [sys.executable]
    done = subprocess.run(
        [*command, "-m", "medvlm.cli", "train", str(recipe), *arguments],
        capture_output=True,
        text=True,
        cwd=REPO,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        timeout=300,
    )
    output = done.stdout + done.stderr
    assert bool(done.returncode) == fails, output[:6000]
    return output


def medvlm(*arguments: object, status: int = 0) -> str:
    """Run the command line in a process of its own; returns its output, and its messages where it must fail."""
    done = subprocess.run(
        [sys.executable, "-m", "medvlm.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=REPO,
        timeout=300,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout if status == 0 else done.stdout + done.stderr
