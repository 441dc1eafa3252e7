"""Where shard tasks run: in this process, in a pool of processes, or as a Slurm array of parts."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import get_all_start_methods, get_context, parent_process
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, TypeVar

from medvlm.errors import UserError

POLL_SECONDS = 2.0
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


def _start_worker(environment: dict[str, str]) -> None:
    """Die with the parent: after kill -9 of a parent, its workers would wait for work forever."""
    os.environ.update(environment)  # the server that forked this may be older than a change of the parent's
    for name in ("SIGUSR1", "SIGUSR2"):  # Slurm sends them to every process of a job; the parent decides
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    parent = parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _context(module: str) -> BaseContext:
    """Clean processes; where the system can, forked from a server that has imported ``module`` once for all of them."""
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload([module])
    return context


def run_pool(function: Callable[[T], R], tasks: Iterable[T], workers: int) -> Iterator[tuple[T, R]]:
    """Each task with its result, as they finish; at most two tasks per worker are in flight.

    Raises WorkerDied where a process is killed from outside or by a crash.
    """
    added = {name: value for name, value in ONE_THREAD.items() if name not in os.environ}
    os.environ.update(added)  # new processes read it before they import anything
    context, environment = _context(function.__module__), dict(os.environ)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(environment,))
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
            executor = submitit.SlurmExecutor(folder=logs)
            executor.update_parameters(**{"job_name": "medvlm-prepare", "time": 24 * 60, **parameters})
        else:
            executor = submitit.AutoExecutor(folder=logs, cluster=cluster)
            executor.update_parameters(timeout_min=24 * 60)
        jobs = executor.map_array(function, range(parts))
    except (RuntimeError, submitit.core.utils.FailedJobError, subprocess.CalledProcessError, TypeError) as error:
        raise UserError(f"--executor submitit: the array could not be submitted ({error})") from None
    try:
        failed = _wait(jobs, cluster, tick)
    except KeyboardInterrupt:
        ids = sorted({str(job.job_id).partition("_")[0] for job in jobs})
        raise UserError(f"interrupted; job {', '.join(ids)} goes on (stop it with scancel)") from None
    if failed:
        told = [f"part {n}/{parts} (log {jobs[n].paths.stderr}): {why}" for n, why in sorted(failed.items())]
        kept = "finished shards are kept: the same command goes on from there"
        raise UserError(f"{len(failed)} of {parts} parts failed; {kept}\n" + "\n".join(told))


def _wait(jobs: list[Any], cluster: str, tick: Callable[[int], None]) -> dict[int, str]:
    """Part -> why it failed, when all parts have ended."""
    missing = dict.fromkeys(range(len(jobs)), 0)  # times that a part was neither in the queue nor finished
    failed: dict[int, str] = {}
    while missing:
        queued = _queued(jobs) if cluster == "slurm" else {str(job.job_id) for job in jobs if not job.done()}
        for n in list(missing):
            failure: str | None = "it ended without a result (killed, out of memory or time, or its node was lost)"
            if jobs[n].paths.result_pickle.exists():
                failure = _outcome(jobs[n])
            else:
                missing[n] = 0 if str(jobs[n].job_id) in queued else missing[n] + 1
                if missing[n] < 3:  # a result may become visible late on a shared file system
                    continue
            del missing[n]
            if failure:
                failed[n] = failure
        tick(len(jobs) - len(missing))
        if missing:
            time.sleep(POLL_SECONDS)
    return failed


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
