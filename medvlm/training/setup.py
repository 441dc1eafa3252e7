"""From a recipe to everything that a run needs, on every rank: data and their plan, the model, the engine, the step."""

import difflib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from pydantic import ValidationError
from torch import nn

from medvlm.config.changes import check_changes
from medvlm.config.load import deepspeed_config_path
from medvlm.config.schema import RunConfig
from medvlm.data.loader import MicroBatches
from medvlm.data.plan import Lengths, Plan
from medvlm.errors import UserError
from medvlm.models.kernels import tower_lines
from medvlm.models.layers import compile_layers
from medvlm.models.lora import add_adapters
from medvlm.models.sequence_parallel import SequenceParallel
from medvlm.models.trainable import PartSummary, apply_trainable, backbones
from medvlm.training import checkpoint, distributed, lifecycle, trackers, watch
from medvlm.training.engine import forget_first_step, lift_scalars, shared_by_inits
from medvlm.training.families import Family, family_of
from medvlm.training.feed import accumulation_steps, count_lengths, make_plan, needs_lengths, training_data
from medvlm.training.guard import Gate
from medvlm.training.optimizer import make_optimizer, optimizer_line, parameter_groups, rates
from medvlm.training.run_lock import lock_run
from medvlm.training.schedule import Rate

OFF: tuple[Any, ...] = (None, {"enabled": False}, {"enabled": "auto"})
PATIENCE = 60.0  # seconds for a network drive to show a checkpoint to all nodes
SECTIONS = ("zero_optimization", "activation_checkpointing", "aio", "communication_data_type")


@dataclass
class Session:
    """What :func:`start` makes. ``step`` counts the updates made so far."""

    config: RunConfig
    family: Family
    parts: Any
    """What the family builds before the weights: tokenizer, image processor, configurations."""
    data: MicroBatches
    plan: Plan
    engine: Any
    optimizer: Any
    gate: Gate
    summaries: list[PartSummary]
    rates: list[Rate]
    owners: dict[int, str]
    """By the identity of a trainable parameter: its part."""
    offload: bool
    manifest: dict[str, Any]
    accumulation: int
    total: int
    step: int

    @property
    def run(self) -> Path:
        return self.config.run.dir

    @property
    def stage(self) -> int:
        return self.engine.zero_optimization_stage()

    def describe(self) -> str:
        training, world = self.config.training, distributed.world_size()
        fed, packs = world // training.sequence_parallel, " packs" if self.plan.packing else ""
        return (
            f"{self.config.run.name}: steps {self.step} to {self.total}, {world} rank(s), ZeRO-{self.stage}, "
            f"{str(precision(self.config)).removeprefix('torch.')}, global batch {training.global_batch_size} = "
            f"{training.micro_batch_size} x {fed} x {self.accumulation}{packs}, "
            f"{len(self.data.reader)} samples, plan {self.plan.hash}\n" + "\n".join(self.engine.module.choices)
        )


