"""`medvlm plan`, printed."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from medvlm.config.schema import RunConfig
from medvlm.data.loader import MicroBatches
from medvlm.data.shard_set import expand
from medvlm.data.storage import StorageError, is_url
from medvlm.errors import UserError
from medvlm.planning.plan import GIB, SLACK, Machine, Option, Plan, make_plan
from medvlm.training.families import family_of


def plan(config: RunConfig, machine: Machine, tokens: int | None, images: int | None, as_json: bool) -> None:
    parts = components(config)
    made = make_plan(config, parts, machine, tokens, images)
    steps = known_steps(config, parts)
    if as_json:
        print(json.dumps(_values(made, steps)))
    else:
        _show(config, made, steps)


def components(config: RunConfig) -> Any:
    """Configurations and tokenizer, never weights."""
    try:
        return family_of(config.model).components(config)
    except UserError as error:
        if "cannot load" not in str(error):
            raise
        raise UserError(
            f"{error}; a plan needs config.json, preprocessor_config.json and the tokenizer of a pretrained model, not "
            "its weights: where the hub is out of reach, give a folder that holds them as path"
        ) from None


def known_steps(config: RunConfig, parts: Any) -> int | None:
    """The recipe's steps; None where they depend on data that are not there."""
    from medvlm.training.feed import make_plan as make_data_plan
    from medvlm.training.feed import needs_lengths
    from medvlm.training.setup import total_steps

    if config.training.steps is not None:
        return config.training.steps
    data = open_data(config, parts)
    if data is None or needs_lengths(config.data):  # packs are known only when all texts have been counted
        return None
    return total_steps(config, make_data_plan(config, data, None))


def open_data(config: RunConfig, parts: Any) -> MicroBatches | None:
    """The recipe's training data, or None where some of it is not there. Raises UserError where it is damaged."""
    from medvlm.training.feed import training_data

    paths = expand([source.path for source in config.data.sources])
    if not all(is_url(path) or Path(path).exists() for path in paths):
        return None
    try:
        return training_data(config, parts)
    except StorageError:  # out of reach, as from a machine that is none of the cluster
        if any(map(is_url, paths)):
            return None
        raise


def _values(made: Plan, steps: int | None) -> dict[str, Any]:
    def option(o: Option | None) -> dict[str, Any] | None:
        return {**dataclasses.asdict(o), "step_seconds": o.time.total} if o else None

    machine = dataclasses.asdict(made.machine)
    return {
        "machine": {**machine, "slack": SLACK},
        "batch": dataclasses.asdict(made.shape),
        "options": [option(o) for o in made.options],
        "recipe": option(made.own),
        "recommended": option(made.best),
        "peak_kinds": made.kinds,
        "steps": steps,
        "gpu_hours": gpu_hours(made, steps),
        "scaling": [{"gpus": n, "global_batch_size": batch, **(option(o) or {})} for n, batch, o in made.scaling],
    }


def gpu_hours(made: Plan, steps: int | None) -> float | None:
    if made.best is None or steps is None:
        return None
    return steps * made.best.time.total * made.machine.gpus / 3600


def _show(config: RunConfig, made: Plan, steps: int | None) -> None:
    console = Console()
    machine, shape, gib = made.machine, made.shape, f"{made.machine.memory / GIB:g} GiB"
    console.print(
        f"{config.run.name} on {machine.gpus} rank(s) with {gib} each: rows of {shape.tokens} tokens, {shape.images} "
        f"image(s) each, {shape.supervised} supervised tokens; {machine.base / GIB:.1f} GiB are taken before the model "
        "is there"
    )
    table = Table("ZeRO", "micro-batch", "accumulation", "peak GiB", "host GiB", "fits", "s/step", "exposed comm.")
    for o in made.options:
        mark = " <-" if o == made.best else ""
        cells = [o.zero, o.micro_batch_size, o.accumulation, f"{needed(machine, o) / GIB:.1f}", f"{o.host / GIB:.1f}"]
        cells += ["yes" if o.fits else "no", f"{o.time.total:.2f}{mark}", f"{o.time.exposed:.2f}"]
        table.add_row(*map(str, cells))
    console.print(table)
    shares = ", ".join(f"{kind} {v / GIB:.2f}" for kind, v in sorted(made.kinds.items(), key=lambda kv: -kv[1]))
    if made.own is None:
        micro = config.training.micro_batch_size
        console.print(f"[bold]the recipe's micro-batch {micro} does not divide its batch here[/]")
    elif not made.own.fits:
        console.print(
            f"[bold]the recipe's own setting (training.zero={made.own.zero}, training.micro_batch_size="
            f"{made.own.micro_batch_size}) does not fit: {needed(machine, made.own) / GIB:.1f} of {gib}[/]"
        )
    if made.best is None:
        console.print(f"[bold]nothing fits[/]; at the least peak: {shares} GiB")
        return
    console.print(
        f"recommended: training.zero={made.best.zero} training.micro_batch_size={made.best.micro_batch_size}; "
        f"at its peak {shares} GiB"
    )
    hours = gpu_hours(made, steps)
    if hours is None:
        per = 1000 * made.best.time.total * machine.gpus / 3600
        console.print(f"{per:.1f} GPU-hours for 1000 steps; how many there are is known when the data are there")
    else:
        console.print(f"{hours:.1f} GPU-hours for {steps} steps")
    scales = Table("GPUs", "global batch", "peak GiB", "s/step", "samples/s", "efficiency", title="scaling")
    first = None
    for gpus, batch, o in made.scaling:
        rate = batch / o.time.total
        first = first or rate / gpus
        cells = [gpus, batch, f"{needed(machine, o) / GIB:.1f}", f"{o.time.total:.2f}", f"{rate:.1f}"]
        scales.add_row(*map(str, cells), f"{rate / gpus / first:.0%}")
    console.print(scales)
    rates = machine.rates
    console.print(
        f"assumed: {rates.peak_flops / 1e12:g} TFLOP/s of which {rates.reached:.0%} are reached, "
        f"{rates.within_node / 1e9:g} GB/s per GPU inside a node of {rates.gpus_per_node} and "
        f"{rates.between_nodes / 1e9:g} GB/s between nodes, "
        f"{rates.hidden:.0%} of the compute time hides communication; the allocator loses {SLACK - 1:.0%}"
    )


def needed(machine: Machine, option: Option) -> float:
    return machine.base + option.peak * SLACK
