"""Many short runs in one set of ranks: the program of `run_cases`, which starts it through the zygote.

Building an engine takes a fraction of what starting a process group does. A case that takes too long ends its process
with a traceback of every thread, so that a hang fails the test in bounded time and is named.
"""

import faulthandler
import gc
import json
import sys
import time
from pathlib import Path

from zygote import zygote

SECONDS = 120  # of one case, of which an idle machine needs about one


def run_cases(recipes: dict[str, Path], ranks: int, folder: Path, *overrides: str) -> None:
    """Train each recipe, in order, on the same ranks; the first that fails or hangs is named."""
    listed = folder / "cases.json"
    listed.write_text(json.dumps({name: str(path) for name, path in recipes.items()}))
    arguments = [str(listed), *overrides]
    done = zygote().run(arguments, script=__file__, ranks=ranks, timeout=SECONDS * len(recipes))
    begun = [line.removeprefix("begin ") for line in done.stdout.splitlines() if line.startswith("begin ")]
    last = begun[-1] if begun else "none"
    assert done.returncode == 0, f"case {last!r} failed or hung on {ranks} ranks\n{done.stderr[-6000:]}"


def main() -> None:
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from medvlm.config.load import load_recipe
    from medvlm.training import distributed
    from medvlm.training.loop import train

    distributed.start()
    listed, *overrides = sys.argv[1:]
    for name, path in json.loads(Path(listed).read_text()).items():
        if distributed.rank() == 0:
            print(f"begin {name}", flush=True)
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        started = time.perf_counter()
        train(load_recipe(path, overrides))
        unset_hf_deepspeed_config()  # what transformers builds next is partitioned while this is set
        gc.collect()
        faulthandler.cancel_dump_traceback_later()
        if distributed.rank() == 0:
            print(f"took {time.perf_counter() - started:.2f}", flush=True)
    distributed.barrier()
    distributed.stop()


if __name__ == "__main__":
    main()
