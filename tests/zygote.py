"""Starts ranks and commands of medvlm by forking a process that has imported everything once.

Importing torch, transformers and DeepSpeed takes longer than most runs of the tests. Each request forks fresh processes
from one that has only imported: nothing of one run (DeepSpeed patches torch) is seen by the next.

    zygote().run(["train", recipe], ranks=2) -> Done(returncode, stdout, stderr)

This file is also the program of that process: it reads a JSON line per request and answers with one.
"""

import contextlib
import faulthandler
import functools
import gc
import json
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

REPO = Path(__file__).parent.parent
TIMED_OUT = 124  # as of timeout(1)


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


class Zygote:
    def __init__(self) -> None:
        # a process that has asked CUDA for its devices cannot fork others that use them; NVML can be asked instead
        fork = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
        # the allocator of pyarrow starts a thread when it is imported, whose locks a fork may find taken
        fork["JE_ARROW_MALLOC_CONF"] = "background_thread:false"
        environment = {**os.environ, **fork}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(
        self,
        arguments: list[str],
        *,
        ranks: int | None = None,
        timeout: float = 300,
        script: str = "",
        file_size: int | None = None,
        grace: float = 10,
        **environment: str,
    ) -> Done:
        """Run ``medvlm ARGUMENTS``, or a Python ``script`` file, on ``ranks`` ranks (None: outside of any launcher).
        The proof of an export is `forked`, too, unless ``FRESH`` is in ``environment``.

        ``file_size``: bytes at which every file is cut, as by a full disk.
        As torchrun does, ends the others, ``grace`` seconds after one has failed; the status is that of the first.
        """
        assert self.process.stdin and self.process.stdout
        with tempfile.TemporaryDirectory() as folder:
            request = {
                "arguments": list(map(str, arguments)),
                "script": script,
                "ranks": ranks,
                "timeout": timeout,
                "file_size": file_size,
                "grace": grace,
                "environment": environment,
                "folder": folder,
            }
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            status = json.loads(self.process.stdout.readline())
            read = {
                name: "".join(p.read_text(errors="replace") for p in sorted(Path(folder).glob(f"{name}-*")))
                for name in ("stdout", "stderr")
            }
        return Done(status, read["stdout"], read["stderr"])


def forked(command: list[str], run: Callable[..., Done]) -> Done:
    """For a Python script in a process of its own, which would import for seconds: forked from one that has."""
    return run(list(map(str, command[2:])), script=command[1])


@functools.cache
def zygote() -> Zygote:
    """One for the whole test session; it ends when its standard input closes."""
    return Zygote()


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed by imports is no answer
    import deepspeed
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  (which any run imports, and torch's compiler with it)
    import peft  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401
    import transformers.models.llama.modeling_llama
    import transformers.models.siglip.modeling_siglip  # noqa: F401

    import medvlm.cli
    import medvlm.export.dual_encoder
    import medvlm.export.llava
    import medvlm.training.loop  # noqa: F401

    gc.collect()
    gc.freeze()  # nothing to look through for those who are forked: DeepSpeed collects garbage at every start
    for line in sys.stdin:
        request = json.loads(line)
        answers.write(json.dumps(_run(request)) + "\n")
        answers.flush()


def _run_here(arguments: list[str], script: str) -> Done:
    """As `Zygote.run`, in a process that was forked from the zygote."""
    faulthandler.cancel_dump_traceback_later()  # its thread would be missing in a fork, and be waited for
    with tempfile.TemporaryDirectory() as folder:
        request = {"arguments": arguments, "script": script, "ranks": None, "timeout": 300, "file_size": None}
        status = _run({**request, "grace": 10, "environment": {}, "folder": folder})
        return Done(status, *((Path(folder) / f"{name}-0").read_text() for name in ("stdout", "stderr")))


def _run(request: dict) -> int:
    ranks = request["ranks"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    children: dict[int, int] = {}
    for rank in range(ranks or 1):
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        places |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {k: str(v) for k, v in places.items()} if ranks else {}
        pid = os.fork()
        if pid == 0:
            _child(request, rank, environment | request["environment"])
        children[pid] = rank
    end, failed = time.monotonic() + request["timeout"], 0
    grace = end
    while children:
        ended = [(pid, status) for pid, status in (os.waitpid(child, os.WNOHANG) for child in children) if pid]
        for pid, status in ended:
            code = os.waitstatus_to_exitcode(status)
            children.pop(pid)
            if code and not failed:
                failed, grace = code, time.monotonic() + request["grace"]
        if ended:
            continue
        if time.monotonic() > grace:
            failed = failed or TIMED_OUT
            for child in children:
                os.kill(child, signal.SIGKILL)
            grace = float("inf")
        else:
            time.sleep(0.005)
    return failed


def _child(request: dict, rank: int, environment: dict[str, str]) -> None:
    """Never returns. Its exit is that of an interpreter: handlers run, streams are flushed."""
    os.environ.update(environment)
    os.chdir(REPO)
    if request["file_size"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size"], resource.RLIM_INFINITY))
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(Path(request["folder"]) / f"{name}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    faulthandler.dump_traceback_later(request["timeout"] * 0.95)  # where it hung, before it is killed
    sys.argv = [request["script"] or "medvlm", *request["arguments"]]
    if "FRESH" not in os.environ:
        from medvlm.export import writing

        writing.subprocess = SimpleNamespace(run=lambda command, **_: forked(command, _run_here))
    code = 1
    try:
        if request["script"]:
            runpy.run_path(request["script"], run_name="__main__")
        else:
            from medvlm.cli import main

            main()
        code = 0
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
        if isinstance(leave.code, str):
            print(leave.code, file=sys.stderr)
    except BaseException:
        import traceback

        traceback.print_exc()
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _serve()
