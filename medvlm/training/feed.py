"""From a recipe to what feeds its training: the dataset that makes batches, and the plan that says which."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from medvlm.config.schema import Data, RunConfig
from medvlm.data.conversation import IGNORE
from medvlm.data.lengths import cache_folder, measure_lengths
from medvlm.data.loader import MicroBatches
from medvlm.data.order import Order, Stage, temperature_weights
from medvlm.data.packing import Packing
from medvlm.data.plan import Lengths, Plan
from medvlm.data.shard_set import expand
from medvlm.errors import UserError
from medvlm.training.families import family_of


def training_data(config: RunConfig, parts: Any) -> MicroBatches:
    return make_dataset(config, parts, [s.path for s in config.data.sources], training=True)


def make_dataset(config: RunConfig, parts: Any, paths: list[str], *, training: bool) -> MicroBatches:
    return family_of(config.model).dataset(config, parts, paths, training=training)


def accumulation_steps(config: RunConfig, world: int) -> int:
    """Micro-steps of a step. Raises UserError where the batch cannot be shared evenly."""
    micro, batch = config.training.micro_batch_size, config.training.global_batch_size
    if batch % (micro * world):
        below = batch - batch % (micro * world)
        sizes = " or ".join(str(size) for size in (below, below + micro * world) if size)
        ranks = [n for n in range(1, batch // micro + 1) if batch % (micro * n) == 0]
        near = sorted(sorted(ranks, key=lambda n: abs(n - world))[:2])
        raise UserError(
            f"training.global_batch_size: {batch} is not a multiple of micro_batch_size {micro} x {world} rank(s); "
            f"the nearest that are: {sizes}" + (f", or {' or '.join(map(str, near))} rank(s)" if near else "")
        )
    return batch // (micro * world)


def needs_lengths(data: Data) -> bool:
    return data.packing is not None or data.length_grouped


def count_lengths(config: RunConfig, dataset: MicroBatches, *, progress: bool) -> Lengths:
    cache = cache_folder(config.data.cache_dir)
    encoder = dataset.encoder
    return measure_lengths(
        dataset.reader, encoder.conversation, cache, config.data.workers, progress, slices=encoder.slices
    )


def make_plan(config: RunConfig, dataset: MicroBatches, lengths: Lengths | None) -> Plan:
    """``lengths`` where `needs_lengths`."""
    data = config.data
    reader = dataset.reader
    sizes, tars = iter(reader.shard_samples), iter(reader.source_tars)
    sources = [
        tuple(next(sizes) for _ in range(sum(next(tars) for _ in expand([source.path])))) for source in data.sources
    ]
    empty = [listed.path for listed, shards in zip(data.sources, sources, strict=True) if not sum(shards)]
    if empty:
        raise UserError(f"data.train: {empty[0]} holds no samples")
    packing = Packing(data.packing.tokens, data.packing.images) if data.packing else None
    return Plan(
        Order(
            tuple(sources),
            config.run.seed,
            data.shuffle_window if data.shuffle == "block" else 0,
            _stages(data, sources),
        ),
        config.training.global_batch_size,
        index_hash=reader.index_hash,
        packing=packing,
        lengths=lengths,
        length_grouped=data.length_grouped,
        volume_slices=data.volume_slices,
        cache=Path(config.run.dir) / "plan",
    )


def _stages(data: Data, sources: list[tuple[int, ...]]) -> tuple[Stage, ...]:
    listed = data.sources
    if data.stages:
        names = [s.name or s.path for s in listed]
        return tuple(Stage(s.epochs, tuple(s.weights.get(name, 0.0) for name in names)) for s in data.stages)
    if data.temperature is not None:
        return (Stage(weights=temperature_weights([sum(s) for s in sources], data.temperature)),)
    weights = tuple(s.weight for s in listed if s.weight is not None)
    return (Stage(weights=weights or None),)


def show_plan(config: RunConfig, world: int, start: int, steps: int, as_json: bool) -> None:
    """Print what each rank is fed in some steps, and how full other capacities would be."""
    accumulation = accumulation_steps(config, world)
    dataset = training_data(config, family_of(config.model).components(config))
    lengths = count_lengths(config, dataset, progress=not as_json) if needs_lengths(config.data) else None
    plan = make_plan(config, dataset, lengths)
    keys = dataset.reader.keys
    micro = config.training.micro_batch_size
    listed = [plan.describe(step, keys, world, micro, accumulation) for step in range(start, start + steps)]
    if as_json:
        print(json.dumps({"plan_hash": plan.hash, "steps": listed}))
        return
    table = Table("step", "rank", "packs", "samples", "tokens", "images", "full", title=f"plan {plan.hash}")
    for step in range(start, start + steps):
        packs = plan.global_batch_at(step)
        for rank in range(world):
            mine = [p for part in plan.share(packs, rank, world, micro, accumulation) for p in part]
            numbers = [number for p in mine for number, _ in p]
            cells: list[Any] = [step, rank, len(mine), len(numbers)]
            if lengths is not None:
                tokens, images = int(lengths.tokens[numbers].sum()), int(lengths.images[numbers].sum())
                full = f"{tokens / (len(mine) * plan.packing.tokens):.1%}" if plan.packing and mine else ""
                cells += [tokens, images, full]
            table.add_row(*map(str, cells))
    console = Console()
    console.print(table)
    if plan.packing:
        console.print(plan.advice())


def draw_packs(config: RunConfig, step: int, out: Path) -> str:
    """Draw the packs of one step (.html or .png); returns a line about them."""
    from medvlm.data.pack_layout import PackedSample
    from medvlm.data.pack_layout import draw_packs as draw
    from medvlm.data.page import write_figure

    if config.data.packing is None:
        raise UserError("data.packing: the recipe packs nothing; add for example data.packing.tokens=4096")
    dataset = training_data(config, family_of(config.model).components(config))
    lengths = count_lengths(config, dataset, progress=True)
    plan = make_plan(config, dataset, lengths)
    packs = []
    for pack in plan.global_batch_at(step):
        samples = []
        for number, repeat in pack:
            sample, data = dataset.reader.load(number)
            try:
                supervised = sum(label != IGNORE for label in dataset.encoder(sample, data, repeat).labels)
            except UserError:
                supervised = 0  # training quarantines it
            text, images = int(lengths.text[number]), int(lengths.images[number])
            samples.append(PackedSample(sample.key, text, images * lengths.image_tokens, supervised))
        packs.append(samples)
    write_figure(draw(packs, config.data.packing.tokens), out, f"plan {plan.hash}, step {step}")
    return f"{out}: {len(packs)} packs of step {step}; {plan.advice()}"
