"""The training loop over the DeepSpeed engine. One function reads top to bottom: :func:`train`."""

import json
import math
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from medvlm.config.load import deepspeed_config_path
from medvlm.config.schema import RunConfig
from medvlm.data.loader import Batch, MicroBatches, load_batches
from medvlm.data.order import digest, micro_batches
from medvlm.data.plan import Draw, Lengths, Plan
from medvlm.errors import UserError
from medvlm.models.build import Components, build_components, build_model
from medvlm.models.trainable import apply_trainable
from medvlm.training import checkpoint, distributed
from medvlm.training.engine import lift_scalars
from medvlm.training.feed import (
    accumulation_steps,
    count_lengths,
    make_dataset,
    make_plan,
    needs_lengths,
    training_data,
)
from medvlm.training.meters import Meters, peak_memory_gib, print_parts
from medvlm.training.optimizer import learning_rate_factor, make_optimizer, parameter_groups

PREEMPTED = 85  # exit code: a checkpoint was written, start again to go on


def precision(config: RunConfig) -> torch.dtype:
    chosen = config.training.precision
    if chosen == "auto":
        chosen = "bf16" if torch.cuda.is_available() else "fp32"
    return torch.bfloat16 if chosen == "bf16" else torch.float32


def deepspeed_config(config: RunConfig, world: int) -> dict[str, Any]:
    """The chosen ``ds_configs`` file, completed with what the recipe decides. Only concrete numbers, no "auto"."""
    training = config.training
    micro, batch = training.micro_batch_size, training.global_batch_size
    path = deepspeed_config_path(training.zero)
    try:
        values = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(values.get("zero_optimization", {}).get("stage"), int):
        raise UserError(f"{path}: has no zero_optimization.stage")
    if values["zero_optimization"]["stage"] == 0 and precision(config) == torch.bfloat16:
        raise UserError("training.zero: stage 0 in bf16 updates differently from stages 1 to 3; use zero1")
    return {
        **values,
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation_steps(config, world),
        "gradient_clipping": training.gradient_clipping,
        "bf16": {"enabled": precision(config) == torch.bfloat16},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


def total_steps(config: RunConfig, plan: Plan) -> int:
    if config.training.steps is not None:
        return config.training.steps
    return plan.total_steps(config.training.epochs)  # type: ignore[arg-type]  # validated: one is set


def lengths_for_all_ranks(config: RunConfig, data: MicroBatches) -> Lengths | None:
    """Rank 0 counts or finds them, and tells the others."""
    if not needs_lengths(config.data):
        return None
    lengths = count_lengths(config, data, progress=True) if distributed.rank() == 0 else None
    counts = np.stack([lengths.text, lengths.images], 1) if lengths else np.zeros((len(data.reader), 2), np.int32)
    counts = distributed.broadcast(counts)
    return Lengths(counts[:, 0], counts[:, 1], data.encoder.conversation.image_tokens)


def train(config: RunConfig) -> int:
    """Train a run to its end, or to the checkpoint that an interruption asks for. Returns the process's exit status."""
    rank, world, device = distributed.rank(), distributed.world_size(), distributed.device()
    run, training = config.run.dir, config.training
    signals = _catch_signals()
    ds_config = deepspeed_config(config, world)
    accumulation = ds_config["gradient_accumulation_steps"]
    found = checkpoint.checkpoints(run)
    if config.run.resume == "never" and found:
        raise UserError(f"{run}: holds checkpoints, and run.resume is never; choose another run.name")
    if config.run.resume == "require" and not found:
        checkpoint.newest(run)  # raises, with the reason
    distributed.barrier()

    parts = build_components(config.model)
    data = training_data(config, parts)
    plan = make_plan(config, data, lengths_for_all_ranks(config, data))
    total = total_steps(config, plan)
    model = build_model(config.model, parts, precision(config), ds_config, config.run.seed)
    if config.model.init_from and not found:
        source = checkpoint.newest(Path(config.model.init_from))
        state = checkpoint.consolidate(source) if rank == 0 or ds_config["zero_optimization"]["stage"] < 3 else None
        checkpoint.load_weights(model, state, str(source))
    lift_scalars(model)
    summaries = apply_trainable(model, config.model, parts.unused_vision_parameters)
    groups = parameter_groups(model, config)
    peaks, group_names = [g["lr"] for g in groups], [g["name"] for g in groups]
    offload = "offload_optimizer" in ds_config["zero_optimization"]
    engine, optimizer, *_ = distributed.deepspeed.initialize(
        model=model, optimizer=make_optimizer(groups, config, offload), config=ds_config
    )
    manifest = {
        "model": checkpoint.fingerprint(engine.module),
        "bf16": precision(config) == torch.bfloat16,
        "order": plan.hash,
    }
    step = 0
    if found:
        step = checkpoint.resume(engine, found[-1], manifest)
    if rank == 0:
        print_parts(summaries)
        _write_run_files(run, config, parts)
        print(
            f"{config.run.name}: steps {step} to {total}, {world} rank(s), ZeRO-{engine.zero_optimization_stage()}, "
            f"{str(precision(config)).removeprefix('torch.')}, global batch {training.global_batch_size} = "
            f"{training.micro_batch_size} x {world} x {accumulation}{' packs' if plan.packing else ''}, "
            f"{len(data.reader)} samples, plan {plan.hash}",
            flush=True,
        )
        if plan.packing:
            print(plan.advice(), flush=True)
    meters = Meters(run, step, total, config.run.tensorboard) if rank == 0 else None

    last = min(total, training.stop_after or total)

    def work() -> Iterator[Sequence[Draw]]:
        for packs in plan.global_batches(step, last):
            for micro in plan.share(packs, rank, world, training.micro_batch_size, accumulation):
                yield [draw for pack in micro for draw in pack]

    loader = load_batches(data, work(), config.data.workers)
    seen, quarantined = 0.0, 0.0
    for packs in plan.global_batches(step, last):
        batch_numbers = [number for pack in packs for number, _ in pack]
        started = time.perf_counter()
        batches = [next(loader) for _ in range(accumulation)]
        data_seconds = time.perf_counter() - started
        counts = distributed.sum_over_ranks(
            [
                sum(b.supervised_tokens for b in batches),
                sum(b.tokens for b in batches),
                sum(b.input_ids.numel() for b in batches),
                sum(b.pixel_values.shape[0] for b in batches),
                sum(len(b.quarantined) for b in batches),
                float(bool(signals)),
            ]
        )
        supervised, tokens, slots, images, bad, interrupted = counts
        _write_quarantine(run, rank, step, batches)
        seen, quarantined = seen + len(batch_numbers), quarantined + bad
        # a share of few samples says little, so the first hundred are let pass, unless nothing is left of them
        if quarantined > config.data.max_quarantined * max(seen, 100) or not supervised:
            raise UserError(
                f"step {step + 1}: {quarantined:.0f} of {seen:.0f} samples were quarantined, {supervised:.0f} "
                f"supervised tokens are left in this batch; data.max_quarantined is {config.data.max_quarantined}, the "
                f"reasons are in {run}/quarantine-rank*.jsonl"
            )
        factor = learning_rate_factor(step, total, training.warmup_ratio, training.min_learning_rate_ratio)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        torch.manual_seed((config.run.seed * 1_000_003 + step) * 65_537 + rank)
        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        for n, batch in enumerate(batches):
            loss = engine(**batch.inputs(device))
            # DeepSpeed divides by the accumulation steps and averages over ranks: undo both, then divide by the
            # global count, so that every supervised token weighs the same.
            engine.backward(loss * (world * accumulation / supervised))
            loss_sum += loss.detach()
            if n + 1 < accumulation:
                engine.step()
        mean_loss = distributed.sum_over_ranks([loss_sum.item()])[0] / supervised
        if not math.isfinite(mean_loss):
            some = ", ".join(data.reader.keys(batch_numbers[:8]))
            raise UserError(f"step {step + 1}: the loss is {mean_loss}; no update was made; the batch is {some} ...")
        grad_norm = _plain_grad_norm(engine) if engine.zero_optimization_stage() == 0 else None
        engine.step()
        grad_norm = float(engine.get_global_grad_norm()) if grad_norm is None else grad_norm
        step += 1
        seconds = time.perf_counter() - started
        if meters:
            meters.write(
                {
                    "step": step,
                    "epoch": plan.epoch(step - 1),
                    "loss": mean_loss,
                    "grad_norm": grad_norm,
                    "lr": {name: peak * factor for name, peak in zip(group_names, peaks, strict=True)},
                    "tokens": int(tokens),
                    "supervised_tokens": int(supervised),
                    "samples": len(batch_numbers),
                    "padding_share": 1 - tokens / (len(packs) * plan.packing.tokens if plan.packing else slots),
                    "images": int(images),
                    "quarantined": int(bad),
                    "seconds": seconds,
                    "data_seconds": data_seconds,
                    "tokens_per_second": tokens / seconds,
                    "memory_gib": peak_memory_gib(),
                    "batch_digest": digest(data.reader.keys(batch_numbers)),
                }
            )
        if interrupted or step == last or step % training.checkpoint_every == 0:
            checkpoint.save(engine, run, step, manifest, training.keep_checkpoints)
        if interrupted:
            if meters:
                meters.close()
                print(f"interrupted: checkpoint of step {step} written; start again to go on", flush=True)
            return PREEMPTED
        due = step == total or (training.evaluate_every and step % training.evaluate_every == 0)
        if config.data.validation and due:
            value = evaluation_loss(engine, config, parts)
            if meters:
                meters.write({"step": step, "eval_loss": value})
    if meters:
        meters.close()
        print(f"{config.run.name}: finished at step {step}, {checkpoint.newest(run)}", flush=True)
    return 0


@torch.no_grad()
def evaluation_loss(engine: Any, config: RunConfig, parts: Components) -> float:
    """Mean loss per supervised token over the validation shards."""
    rank, world, device = distributed.rank(), distributed.world_size(), distributed.device()
    data = make_dataset(config, parts, config.data.validation, training=False)
    micro = config.training.micro_batch_size
    numbers = list(range(len(data.reader)))[: (config.training.evaluation_batches or len(data.reader)) * micro * world]
    batches = range(0, len(numbers), micro * world)  # the same number on every rank
    work: Iterator[list[tuple[int, int | None]]]
    work = (
        [(i, None) for i in micro_batches(numbers[b : b + micro * world], rank, world, micro, 1)[0]] for b in batches
    )
    engine.eval()
    total, count = 0.0, 0
    for batch in load_batches(data, work, 0):
        total += float(engine(**batch.inputs(device)))
        count += batch.supervised_tokens
    engine.train()
    total, supervised = distributed.sum_over_ranks([total, count])
    if not supervised:
        raise UserError(f"data.validation: no supervised tokens in {config.data.validation}")
    return total / supervised


def _catch_signals() -> list[int]:
    """Numbers of the interruption signals received, filled as they come and polled at each step."""
    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda signum, _: received.append(signum))
    return received


def _plain_grad_norm(engine: Any) -> float:
    """ZeRO-0 in fp32 does not report the norm; its gradients are whole and already averaged here."""
    return float(torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None]))


def _write_quarantine(run: Path, rank: int, step: int, batches: list[Batch]) -> None:
    rows = [{"step": step + 1, "key": key, "reason": reason} for b in batches for key, reason in b.quarantined]
    if rows:
        with (run / f"quarantine-rank{rank}.jsonl").open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def _write_run_files(run: Path, config: RunConfig, parts: Components) -> None:
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    parts.processor.save_pretrained(run / "processor")
