"""A run on paper: what trains, how it is sharded, what each rank reads, what checkpoints will be called. No GPU, no
weights, no training: one step is rehearsed on one rank of a fake process group."""

import json
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from medvlm.config.schema import RunConfig
from medvlm.planning.families import batches_of
from medvlm.planning.plan import GIB, for_target, make_job
from medvlm.planning.rehearsal import rehearse
from medvlm.planning.report import components, open_data
from medvlm.training.feed import accumulation_steps, count_lengths, make_plan, needs_lengths

SHOWN_KEYS = 4


def dry_run(config: RunConfig, ranks: int, as_json: bool) -> None:
    """For GPUs. Raises UserError for what would stop the run, such as a batch that the ranks cannot share evenly."""
    accumulation = accumulation_steps(config, ranks)
    config = for_target(config, "cuda")
    parts = components(config)
    training = config.training
    job = make_job(config, parts, "cuda", training.zero, training.micro_batch_size, ranks, quick=True)
    rehearsal = rehearse([job])[0]
    read = reads(config, parts, ranks, accumulation)
    values = {
        "recipe": config.run.name,
        "ranks": ranks,
        "zero": training.zero,
        "accumulation": accumulation,
        "parts": [asdict(s) for s in rehearsal.summaries],
        "shapes": batches_of(config.model).shapes(job.shape, parts, ranks),
        "bytes_per_rank": {**rehearsal.state, "peak": rehearsal.peak, "host": rehearsal.host},
        "reads": read,
        "checkpoints": checkpoints(config, read.get("steps", config.training.steps)),
        "seconds": rehearsal.seconds,
    }
    if as_json:
        print(json.dumps(values))
    else:
        _show(values)


def reads(config: RunConfig, parts: Any, ranks: int, accumulation: int) -> dict[str, Any]:
    """Keys that the first and the last rank read in the first and the last step; or why that cannot be said."""
    from medvlm.training.setup import total_steps

    data = open_data(config, parts)
    if data is None:
        paths = ", ".join(source.path for source in config.data.sources)
        return {"unknown": f"the data are not there ({paths}); positions are a function of their index"}
    lengths = count_lengths(config, data, progress=False) if needs_lengths(config.data) else None
    plan = make_plan(config, data, lengths)
    total = total_steps(config, plan)
    shown = []
    for step in sorted({0, total - 1}):
        listed = plan.describe(step, data.reader.keys, ranks, config.training.micro_batch_size, accumulation)["ranks"]
        for rank in sorted({0, ranks - 1}):
            keys = [key for pack in listed[rank] for key in pack]
            shown.append({"step": step, "rank": rank, "samples": len(keys), "keys": keys[:SHOWN_KEYS]})
    return {"plan": plan.hash, "steps": total, "samples": len(data.reader), "positions": shown}


def checkpoints(config: RunConfig, steps: int | None) -> dict[str, Any]:
    """``steps`` of the run, None where they are not known."""
    every = config.training.checkpoint_every
    return {
        "folder": str(config.run.dir / "checkpoints"),
        "first": f"step-{min(every, steps or every):08d}",
        "every": every,
        "kept": config.training.keep_checkpoints,
    }


def _show(values: dict[str, Any]) -> None:
    console = Console()
    ranks, zero, accumulation = values["ranks"], values["zero"], values["accumulation"]
    console.print(f"{values['recipe']}: {ranks} ranks, {zero}, accumulation {accumulation}")
    table = Table("part", "train", "parameters", "trainable", title="What trains")
    for part in values["parts"]:
        table.add_row(part["name"], part["train"], f"{part['parameters']:,}", f"{part['trainable']:,}")
    console.print(table)
    table = Table("tensor", "shape", title="One micro-batch of a rank, at most")
    for name, shape in values["shapes"].items():
        table.add_row(name, str(shape))
    console.print(table)
    table = Table("per rank", "GiB", title="Sharding")
    for kind, size in values["bytes_per_rank"].items():
        table.add_row(kind, f"{size / GIB:.3f}")
    console.print(table)
    read = values["reads"]
    if "unknown" in read:
        console.print(f"what each rank reads: {read['unknown']}")
    else:
        table = Table("step", "rank", "samples", "first keys", title=f"plan {read['plan']}, {read['steps']} steps")
        for row in read["positions"]:
            table.add_row(str(row["step"]), str(row["rank"]), str(row["samples"]), " ".join(row["keys"]))
        console.print(table)
    saved = values["checkpoints"]
    where = f"{saved['folder']}/{saved['first']}"
    console.print(f"checkpoints: {where}, then every {saved['every']} steps; {saved['kept']} are kept")
