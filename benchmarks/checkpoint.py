"""How long training stands still for a checkpoint: written in the background, waited for, and DeepSpeed's own.

    torchrun --nproc-per-node 2 benchmarks/checkpoint.py [--zero zero2] [--layers 12] [--folder DIR]

A language model of 220 million parameters (12 layers) in fp32 with AdamW; every number is that of the slowest rank.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from toy import SIGLIP, make_recipe, make_world

from medvlm.config.load import load_recipe
from medvlm.training import checkpoint, distributed, setup, step
from medvlm.training.guard import Guard

LLAMA = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 32000,
}


def slowest(seconds: float) -> float:
    return max(distributed.gather(seconds))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--zero", default="zero2")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "medvlm-checkpoint-benchmark")
    options = parser.parse_args()
    distributed.start()
    folder = options.folder
    if distributed.rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        make_world(folder)
        make_recipe(
            folder,
            model__vision_tower__config=SIGLIP,
            model__language_model__config={**LLAMA, "num_hidden_layers": options.layers},
            training__zero=options.zero,
            training__steps=100,
            training__global_batch_size=4,
        )
    distributed.barrier()
    session = setup.start(load_recipe(str(folder / "run.yaml")))
    loader = step.batches_from(session, range(100))
    guard, at = Guard(session.run, session.config.training, 0), 0

    def train() -> float:
        nonlocal at
        started = time.perf_counter()
        batches = [next(loader) for _ in range(session.accumulation)]
        counts = step.exchange_counts(batches, None, saver.ready)
        if counts.written == distributed.world_size():
            saver.finish()
        step.update(session, at, batches, counts, guard)
        at += 1
        return time.perf_counter() - started

    def timed(action, *arguments) -> float:
        distributed.barrier()
        started = time.perf_counter()
        action(*arguments)
        return slowest(time.perf_counter() - started)

    saver = checkpoint.Saver(session.engine, session.run, session.manifest, 1)
    train()
    result = {"zero": options.zero, "parameters": sum(s.parameters for s in session.summaries)}
    result["step_s"] = sorted(train() for _ in range(3))[1]
    waiting = checkpoint.Saver(session.engine, session.run, session.manifest, 1, background=False)
    result["waited_for_s"] = [timed(waiting.save, at)]
    result["stall_s"], result["steps_meanwhile_s"] = [], []
    for _ in range(3):
        train()
        result["stall_s"].append(timed(saver.save, at))
        while saver.thread is not None:
            result["steps_meanwhile_s"].append(train())
        train()
        result["waited_for_s"].append(timed(waiting.save, at))
    result["deepspeed_s"] = []
    for n in range(3):
        train()
        result["deepspeed_s"].append(
            timed(lambda n=n: session.engine.save_checkpoint(str(folder / "its"), tag=f"its{n}"))
        )
    newest = checkpoint.newest(session.run)
    result["bytes"] = sum(file.stat().st_size for file in newest.iterdir())
    result["deepspeed_bytes"] = sum(file.stat().st_size for file in (folder / "its" / "its0").iterdir())
    started = time.perf_counter()
    if distributed.rank() == 0:
        checkpoint.refuse_changed(newest)
        result["verify_s"] = time.perf_counter() - started
        print(json.dumps(result))
        shutil.rmtree(folder)
    distributed.barrier()
    distributed.stop()


if __name__ == "__main__":
    main()
