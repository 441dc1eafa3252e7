"""An error is told once: rank 0 speaks for all ranks that have it, any other rank for itself, with its number.

Ranks talk through the store at which they met, as collectives cannot be used by some ranks alone.
"""

import contextlib
import hashlib
import os
import socket
import time

import torch.distributed as dist

PATIENCE = 3.0  # seconds that the ranks wait for each other: those with the same error are about as fast
FAILED, LEFT = "medvlm/failed", "medvlm/left"


def sentence_to_print(message: str) -> str | None:
    """What this rank is to print about its error; None if another rank prints it. The last thing that a rank does."""
    rank = int(os.environ["RANK"])
    own = message if rank == 0 else f"rank {rank} on {socket.gethostname()}: {message}"
    if not dist.is_initialized():
        return own
    store = dist.distributed_c10d._get_default_store()
    told = f"medvlm/told/{hashlib.sha256(message.encode()).hexdigest()}"
    try:
        store.set(FAILED, str(rank))
        if rank:
            _wait(lambda: store.check([told]))
        speaker = int(store.compare_set(told, "", str(rank)))
        store.add(LEFT, 1)
    except RuntimeError:  # rank 0 and its store are gone, and could not speak for this one
        return own
    if rank == 0:  # the store ends with this process: the others must have looked into it before
        if dist.get_backend() == "gloo":
            dist.destroy_process_group()  # those in a collective notice
        with contextlib.suppress(RuntimeError):
            _wait(lambda: store.add(LEFT, 0) == int(os.environ["WORLD_SIZE"]))
    return own if speaker == rank else None


def is_told_by_another_rank() -> bool:
    """Whether an exception, as of a broken collective, only follows from an error that another rank has told."""
    if not dist.is_initialized():
        return False
    store = dist.distributed_c10d._get_default_store()
    try:
        found = store.check([FAILED])
        store.add(LEFT, 1)
    except RuntimeError:
        return False
    return found


def _wait(done) -> None:
    end = time.monotonic() + PATIENCE
    while not done() and time.monotonic() < end:
        time.sleep(0.02)
