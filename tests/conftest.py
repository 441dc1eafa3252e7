import json
import os
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
from zygote import TIMED_OUT, forked, zygote

os.fsync = lambda descriptor: None  # matters when the power fails; here it only takes time

REPO = Path(__file__).parent.parent
DATA = Path(os.environ.get("MEDVLM_TEST_DATA", REPO / ".." / "shared" / "data")).resolve()


SLOW = ("recipes", "zero_modes", "slurm", "faults", "checkpoint", "dual_training", "launchers", "never_hangs")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes come first, so that no worker is left alone with one of them at the end."""
    slow = [f"test_{name}" for name in SLOW]
    items.sort(key=lambda item: slow.index(item.path.stem) if item.path.stem in slow else len(slow))


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


def launch(recipe: Path | str, *arguments: str, ranks: int = 2, fails: bool = False, **options: Any) -> str:
    """Run ``medvlm train`` on ranks in processes of their own; returns what they printed. Options as in `zygote`."""
    done = zygote().run(["train", str(recipe), *arguments], ranks=ranks, **options)
    output = done.stdout + done.stderr
    assert bool(done.returncode) == fails and done.returncode != TIMED_OUT, f"status {done.returncode}\n{output[:6000]}"
    return output


def medvlm(*arguments: object, status: int = 0, **options: Any) -> str:
    """Run the command line in a process of its own; returns its output, and its messages where it must fail."""
    done = zygote().run(list(map(str, arguments)), **options)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout if status == 0 else done.stdout + done.stderr


@pytest.fixture
def forked_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proofs of exports that the test's own process asks for; those of commands see `zygote`."""
    from medvlm.export import writing

    run = SimpleNamespace(run=lambda command, **_: forked(command, zygote().run))
    monkeypatch.setattr(writing, "subprocess", run)


def refused_for_memory(recipe: Path, folder: Path) -> str:
    """What ``medvlm train`` says on a machine with one MiB."""
    script = folder / "script.py"
    script.write_text(
        "import sys\n"
        "from medvlm import cli\n"
        "from medvlm.training import memory\n"
        "memory.available = lambda: 2**20\n"
        f'sys.argv = ["medvlm", "train", {str(recipe)!r}]\n'
        "cli.main()\n"
    )
    done = zygote().run([], script=str(script))
    assert done.returncode and "Traceback" not in done.stderr, done.stderr
    return done.stderr


def two_ranks(script: str, folder: Path, ranks: int = 2) -> list[dict]:
    """Run a script on ranks; each prints one JSON line, in any order."""
    # a rank that ends while the other still talks to it may abort on its way out
    leave = "\nfrom medvlm.training import distributed\ndistributed.barrier()\ndistributed.stop()\n"
    (folder / "script.py").write_text(textwrap.dedent(script) + leave)
    done = zygote().run([], script=str(folder / "script.py"), ranks=ranks)
    assert done.returncode == 0, done.stderr[:4000]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
