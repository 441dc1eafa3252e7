"""Kills runs with SIGKILL, again and again, and compares what they come to with a run that was left alone.

As a program it is one rank: it trains, and kills itself where ``KILL="RANK seconds|calls NUMBER"`` says: after so many
seconds, or at that call of the operating system that opens for writing, renames, makes, removes or syncs something in
the run's checkpoints.
"""

import json
import os
import random
import signal
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCRIPT = str(Path(__file__))
CALLS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir")
KEEP = ("step", "loss", "grad_norm", "lr", "tokens", "batch_digest")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(how: str, number: float) -> None:
    if how == "seconds":
        timer = threading.Timer(number, die)
        timer.daemon = True
        timer.start()
        return
    left = iter(range(int(number) - 1, -1, -1))

    def count() -> None:
        if next(left) == 0:
            die()

    def audit(event: str, arguments: tuple) -> None:
        if event not in CALLS or "/checkpoints/" not in str(arguments[0]):
            return
        if event != "open" or arguments[2] & (os.O_WRONLY | os.O_RDWR):
            count()

    original = os.fsync

    def fsync(descriptor: int) -> None:
        if "/checkpoints/" in os.readlink(f"/proc/self/fd/{descriptor}"):
            count()
        original(descriptor)

    os.fsync = fsync
    sys.addaudithook(audit)


@dataclass
class Killer:
    recipe: Path
    calm: Path
    random: random.Random
    kills: dict[str, int] = field(default_factory=lambda: {"seconds": 0, "calls": 0})
    rounds: int = 0
    lost: list[int] = field(default_factory=list)

    @property
    def run(self) -> Path:
        return self.recipe.parent / "runs" / self.recipe.stem

    def start(self, how: str, longest: float) -> int:
        """Start the run and kill it, at latest after ``longest`` seconds or calls (0: never); returns its status."""
        from zygote import zygote

        number = self.random.uniform(0, longest) if how == "seconds" else self.random.randint(1, int(longest) or 1)
        kill = f"{self.random.randrange(2)} {how} {number}" if longest else ""
        before = self.checkpoints()
        done = zygote().run(["train", str(self.recipe)], ranks=2, script=SCRIPT, grace=0.1, KILL=kill)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        after = self.checkpoints()
        assert after[-1:] >= before[-1:], f"{before} -> {after}: a checkpoint was lost"
        if done.returncode:
            self.kills[how] += 1
            made = [row["step"] for row in rows(self.run)]
            self.lost.append(max(made, default=0) - max(after, default=0))
        return done.returncode

    def checkpoints(self) -> list[int]:
        from medvlm.training import checkpoint

        return [checkpoint.step_of(path) for path in checkpoint.checkpoints(self.run)]

    def compare(self) -> None:
        """A run that came to its end beside the one that was left alone: equal bit for bit."""
        import torch

        from medvlm.training import checkpoint

        assert rows(self.run) == rows(self.calm)
        a, b = (checkpoint.consolidate(checkpoint.newest(run)) for run in (self.run, self.calm))
        assert set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)
        self.rounds += 1


def rows(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [{k: row[k] for k in KEEP if k in row} for row in map(json.loads, lines)]


if __name__ == "__main__":
    rank, how, number = (os.environ["KILL"] or "-1 calls 1").split()
    if rank == os.environ["RANK"]:
        arm(how, float(number))
    from medvlm.cli import main

    sys.argv[0] = "medvlm"
    main()
