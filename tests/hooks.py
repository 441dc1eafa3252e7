"""Trains like ``medvlm train``, and does something to its own rank at a wanted moment. Run on ranks by `tests/zygote`.

The environment says what: ``HOOK="MODULE:FUNCTION CALL RANK ACTION"``, several separated by commas. Before the call
with that number (from 1; 0 is every call) of that function on that rank (or ``all``), the action is taken: the name of
a a signal, which the process sends to itself, or of a function of this file.
"""

import errno
import functools
import importlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SCRIPT = str(Path(__file__))


def twice() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGUSR1)


def hang() -> None:
    while True:
        time.sleep(1)


def no_space() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def wrong() -> None:
    from medvlm.errors import UserError

    raise UserError("something of this rank alone is wrong")


def bug() -> None:
    raise KeyError("a bug")


def vanish() -> None:
    """The data mount goes away, with open files."""
    os.rename(os.environ["DATA"], os.environ["DATA"] + "-away")

    def gone(*_: Any) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    os.pread = gone


def damage() -> None:
    """The newest checkpoint of $RUN loses a file."""
    newest = max((Path(os.environ["RUN"]) / "checkpoints").glob("step-*"))
    next(newest.glob("*.safetensors")).unlink()


def leave() -> None:
    """A checkpoint that could not be removed altogether."""
    (Path(os.environ["RUN"]) / "checkpoints" / "step-00000001.partial").mkdir()
    no_space()


def nan(loss: Any) -> Any:
    return loss * float("nan")


def nan_gradient(loss: Any) -> Any:
    """The same loss; the derivative of the square root at 0 is infinite."""
    return loss + (loss - loss.detach()).sqrt()


def spike(loss: Any) -> Any:
    return loss * 100


def nan_first(values: Any) -> Any:
    return (values[0] * float("nan"), *values[1:])


def nothing(_: Any) -> None:
    return None


CHANGES = (nan, nan_gradient, spike, nan_first, nothing)  # take what the function returned, and return something else


def install(hook: str) -> None:
    where, call, rank, action = hook.split()
    if rank not in ("all", os.environ["RANK"]):
        return
    module, name = where.split(":")
    owner: Any = importlib.import_module(module)
    *path, name = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    act: Callable = globals().get(action) or (lambda: os.kill(os.getpid(), getattr(signal, action)))
    original, calls = getattr(owner, name), iter(range(1, 10**9))

    @functools.wraps(original)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        if next(calls) != int(call) and call != "0":
            return original(*arguments, **options)
        if act in CHANGES:
            return act(original(*arguments, **options))
        act()
        return original(*arguments, **options)

    setattr(owner, name, wrapped)


if __name__ == "__main__":
    for each in os.environ["HOOK"].split(","):
        install(each)
    from medvlm.cli import main

    sys.argv[0] = "medvlm"
    main()
