"""Before the model is made: will a step fit? Only where a generous bound exceeds the memory is one rehearsed.

The rehearsal runs in a process of its own (`medvlm.planning.check`), since it joins a process group of its own.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
import torch

from medvlm.config.schema import RunConfig
from medvlm.data.loader import MicroBatches
from medvlm.errors import UserError
from medvlm.models.build import Components
from medvlm.models.build_dual_encoder import DualComponents
from medvlm.training import distributed

SAMPLES = 64
CUDA_BASE, CPU_BASE = 2**30, 2**30  # CUDA context, NCCL and cuBLAS; Python, PyTorch and DeepSpeed


def check_memory(config: RunConfig, look: Callable[[], tuple[tuple[int, int], int]]) -> None:
    """All ranks call this. Prints a warning where a step is not likely to fit; raises UserError where it cannot.

    ``look`` runs on rank 0 and gives tokens and images of the longest row, and a bound of a step's bytes.
    """
    said: dict[str, Any] = {"message": None, "impossible": False}
    if distributed.rank() == 0:
        memory, (row, most) = available(), look()
        if most > memory:
            said = ask(config, memory, *row)
            if said["message"] and not said["impossible"]:
                print(f"warning: {said['message']}", file=sys.stderr, flush=True)
    if distributed.broadcast(np.array([said["impossible"]], np.int64))[0]:
        raise UserError(said["message"] or "memory: rank 0 found that the run cannot fit")


def available() -> int:
    """Bytes that this rank can have: of its GPU, or its share of the machine's memory."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info(distributed.device())[0]
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def longest_row(config: RunConfig, data: MicroBatches) -> tuple[int, int]:
    """Tokens and images of a pack; or of the longest of some samples, with a fifth more for those not looked at."""
    if config.data.packing:
        return config.data.packing.tokens, config.data.packing.images
    tokens = images = 0
    for number in range(0, len(data.reader), -(-len(data.reader) // SAMPLES)):
        try:
            sample = data.reader.sample(number)
            tokens = max(tokens, len(data.encoder.conversation(list(sample.messages))[0]))
            images = max(images, len(sample.images))
        except UserError:
            continue  # training quarantines it, with the reason
    return min(config.data.max_length, max(16, tokens * 6 // 5)), images


def bound(config: RunConfig, parts: Components, ds_config: dict[str, Any], world: int, tokens: int, images: int) -> int:
    """Bytes that a step of one rank is not likely to exceed, by half and more in those that were rehearsed."""
    size = 2 if ds_config["bf16"]["enabled"] else 4
    micro, text = config.training.micro_batch_size, parts.text_config
    count, width, layers = micro * tokens, text.hidden_size, text.num_hidden_layers
    inner = getattr(text, "intermediate_size", 4 * width) * getattr(text, "num_local_experts", 1)
    parameters = layers * (4 * width * width + 3 * width * inner) + 2 * text.vocab_size * width
    plain = 3 * text.num_attention_heads * tokens if config.llava.attention == "eager" else 0
    activations = count * size * layers * (30 * width + 8 * inner + plain) + count * text.vocab_size * 16
    vision = micro * max(1, images) * parts.image_numbers * size * 5 // 4  # and a quarter for the way back
    return states(parameters + parts.vision_parameters, ds_config, world) + activations + vision


def states(parameters: int, ds_config: dict[str, Any], world: int) -> int:
    """Bytes at most of all that a rank keeps from step to step, and of what DeepSpeed sends."""
    shards = world if ds_config["zero_optimization"]["stage"] == 3 else 1
    size = 2 if ds_config["bf16"]["enabled"] else 4
    buckets = 2 * 500_000_000 * size if torch.cuda.is_available() else 0
    # whole and sharded copies, gradients, master weights and two states of Adam, temporary ones of its update
    return 2**30 + parameters * (2 * size + (2 * size + 24) // shards) + buckets


def pair_bound(config: RunConfig, parts: DualComponents, ds_config: dict[str, Any], world: int, images: int) -> int:
    """As `bound`, of a dual encoder, from all that a pass over one pair makes, and a quarter for the way back."""
    size = 2 if ds_config["bf16"]["enabled"] else 4
    tokens = config.data.max_length * (2 if parts.masked else 1)
    logits = config.data.max_length * getattr(parts.text_config, "vocab_size", 0) if parts.masked else 0
    numbers = images * parts.image_numbers + tokens * parts.token_numbers + 4 * logits
    return states(parts.parameters, ds_config, world) + config.training.micro_batch_size * numbers * size * 5 // 4


def ask(config: RunConfig, memory: int, tokens: int, images: int) -> dict[str, Any]:
    """The verdict of `medvlm.planning.check`: ``{"message": ..., "impossible": ...}``."""
    target, base = ("cuda", CUDA_BASE) if torch.cuda.is_available() else ("cpu", CPU_BASE)
    asked = {"config": config.model_dump(mode="json"), "ranks": distributed.world_size(), "target": target}
    launcher = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    environment = {k: v for k, v in os.environ.items() if k not in launcher}
    done = subprocess.run(
        [sys.executable, "-m", "medvlm.planning.check"],
        input=json.dumps({**asked, "memory": memory, "base": base, "tokens": tokens, "images": images}),
        env={**environment, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return {"message": f"memory: could not be predicted ({reason})", "impossible": False}
    return json.loads(done.stdout.strip().splitlines()[-1])
