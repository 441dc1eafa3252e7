"""Peak memory of consolidating and exporting a checkpoint, beside DeepSpeed's zero_to_fp32 on the same engine's.

    python benchmarks/consolidate.py [--layers 27] [--folder DIR]

A language model of 405 million parameters (27 layers) in bf16 under ZeRO-2, whose fp32 weights exceed the bound
that is shown: the largest tensor plus 1 GiB; and one of the same size whose language model has adapters, its weights
being left to a pretrained folder. Each tool runs in a fresh process. "peak" is that of its resident set above what it
had after its imports, mapped files included; "allocated" is without these, which the system drops when it needs room.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

LLAMA = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 32000,
}


def make(folder: Path, layers: int, adapters: bool) -> None:
    from toy import SIGLIP, make_recipe, make_world
    from transformers import AutoConfig, AutoModelForCausalLM

    from medvlm.config.load import load_recipe
    from medvlm.training import checkpoint, distributed, setup

    language: dict = {"model__language_model__config": {**LLAMA, "num_hidden_layers": layers}}
    if adapters:
        values = {k: v for k, v in LLAMA.items() if k != "model_type"}
        config = AutoConfig.for_model("llama", **values, num_hidden_layers=layers)
        AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder / "llama")
        language = {"model__language_model__config": None, "model__language_model__path": str(folder / "llama")}
        language |= {"model__language_model__train": "lora", "model__language_model__lora": {"rank": 8}}
    else:
        make_world(folder)
    path = make_recipe(
        folder,
        "adapters" if adapters else "run",
        model__vision_tower__config=SIGLIP,
        **language,
        training__precision="bf16",
        training__zero="zero2",
    )
    distributed.start()
    session = setup.start(load_recipe(str(path)))
    setup.write_run_files(session)
    checkpoint.save(session.engine, session.run, 1, session.manifest, 1)
    if not adapters:
        session.engine.save_checkpoint(str(folder / "its"), tag="its")
    distributed.stop()


class Allocated(threading.Thread):
    """The peak of a process's anonymous memory, in GiB, looked at every few milliseconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.base = self.peak = memory("RssAnon")
        self.start()

    def run(self) -> None:
        while True:
            self.peak = max(self.peak, memory("RssAnon"))
            time.sleep(0.003)


def memory(field: str) -> float:
    """GiB, of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 2**20


def measure(tool: str, folder: Path) -> dict:
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

    from medvlm.export.llava import export_run
    from medvlm.training.checkpoint.report import consolidate_to

    run, adapters, out = folder / "runs" / "run", folder / "runs" / "adapters", folder / f"out-{tool}"
    tools = {
        "consolidate": lambda: consolidate_to(run, out, "fp32", 4.0),
        "consolidate-bf16": lambda: consolidate_to(run, out, "bf16", 4.0),
        "export-no-proof": lambda: export_run(run, out, prove=False),
        "export-no-proof-adapters": lambda: export_run(adapters, out, prove=False),
        "export": lambda: export_run(run, out),
        "zero_to_fp32": lambda: convert_zero_checkpoint_to_fp32_state_dict(
            str(folder / "its"), str(out), safe_serialization=True, tag="its"
        ),
    }
    base, allocated = memory("VmRSS"), Allocated()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    started = time.perf_counter()
    tools[tool]()
    seconds, peak = time.perf_counter() - started, memory("VmHWM") - base
    shutil.rmtree(out)
    found = {"peak_gib": peak, "allocated_gib": allocated.peak - allocated.base}
    return {"tool": tool, **{k: round(v, 3) for k, v in found.items()}, "seconds": round(seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=27)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "medvlm-consolidate-benchmark")
    parser.add_argument("--tool")
    options = parser.parse_args()
    if options.tool in ("make", "make-adapters"):
        make(options.folder, options.layers, options.tool == "make-adapters")
        return
    if options.tool:
        print(json.dumps(measure(options.tool, options.folder)))
        return
    shutil.rmtree(options.folder, ignore_errors=True)
    tools = ("make", "consolidate", "consolidate-bf16", "export-no-proof", "export", "zero_to_fp32")
    for tool in (*tools, "make-adapters", "export-no-proof-adapters"):
        command = [sys.executable, __file__, "--tool", tool, "--folder", str(options.folder)]
        done = subprocess.run(
            [*command, "--layers", str(options.layers)], stdout=subprocess.PIPE, text=True, check=True
        )
        if tool == "make":
            from medvlm.training import checkpoint

            weights = checkpoint.consolidate(checkpoint.newest(options.folder / "runs" / "run"))
            sizes = [shape.numel() * 4 / 2**30 for shape in weights.shapes.values()]
            print(json.dumps({"weights_gib": round(sum(sizes), 3), "bound_gib": round(max(sizes) + 1, 3)}), flush=True)
        elif tool != "make-adapters":
            print(done.stdout.splitlines()[-1], flush=True)
    shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
