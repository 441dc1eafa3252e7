"""What differs between the recipe that a run was started with and the one it is to be continued with."""

import contextlib
from typing import Any

from pydantic import ValidationError

from medvlm.config.schema import RunConfig
from medvlm.errors import UserError

# Keys that change where, how fast and how watched a run goes, not what it computes; and those that the plan's hash
# covers, by which a checkpoint is refused whatever is allowed. Everything else changes what a run computes.
HARMLESS = (
    "description",
    "run.root",
    "run.name",
    "run.resume",
    "run.seed",
    "run.trackers",
    "run.notify",
    "model.init_from",  # of no effect on a run that is continued
    "model.attention",
    "model.kernels",
    "model.vision_tower.gradient_checkpointing",
    "model.language_model.gradient_checkpointing",
    "model.text_tower.gradient_checkpointing",
    "data.train",
    "data.temperature",
    "data.stages",
    "data.shuffle",
    "data.shuffle_window",
    "data.packing",
    "data.volume_slices",
    "data.validation",
    "data.padding_free",
    "data.workers",
    "data.max_quarantined",
    "data.pairs.max_left_out",
    "data.cache_dir",
    "data.cache_gib",
    "training.zero",
    "training.compile",
    "training.sequence_parallel",
    "training.global_batch_size",
    "training.micro_batch_size",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.keep_every",
    "training.checkpoint_in_background",
    "training.evaluate_every",
    "training.evaluation_batches",
    "training.stop_after",
    "training.profile",
    "training.non_finite",
    "training.spike",
    "training.max_skipped",
    "training.collective_timeout",
)


def check_changes(before: dict[str, Any], config: RunConfig, allow: bool, bf16: tuple[bool, bool]) -> list[str]:
    """Lines that name the changed keys. ``before`` is what a checkpoint holds; ``bf16`` what the precisions, which may
    be "auto", came to then and now. Raises UserError where what is computed changes, without ``allow``."""
    with contextlib.suppress(ValidationError):  # of another version: compared as it is
        before = RunConfig.model_validate(before).model_dump(mode="json")  # newer keys get their defaults
    old, new = _flat(before), _flat(config.model_dump(mode="json"))
    old["training.precision"], new["training.precision"] = ("bf16" if half else "fp32" for half in bf16)
    changed = {key: (old.get(key), new.get(key)) for key in [*new, *(k for k in old if k not in new)]}
    changed = {key: pair for key, pair in changed.items() if pair[0] != pair[1]}
    lines = {key: f"{key}: {a!r} -> {b!r}" for key, (a, b) in changed.items()}
    grave = [line for key, line in lines.items() if not _harmless(key)]
    if grave and not allow:
        raise UserError(
            f"{config.run.dir}: the run was started with another recipe ({'; '.join(grave)}); go on with the old "
            "values, start a new run.name, or change them from here on with --allow-change"
        )
    return list(lines.values())


def _harmless(key: str) -> bool:
    return any(key == known or key.startswith(f"{known}.") for known in HARMLESS)


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(values, dict) and values:
        return {k: v for name, value in values.items() for k, v in _flat(value, f"{prefix}{name}.").items()}
    return {prefix.rstrip("."): values}
