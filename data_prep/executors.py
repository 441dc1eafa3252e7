"""Where shard tasks run: in this process, in a pool of processes, or as a Slurm array of parts."""

import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, TypeVar

from data_prep.shard_task import ShardTask, crashed_at, make_shard
from medvlm.errors import UserError

T = TypeVar("T")
R = TypeVar("R")
# One thread in each worker: there is a process per core.
ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLOSC_NTHREADS")}


class WorkerDied(Exception):
    """A worker process was killed; ``tasks`` were in work."""

    def __init__(self, tasks: list[Any]):
        super().__init__(f"a worker process was killed with {len(tasks)} tasks in work")
        self.tasks = tasks


def available_cores() -> int:
    """Cores that this job may use: Slurm's allocation, else the process's affinity."""
    if granted := os.environ.get("SLURM_CPUS_PER_TASK"):
        return int(granted)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_worker() -> None:
    """Die with the parent: after kill -9 of a parent, its workers would wait for work forever."""
    parent = parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_pool(function: Callable[[T], R], tasks: Iterable[T], workers: int) -> Iterator[tuple[T, R]]:
    """Each task with its result, as they finish; at most two tasks per worker are in flight.

    Raises WorkerDied where a process is killed from outside or by a crash.
    """
    added = {name: value for name, value in ONE_THREAD.items() if name not in os.environ}
    os.environ.update(added)  # spawned processes read it before they import anything
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start_worker)
    remaining = iter(tasks)
    pending: dict[Future[R], T] = {}
    try:
        while True:
            for task in islice(remaining, 2 * workers - len(pending)):
                pending[pool.submit(function, task)] = task
            if not pending:
                return
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                result = future.result()
                yield pending.pop(future), result
    except BrokenProcessPool:
        raise WorkerDied(list(pending.values())) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        for name in added:
            os.environ.pop(name, None)


def make_shards(tasks: list[ShardTask], workers: int | None) -> Iterator[tuple[ShardTask, dict[str, Any]]]:
    """Each task with its marker, as they finish; ``workers`` 1 is this process, None a process per core.

    After the death of a worker, the shards that were in work are made one at a time: an item that kills its process
    alone is quarantined and the run goes on. If none does, memory was short: raises UserError.
    """
    count = min(workers or available_cores(), max(1, len(tasks)))
    if workers == 1:
        yield from ((task, make_shard(task)) for task in tasks)
        return
    while tasks:
        finished: set[str] = set()
        try:
            for task, marker in run_pool(make_shard, tasks, count):
                finished.add(task.shard.name)
                yield task, marker
            return
        except WorkerDied as death:
            in_work = [task for task in death.tasks if crashed_at(task) is not None]
            culprits = 0
            for task in in_work:
                tried, marker = _alone(task)
                finished.add(task.shard.name)
                culprits += len(tried.skip)
                yield tried, marker
            if not culprits:
                raise UserError(
                    f"{death.tasks[0].out}: a worker process was killed while {count} made shards "
                    f"({', '.join(task.shard.name for task in in_work)}), most likely because the machine ran out of "
                    "memory; start again with fewer --workers (finished shards are kept)"
                ) from None
        tasks = [task for task in tasks if task.shard.name not in finished]


def _alone(task: ShardTask) -> tuple[ShardTask, dict[str, Any]]:
    for _ in range(4):
        try:
            [result] = run_pool(make_shard, [task], 1)
            return result
        except WorkerDied:
            if (number := crashed_at(task)) is None:
                break
            reason = "reading it killed the process (its decoder crashed, or memory ran out)"
            task = replace(task, skip=(*task.skip, (number, reason)))
    raise UserError(
        f"{task.out}: processes that make {task.shard.name} are killed again and again, most likely because "
        "the machine has too little memory; start again with more memory (finished shards are kept)"
    )


def slurm_parameters(text: str | None) -> dict[str, Any]:
    """``partition=cpu,time=60,cpus_per_task=8`` as submitit takes it. Raises UserError for another form."""
    values: dict[str, Any] = {}
    for pair in filter(None, (text or "").split(",")):
        name, separator, value = pair.partition("=")
        if not separator or not name.strip() or not value.strip():
            raise UserError(f"--slurm: {pair!r} is not NAME=VALUE, as in partition=cpu,time=60")
        values[name.strip()] = int(value) if value.strip().isdigit() else value.strip()
    return values