def start(config: RunConfig, allow_change: bool = False) -> Session:
    """Build a run, or continue it from its newest checkpoint. All ranks call this.

    ``allow_change``: continue although the recipe computes something else than it did before.
    """
    trackers.check(config.run.trackers)
    ds_config = deepspeed_config(config, distributed.world_size())
    lock_run(config.run.dir)
    if distributed.rank() == 0:
        checkpoint.clean(config.run.dir)
    distributed.barrier()
    found = seen_by_all(config.run.dir, lambda: checkpoint.to_resume(config.run.dir, config.run.resume))
    if found:
        record = checkpoint.read_manifest(found)
        bf16 = record["bf16"], precision(config) == torch.bfloat16
        changes = check_changes(record["config"], config, allow_change, bf16)
        if changes and distributed.rank() == 0:
            print(f"changed since {found.name}: {'; '.join(changes)}", flush=True)

    family = family_of(config.model)
    parts = family.components(config)
    data = training_data(config, parts)
    plan = make_plan(config, data, lengths_for_all_ranks(config, data))
    prepare_drive(ds_config, config.run.name)
    family.check_memory(config, parts, data, ds_config)
    with shared_by_inits():
        model = family.build(config, parts, precision(config), ds_config)
    if config.model.init_from and not found:
        init = Path(config.model.init_from)
        source = seen_by_all(init, lambda: checkpoint.newest(init))
        assert source is not None
        weights = checkpoint.StockWeights(checkpoint.consolidate(source), merge=True)
        checkpoint.load_weights(model, weights, str(source))
    summaries, groups = prepare(model, config, parts)
    if config.training.sequence_parallel > 1:
        model.sequence_parallel = SequenceParallel(config.training.sequence_parallel)
        line = model.sequence_parallel.attach(model.language_model, config.llava.attention)
        model.choices = (*model.choices, line)
    stage = ds_config["zero_optimization"]["stage"]
    owners = {id(p): group["name"] for group in groups for p in group["params"]}
    total = total_steps(config, plan)
    group_rates = rates(groups, config, total)
    long = max(group_rates, key=lambda rate: rate.warmup)
    if long.warmup >= total and distributed.rank() == 0:
        print(
            f"warning: the warm-up of {long.part} takes {long.warmup} steps, and the run {total}: its learning rate "
            "never reaches its peak or falls",
            flush=True,
        )
    offload = offload_device(ds_config)
    given = make_optimizer(groups, config, stage, offload)
    towers = {part: getattr(model, part) for part in backbones(config.model) if part != "language_model"}
    model.choices = (*model.choices, *tower_lines(towers), optimizer_line(given, offload))
    engine, optimizer, *_ = distributed.deepspeed.initialize(model=model, optimizer=given, config=ds_config)
    forget_first_step(engine)
    if config.training.compile:
        compile_layers([getattr(model, part) for part in backbones(config.model)], config.training.compile)
    manifest = {
        **checkpoint.identity(engine, config.model, getattr(parts, "vocabulary_grown", False)),
        "bf16": precision(config) == torch.bfloat16,
        "order": plan.hash,
        "config": config.public(),
    }
    return Session(
        config=config,
        family=family,
        parts=parts,
        data=data,
        plan=plan,
        engine=engine,
        optimizer=optimizer,
        gate=Gate(engine, given),
        summaries=summaries,
        rates=group_rates,
        owners=owners,
        offload=offload != "none",
        manifest=manifest,
        accumulation=ds_config["gradient_accumulation_steps"],
        total=total,
        step=checkpoint.resume(engine, found, manifest) if found else 0,
    )


def seen_by_all(run: Path, look: Callable[[], Path | None]) -> Path | None:
    """The checkpoint of a run that ``look`` finds, once all ranks find the same: on a network drive, other nodes see a
    new folder some seconds late. Raises UserError where they still differ after PATIENCE seconds."""
    end = time.monotonic() + PATIENCE
    while True:
        found, trouble = None, ""
        try:
            found = look()
        except UserError as error:  # it may be there in part
            trouble = str(error)
        seen = distributed.gather((found.name if found else "none", trouble, time.monotonic() > end))
        views = [view[:2] for view in seen]
        if len(set(views)) == 1:
            if trouble:
                raise UserError(trouble)
            return found
        if seen[0][2]:
            other = next(rank for rank, view in enumerate(views) if view != views[0])
            (mine, _), (its, why) = views[0], views[other]
            its = f"{its} to rank {other}" + (f" ({why})" if why else "")
            raise UserError(
                f"{run}: its newest checkpoint is {mine} to rank 0 and {its}; is it on a drive that all nodes share? "
                "If so, start again once all of them see the same"
            )
        time.sleep(1)


def prepare(model: nn.Module, config: RunConfig, parts: Any) -> tuple[list[PartSummary], list[dict]]:
    """Adapters on, the rest frozen as the recipe says; returns that in numbers, and the optimizer's groups."""
    add_adapters(model, config.model, parts.unused, config.run.seed)
    lift_scalars(model)
    summaries = apply_trainable(model, config.model, parts.unused)
    return summaries, parameter_groups(model, config)


def offload_device(ds_config: dict[str, Any]) -> str:
    """Where the optimizer's states are: none, cpu or nvme."""
    return (ds_config["zero_optimization"].get("offload_optimizer") or {}).get("device", "none")


def prepare_drive(ds_config: dict[str, Any], run: str) -> None:
    """Give a run that offloads to NVMe a folder of its own there, in place: DeepSpeed deletes what it finds.

    Raises UserError where the drive's folder cannot be used, or DeepSpeed cannot be compiled to read and write it.
    """
    zero = ds_config["zero_optimization"]
    for place in ("offload_optimizer", "offload_param"):
        if (zero.get(place) or {}).get("device") != "nvme":
            continue
        folder = Path(zero[place].get("nvme_path", ""))
        if not (folder.is_dir() and os.access(folder, os.W_OK)):
            raise UserError(
                f"training.zero: {place}.nvme_path: {folder} is not a folder that can be written; put the folder of "
                "your drive into a copy of ds_configs/zero3_nvme.json and name the copy"
            )
        if not distributed.deepspeed.accelerator.get_accelerator().create_op_builder("AsyncIOBuilder").is_compatible():
            raise UserError(
                "training.zero: DeepSpeed needs libaio to offload to NVMe: install libaio-dev (libaio-devel), or use "
                "zero3_offload"
            )
        zero[place]["nvme_path"] = str(folder / run)


