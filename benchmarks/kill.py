"""kill -9 of a random rank at random moments, half of them inside the writing of a checkpoint.

    python benchmarks/kill.py [--kills 100] [--seed 0]

Toy runs on two ranks, in turn under ZeRO-1, 2 and 3, with a checkpoint every second step. Whenever one has come to its
end, its losses, gradient norms and weights must equal those of a run that was left alone, bit for bit; then a new one
begins. Exits with an error if a checkpoint is lost, or more than the steps since the last one.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
os.environ.setdefault("DS_ACCELERATOR", "cpu")
import toy
from killed import Killer
from zygote import zygote

EVERY, STEPS = 2, 120
OPTIONS = {
    "training__steps": STEPS,
    "training__checkpoint_every": EVERY,
    "training__global_batch_size": 4,
    "model__vision_tower__train": "norm_and_bias",
    "data__workers": 0,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = toy.make_world(Path(name))
        killers, longest = [], 0.0
        for zero in ("zero1", "zero2", "zero3"):
            calm = toy.make_recipe(folder, f"calm-{zero}", training__zero=zero, **OPTIONS)
            started = time.monotonic()
            assert zygote().run(["train", str(calm)], ranks=2).returncode == 0
            longest = time.monotonic() - started
            recipe = toy.make_recipe(folder, f"killed-{zero}", training__zero=zero, **OPTIONS)
            killers.append(Killer(recipe, folder / "runs" / f"calm-{zero}", chance))
        turn = 0
        while sum(sum(k.kills.values()) for k in killers) < arguments.kills:
            killer = killers[turn % 3]
            how = chance.choice(("seconds", "calls"))
            if killer.start(how, longest if how == "seconds" else 24) == 0:
                killer.compare()
                shutil.rmtree(killer.run)
                turn += 1
            report(killers)
        for killer in killers:
            if killer.run.exists():
                assert killer.start("calls", 0) == 0
                killer.compare()
    report(killers)
    print(f"losses, norms and weights equal bit for bit; no checkpoint lost; {time.monotonic() - begun:.0f} s")
    assert max(n for killer in killers for n in killer.lost) <= 2 * EVERY


def report(killers: list[Killer]) -> None:
    lost = [n for killer in killers for n in killer.lost]
    by = {how: sum(k.kills[how] for k in killers) for how in ("seconds", "calls")}
    spread = ", ".join(f"{n}: {lost.count(n)} times" for n in sorted(set(lost)))
    print(
        f"{len(lost)} kills: {by['seconds']} at a random moment, {by['calls']} in the writing of a checkpoint; "
        f"{sum(k.rounds for k in killers)} runs brought to their end; steps lost: {spread}",
        flush=True,
    )


if __name__ == "__main__":
    main()