def run_array(
    function: Callable[[int], str | None],
    parts: int,
    cluster: str,
    parameters: dict[str, Any],
    logs: Path,
    tick: Callable[[int], None],
    poll_s: float = 2.0,
) -> None:
    """Run ``function(i)`` for each part as one array job and wait; ``tick(n)`` is told the number of finished parts.

    ``function`` returns None or one sentence that says why it failed. Raises UserError that names the failed parts with
    their logs; a part that vanishes from the queue without a result (killed, node lost) counts as failed.
    """
    try:
        import submitit
    except ImportError:
        raise UserError(
            "--executor submitit: submitit is not installed; `pip install medvlm[prep]` brings it"
        ) from None
    logs.mkdir(parents=True, exist_ok=True)
    try:
        executor: Any
        if cluster == "slurm":
            executor = submitit.SlurmExecutor(folder=logs, max_num_timeout=0)
            executor.update_parameters(**{"job_name": "medvlm-prepare", "time": 24 * 60, **parameters})
        else:
            executor = submitit.AutoExecutor(folder=logs, cluster=cluster)
            executor.update_parameters(timeout_min=24 * 60)
        jobs = executor.map_array(function, range(parts))
    except (RuntimeError, submitit.core.utils.FailedJobError, subprocess.CalledProcessError, TypeError) as error:
        raise UserError(f"--executor submitit: the array could not be submitted ({error})") from None
    missing: dict[int, int] = {}  # part -> times that it was neither in the queue nor finished
    failed: dict[int, str] = {}
    done: set[int] = set()
    try:
        while len(done) < parts:
            queued = _queued(jobs) if cluster == "slurm" else None
            for n in set(range(parts)) - done:
                if jobs[n].paths.result_pickle.exists():
                    failure = _outcome(jobs[n])
                elif (str(jobs[n].job_id) not in queued) if queued is not None else jobs[n].done():
                    missing[n] = missing.get(n, 0) + 1
                    if missing[n] < 3:  # the result may become visible late on a shared file system
                        continue
                    failure = "it ended without a result (killed, out of memory or time, or its node was lost)"
                else:
                    missing.pop(n, None)
                    continue
                done.add(n)
                if failure:
                    failed[n] = failure
            tick(len(done))
            if len(done) < parts:
                time.sleep(poll_s)
    except KeyboardInterrupt:
        ids = sorted({str(job.job_id).partition("_")[0] for job in jobs})
        raise UserError(f"interrupted; job {', '.join(ids)} goes on (stop it with scancel)") from None
    if failed:
        told = [f"part {n}/{parts} (log {jobs[n].paths.stderr}): {why}" for n, why in sorted(failed.items())]
        kept = "finished shards are kept: the same command goes on from there"
        raise UserError(f"{len(failed)} of {parts} parts failed; {kept}\n" + "\n".join(told))


def _queued(jobs: list[Any]) -> set[str]:
    """Ids of those jobs that Slurm still knows as waiting or running. squeue, as accounting is not everywhere."""
    ids = ",".join(sorted({str(job.job_id).partition("_")[0] for job in jobs}))
    states = (
        "PENDING,RUNNING,SUSPENDED,CONFIGURING,COMPLETING,REQUEUED,REQUEUE_HOLD,RESIZING,SIGNALING,STAGE_OUT,STOPPED"
    )
    command = ["squeue", "-h", "-r", "-j", ids, "-t", states, "-o", "%F_%K"]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode and "Invalid job id" not in answer.stderr:
        # The controller may be restarting: take every job as queued, and ask again.
        return {str(job.job_id) for job in jobs}
    return {line.removesuffix("_N/A") for line in answer.stdout.split()}


def _outcome(job: Any) -> str | None:
    """None, the sentence of a UserError, or the last line of a traceback."""
    error = job.exception()
    if error is None:
        return job.result()
    trace = [line for line in str(error).split("-" * 22)[1:2] or [str(error)] if line.strip()]
    return trace[0].strip().splitlines()[-1]
