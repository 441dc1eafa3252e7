"""What a family's batches look like: a module each, with `longest`, `make_batch` and `shapes`."""

from typing import Any

from medvlm.config.model import Model
from medvlm.planning import batch, pair_batch

BATCHES = {"llava": batch, "dual_encoder": pair_batch}


def batches_of(model: Model) -> Any:
    return BATCHES[model.family]