def precision(config: RunConfig) -> torch.dtype:
    chosen = config.training.precision
    if chosen == "auto":
        chosen = "bf16" if torch.cuda.is_available() else "fp32"
    return torch.bfloat16 if chosen == "bf16" else torch.float32


def deepspeed_config(config: RunConfig, world: int) -> dict[str, Any]:
    """The chosen ``ds_configs`` file, completed with what the recipe decides. Only concrete numbers, no "auto".

    Raises UserError where the file says otherwise than the recipe, or what DeepSpeed does not take.
    """
    training = config.training
    if world % training.sequence_parallel:
        raise UserError(f"training.sequence_parallel: {training.sequence_parallel} does not divide {world} rank(s)")
    accumulation = accumulation_steps(config, world // training.sequence_parallel)
    path = deepspeed_config_path(training.zero)
    try:
        values = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    zero = values.get("zero_optimization") if isinstance(values, dict) else None
    if not isinstance(zero, dict) or not isinstance(zero.get("stage"), int):
        raise UserError(f"{path}: has no zero_optimization.stage")
    if training.optimizer.name == "muon":
        values["zero_optimization"]["reduce_scatter"] = False  # ZeRO-3's Muon wants whole gradients reduced
    if training.compile and values["zero_optimization"]["stage"] == 3:
        raise UserError("training.compile: ZeRO-3 gathers parameters within the layers; use zero2, or do not compile")
    node = values["zero_optimization"].get("zero_hpz_partition_size", 1)
    if world % max(1, node):
        raise UserError(
            f"{path}: zero_hpz_partition_size: {node} does not divide {world} rank(s); give the number of GPUs per node"
        )
    ours = {
        "train_batch_size": training.micro_batch_size * accumulation * world,
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": training.gradient_clipping or 0.0,
        "bf16": {"enabled": precision(config) == torch.bfloat16},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    _refuse_contradictions(path, values, ours)
    return values | ours


def _refuse_contradictions(path: Path, values: dict[str, Any], ours: dict[str, Any]) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # after `distributed` has chosen the accelerator

    for key, value in values.items():
        if key in ("optimizer", "scheduler", "fp16", "amp") and value not in OFF:
            raise UserError(f"{path}: {key}: is not for this file; the recipe's `training` section decides it")
        if key in ours and key != "steps_per_print" and value not in ("auto", {"enabled": "auto"}, ours[key]):
            raise UserError(f"{path}: {key}: is {value}, and the recipe makes it {ours[key]}; leave it out of the file")
        near = difflib.get_close_matches(key, {*ours, *SECTIONS}, 1, 0.8)
        if near and near[0] != key:
            raise UserError(f"{path}: {key}: unknown key; did you mean {near[0]!r}?")
    try:
        DeepSpeedZeroConfig(**values["zero_optimization"])
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, ("zero_optimization", *first["loc"])))
        raise UserError(f"{path}: {where}: {first['msg']}") from None


def total_steps(config: RunConfig, plan: Plan) -> int:
    if config.training.steps is not None:
        return config.training.steps
    return plan.total_steps(config.training.epochs)  # type: ignore[arg-type]  # validated: one is set


def lengths_for_all_ranks(config: RunConfig, data: MicroBatches) -> Lengths | None:
    """Rank 0 counts or finds them, and tells the others."""
    if not needs_lengths(config.data):
        return None
    watch.enter("counting token lengths on rank 0", limit=distributed.TIMEOUT.total_seconds())
    lengths = count_lengths(config, data, progress=True) if distributed.rank() == 0 else None
    counts = np.stack([lengths.text, lengths.images], 1) if lengths else np.zeros((len(data.reader), 2), np.int32)
    counts = distributed.broadcast(counts)
    watch.enter("start-up", limit=watch.START_UP)
    return Lengths(counts[:, 0], counts[:, 1], data.encoder.conversation.image_tokens)


def make_saver(session: Session) -> checkpoint.Saver:
    training = session.config.training
    return checkpoint.Saver(
        session.engine,
        session.run,
        session.manifest,
        training.keep_checkpoints,
        training.keep_every,
        training.checkpoint_in_background,
        session.step,
    )


def write_run_files(session: Session) -> None:
    session.run.mkdir(parents=True, exist_ok=True)
    lifecycle.running(session.config, session.step, session.total)
    values = session.config.public()
    (session.run / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    session.family.save_processor(session.parts, session.run / "processor")
