"""Ranks, devices and the few collectives that the loop needs, over DeepSpeed's communication layer."""

import contextlib
import os
import socket
import warnings
from datetime import timedelta
from typing import Any

import numpy as np
import torch

CPU_CHOSEN = os.environ.get("DS_ACCELERATOR") == "cpu"
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
warnings.filterwarnings("ignore", category=FutureWarning)  # torch 2.13 prints one per collective

import deepspeed  # noqa: E402  (reads DS_ACCELERATOR when imported)
from deepspeed import comm  # noqa: E402

from medvlm.errors import UserError  # noqa: E402

# Of a collective, in the backend. Longer than any limit of `watch`, which is to notice first and knows more.
TIMEOUT = timedelta(hours=2)
MEET = timedelta(minutes=10)
"""For all ranks to start; importing everything from a busy shared drive takes minutes."""


def start() -> None:
    """Join the process group of the launcher (deepspeed, torchrun, srun), or make one of a single rank; once.

    Raises UserError where the ranks cannot meet.
    """
    if comm.is_initialized():
        return
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    if not torch.cuda.is_available():
        # Only inference uses this op; left in, it compiles for a minute and needs a C++ compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if os.environ["WORLD_SIZE"] != "1":
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["WORLD_SIZE"])))
    _choose_device()
    try:
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        mine, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        # as DeepSpeed would: NCCL has to know the device before the first collective, but where there is no other rank
        bound = device() if backend == "nccl" and world > 1 else None
        store = _meet()
        torch.distributed.init_process_group(
            backend, store=store, timeout=TIMEOUT, rank=mine, world_size=world, device_id=bound
        )
        deepspeed.init_distributed(backend, verbose=False, timeout=TIMEOUT)
    except torch.distributed.DistNetworkError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        if "EADDRINUSE" in str(error):
            raise UserError(f"port {where} is in use by another program; set MASTER_PORT to a free one") from None
        reason = str(error).splitlines()[0]
        raise UserError(f"rank {os.environ['RANK']} cannot meet rank 0 at {where} ({reason})") from None


def _choose_device() -> None:
    """Where Slurm shows each task its own GPU alone (--gpus-per-task), that is number 0 for all. Raises UserError where
    a rank has none though its job has."""
    count, local = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
    if count == 1 and "SLURM_LOCALID" in os.environ:
        os.environ["LOCAL_RANK"] = "0"
    elif count and local >= count:
        raise UserError(
            f"rank {os.environ['RANK']} is number {local} on {socket.gethostname()}, where it sees {count} GPU(s)"
        )
    given = os.environ.get("SLURM_GPUS_ON_NODE", "0")
    if not count and given not in ("", "0") and not CPU_CHOSEN:
        raise UserError(
            f"Slurm gave {socket.gethostname()} {given} GPUs and PyTorch sees none: it is a build for CPUs, or the "
            "driver fails; DS_ACCELERATOR=cpu trains without them"
        )


def _meet() -> Any:
    """The launcher's store, once all ranks have come to it. Raises UserError naming who has not, or has a GPU where
    others have none."""
    try:
        store, rank, world = next(torch.distributed.rendezvous("env://", timeout=MEET))
    except torch.distributed.DistStoreError as error:  # to rank 0, where the store is its own
        raise UserError(
            f"not all {os.environ['WORLD_SIZE']} ranks came within {MEET}: {str(error).splitlines()[0]}"
        ) from None
    store = torch.distributed.PrefixStore("medvlm", store)
    mine = "a GPU" if torch.cuda.is_available() else "no GPU"
    store.set(str(rank), f"{mine}, rank {rank} on {socket.gethostname()}")
    try:
        store.wait([str(n) for n in range(world)], MEET)
    except torch.distributed.DistStoreError:
        absent = [n for n in range(world) if not store.check([str(n)])]
        raise UserError(
            f"{len(absent)} of {world} ranks did not come within {MEET}, rank {absent[0]} the first of them"
        ) from None
    told = [value.decode() for value in store.multi_get([str(n) for n in range(world)])]
    if other := next((line for line in told if line.partition(",")[0] != told[0].partition(",")[0]), None):
        store.set(f"{rank} read it", "")
        if not rank:  # whose store it is: the others are to read it first
            with contextlib.suppress(torch.distributed.DistStoreError):
                store.wait([f"{n} read it" for n in range(world)], timedelta(seconds=30))
        raise UserError(f"the ranks are not alike: {told[0]} and {other}")
    return store


def stop() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def rank() -> int:
    return comm.get_rank()


def world_size() -> int:
    return comm.get_world_size()


def device() -> torch.device:
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return torch.device("cpu")


def data_place(sequence_parallel: int) -> tuple[int, int]:
    """Rank and number of ranks among those that are fed different data: those that share their sequences are one."""
    return rank() // sequence_parallel, world_size() // sequence_parallel


def sum_over_ranks(values: list[float]) -> list[float]:
    """Exact for integers up to 2^53."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device())
    comm.all_reduce(tensor)
    return tensor.tolist()


def gather_numbers(values: list[float]) -> list[list[float]]:
    """Every rank's values, as many on each, on all ranks, by rank."""
    mine = torch.tensor(values, dtype=torch.float64, device=device())
    rows = [torch.empty_like(mine) for _ in range(world_size())]
    comm.all_gather(rows, mine)
    return [row.tolist() for row in rows]


def broadcast(array: np.ndarray) -> np.ndarray:
    """Rank 0's array, on all ranks; the others give one of its shape and type."""
    tensor = torch.from_numpy(np.ascontiguousarray(array)).to(device())
    comm.broadcast(tensor, 0)
    return tensor.cpu().numpy()


def gather(value: Any) -> list[Any]:
    """Every rank's value, on all ranks, by rank. For small things that pickle."""
    values: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def barrier() -> None:
    comm.barrier()
