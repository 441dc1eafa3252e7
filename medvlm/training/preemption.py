"""Signals that ask for a checkpoint: SIGTERM and SIGUSR1.

Before the first step nothing is lost by leaving, so the first signal raises `Preempted` where the main thread is. From
then on signals are only noted, and ranks agree on them where they exchange something anyway (`boundary`).
"""

import signal

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
STATUS = 85  # exit status: start again to go on
NO_STEP = 86  # the same, and no step was made since the start

_received: list[int] = []
_at_once = True


class Preempted(BaseException):
    """A signal before the first step. Not an Exception, so that no library takes it for a failure of its own."""


def catch_signals() -> None:
    for number in SIGNALS:
        signal.signal(number, _note)


def wait_for_boundaries() -> None:
    """From here on a signal waits for the next boundary."""
    global _at_once
    _at_once = False


def requested() -> bool:
    return bool(_received)


def ignore_signals() -> None:
    """What was asked for is done: a repeated signal must not change the exit status of a process on its way out."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _note(number: int, _: object) -> None:
    _received.append(number)
    if _at_once and len(_received) == 1:
        raise Preempted
