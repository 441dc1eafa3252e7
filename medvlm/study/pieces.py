"""The pieces of a study: commands of ``medvlm`` in processes of their own, each done once for the same inputs."""

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from medvlm.errors import UserError

SAID = "medvlm: error: "
HASH = 8  # hexadecimal digits of a folder's name
Run = Callable[[Sequence[str], int | None, Path], int]
"""``medvlm ARGUMENTS`` on ranks (None: outside of any launcher), its output into a file -> exit status."""


class PieceFailed(Exception):
    """One sentence that says why."""


def run_command(arguments: Sequence[str], ranks: int | None, log: Path) -> int:
    """As ``launchers/local.sh`` starts it. A signal to end goes on to the command, which may write a checkpoint."""
    command = [sys.executable, "-m", "medvlm.cli", *arguments]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    environment |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore::FutureWarning"}
    if gpus() == 0:
        environment |= {"DS_ACCELERATOR": "cpu"}
    if ranks is not None and ranks > 1:
        environment.setdefault("OMP_NUM_THREADS", "1")
        launcher = ["-m", "deepspeed.launcher.runner", "--no_local_rank"]
        visible = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
        if gpus() and all(number.isdigit() for number in visible):  # which DeepSpeed ignores, given how many
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible[:ranks])
        else:
            launcher += ["--num_gpus", str(ranks)]
        launcher += ["--master_port", str(_free_port()), "--module", "medvlm.cli"]
        command = [sys.executable, *launcher, *arguments]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        with _ends_with_us(process):
            return process.wait()


@contextlib.contextmanager
def _ends_with_us(process: subprocess.Popen) -> Iterator[None]:
    """Ctrl-C reaches the command by itself, SIGTERM through here; either way the study ends after it."""

    def end(number: int, _: object) -> None:
        process.terminate()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


def gpus() -> int:
    import torch

    return torch.cuda.device_count()


def digest(*inputs: Any) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()[:HASH]


def identity(path: str | Path) -> Any:
    """What shards or a model folder are, short of reading them: names, sizes and times of files. A URL or a hub name is
    its own."""
    place = Path(path)
    if "://" in str(path) or not place.exists():
        return str(path)
    files = sorted(p for p in place.rglob("*") if p.is_file()) if place.is_dir() else [place]
    return [(str(p.relative_to(place)), (s := p.stat()).st_size, s.st_mtime_ns) for p in files]


def require_shards(paths: Sequence[str], field: str) -> None:
    """Raises UserError where a local one is absent."""
    for path in paths:
        if "://" not in path and not Path(path).exists():
            raise UserError(f"{field}: {path} does not exist")


def once(
    folder: Path, name: str, arguments: Sequence[str], run: Run, tell: Callable[[str], None], **options: Any
) -> None:
    """Run a piece whose results go into ``folder``, unless it has been finished there.

    Raises PieceFailed with the sentence of the command. Its output stays in ``folder/NAME.log``.
    """
    done, log = folder / f"{name}.done.json", folder / f"{name}.log"
    if done.exists():
        tell(f"{name}: done before")
        return
    folder.mkdir(parents=True, exist_ok=True)
    tell(f"{name}: medvlm {' '.join(arguments)}")
    start = time.monotonic()
    status = run(arguments, options.get("ranks"), log)
    if status:
        raise PieceFailed(f"{_sentence(log, status)} (see {log})")
    seconds = round(time.monotonic() - start, 1)
    partial = done.with_suffix(".partial")
    partial.write_text(json.dumps({"command": ["medvlm", *arguments], "seconds": seconds, **options}) + "\n")
    os.rename(partial, done)
    tell(f"{name}: {seconds} s")


def _sentence(log: Path, status: int) -> str:
    """What a command said when it failed: its error, or its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    said = [line.partition(SAID)[2] for line in lines if SAID in line]
    if said:
        return said[0]
    return f"ended with status {status}" + (f": {lines[-1]}" if lines else "")
