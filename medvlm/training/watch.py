"""Watches over the ranks: what each is doing, whether one has failed, and which one holds up the others.

A rank that fails or hangs leaves the others in a collective, where no exception reaches them. So every rank has two
threads. One exchanges places and failures through the store at which the ranks met; the other judges, and ends the
process where its main thread cannot. They are two because a call to the store blocks when the host of the store hangs.
"""

import errno
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from medvlm.errors import UserError
from medvlm.training import distributed, preemption

INTERVAL = 0.25  # seconds between two looks at the store; more where there are many ranks
START_UP = 1800.0  # seconds for building the model and the plan: the limit of the first phase
GRACE = 1.0  # seconds in which a rank may fail by itself, with the sentence that another already has
SILENCE = 6  # intervals in which a live rank writes at least once
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@dataclass(frozen=True)
class Place:
    """Where this rank is. All ranks pass the same phases, so a smaller ``number`` of them is behind."""

    phase: str
    step: int | None
    keys: tuple[str, ...]
    limit: float | None
    number: int
    since: float


@dataclass(frozen=True)
class Failure:
    """The first one counts. ``rank`` is whose it is, ``by`` who noticed it and prints it.

    ``own``: the rank's own error, which others may have as well. Else the sentence itself names the rank.
    """

    sentence: str
    status: int
    rank: int
    by: int
    own: bool = False


_place = Place("start-up", None, (), START_UP, 0, time.monotonic())


_timeout = START_UP
_watching = False


def enter(phase: str, step: int | None = None, keys: tuple[str, ...] = (), limit: float | None = None) -> None:
    """Say what this rank does from now on; ``limit`` in seconds replaces ``training.collective_timeout``."""
    global _place
    _place = Place(phase, step, keys, limit, _place.number + 1, time.monotonic())


@contextmanager
def over_ranks() -> Iterator[None]:
    """Ranks meet; where the body fails on any of them, all end, and one says why; else they part. May be nested."""
    global _watching
    if _watching:
        yield
        return
    distributed.start()
    enter("start-up", limit=START_UP)
    watch, _watching = Watch(), True
    try:
        yield
        distributed.barrier()
    except Exception as error:
        watch.end(error)
    except preemption.Preempted as error:
        preemption.ignore_signals()
        watch.end(error)
    watch.close()
    distributed.barrier()  # the store must outlive the threads of all ranks
    distributed.stop()
    _watching = False


def set_timeout(seconds: float) -> None:
    """``training.collective_timeout``: the limit of phases that have none of their own."""
    global _timeout
    _timeout = seconds


class Watch:
    def __init__(self) -> None:
        self.rank, self.world = distributed.rank(), distributed.world_size()
        self.store = torch.distributed.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        self.interval = max(INTERVAL, self.world / 500)
        self.closing, self.wake = threading.Event(), threading.Event()
        self.answered = time.monotonic()  # when the store last did
        self.lost = ""  # why it never will again
        self.mine: Failure | None = None
        self.ending = False  # the main thread is on its way out
        self.leaving = threading.Lock()
        self.failure: Failure | None = None
        self.seen = 0.0  # when the failure was
        self.left: dict[int, str] = {}  # the sentences, perhaps empty, of the ranks that know of the failure
        self.places: dict[int, dict[str, Any]] | None = None
        self.wanted = False
        self.threads = [threading.Thread(target=t, daemon=True) for t in (self._talk, self._judge)]
        for thread in self.threads:
            thread.start()

    def close(self) -> None:
        self.closing.set()
        self.wake.set()
        for thread in self.threads:
            thread.join(5)

    def end(self, error: BaseException) -> None:
        """Called by the main thread with what ended it. Never returns."""
        self.ending = True
        if isinstance(error, preemption.Preempted):
            failure = self._own("interrupted before the first step: nothing to save; start again", preemption.NO_STEP)
        elif isinstance(error, UserError):
            failure = self._own(str(error), 2)
        elif isinstance(error, OSError) and error.errno in FULL:
            failure = self._own(f"a file of the run cannot be written ({error}); is the disk full?", 2)
        else:
            failure = self._silent_rank(error) or self._own("".join(traceback.format_exception(error)).rstrip(), 1)
        self._leave(failure)

    def _own(self, sentence: str, status: int) -> Failure:
        return Failure(sentence, status, self.rank, self.rank, own=True)

    def _silent_rank(self, error: BaseException) -> Failure | None:
        """Whether a library's error comes from another rank's end: a collective fails when a process is gone."""
        if self.world == 1:
            return None
        before = self._read_places()
        if self._until(lambda: self.failure is not None or bool(self.lost), SILENCE * self.interval):
            lost = Failure(self.lost, 1, 0, self.rank)
            return lost if self.failure is None else self._own(_line(error), 1)
        after = self._read_places()
        silent = [r for r in after if r != self.rank and r in before and before[r]["beat"] == after[r]["beat"]]
        if not silent:
            return None
        return Failure(
            f"rank {silent[0]} ended without a word (killed, or out of memory?), last seen in "
            f"{_tell(after[silent[0]])}; rank {self.rank} noticed by {_line(error)}",
            1,
            silent[0],
            self.rank,
        )

    def _leave(self, failure: Failure) -> None:
        """Agree on the first failure, let one rank print it, and exit with its status."""
        self.leaving.acquire()  # never released: whichever thread comes first ends the process
        self.mine = failure
        self.wake.set()
        self._until(lambda: self.failure is not None or bool(self.lost), 5)
        first = self.failure or failure
        if first.by == self.rank or not self.failure:
            expected = self.world - (first.rank != self.rank)
            self._until(lambda: len(self.left) >= expected or bool(self.lost), GRACE + 8 * self.interval)
            alike = [r for r, sentence in self.left.items() if sentence == first.sentence]
            unnamed = first.own and len(alike) < self.world
            text = f"rank {first.rank} on {socket.gethostname()}: {first.sentence}" if unnamed else first.sentence
            _print(text if first.status == preemption.NO_STEP else f"medvlm: error: {text}")
        else:
            self._until(lambda: self.rank in self.left or bool(self.lost), GRACE)
            if failure.sentence != first.sentence:
                _print(f"rank {self.rank}: stopped because of rank {first.rank}")
        self._exit(first.status)

    def _exit(self, status: int) -> None:
        """Without the interpreter's shutdown, which waits for process groups whose peers are gone."""
        if self.rank == 0:  # the store may be in this process: the others end first
            self._until(lambda: len(self.left) == self.world or bool(self.lost), 2 * GRACE)
            time.sleep(self.interval)
        sys.stdout.flush()
        os._exit(status)

    # The thread that talks to the store

    def _talk(self) -> None:
        beat = 0
        try:
            while not self.closing.is_set() and not self._done_talking():
                beat += 1
                self._exchange(beat)
                self.answered = time.monotonic()
                hurry = self.wanted or self.mine is not None or self.failure is not None
                self.wake.wait(0.02 if hurry else self.interval)
                self.wake.clear()
        except Exception as error:  # whatever the store's client raises when its host is gone
            self.lost = f"rank 0, or the launcher, at which the ranks meet, has ended ({_line(error)})"

    def _done_talking(self) -> bool:
        """Whether this rank is only to end: another one waits for the rest."""
        return self.rank in self.left and self.rank != 0 and self.failure is not None and self.failure.by != self.rank

    def _exchange(self, beat: int) -> None:
        place, (where, waits) = _place, _where()
        about = {"phase": place.phase, "step": place.step, "keys": place.keys[:8], "number": place.number}
        self.store.set(f"place/{self.rank}", json.dumps({**about, "beat": beat, "where": where, "waits": waits}))
        if self.failure is None:
            if self.mine is not None:
                record = self.store.compare_set("failure", "", json.dumps(asdict(self.mine)))
            else:
                record = self.store.get("failure") if self.store.check(["failure"]) else None
            if record:
                self.failure, self.seen = Failure(**json.loads(record)), time.monotonic()
        if self.failure is not None:
            if self.rank not in self.left and (self.mine or time.monotonic() - self.seen > GRACE):
                self.left[self.rank] = self.mine.sentence if self.mine else ""
                self.store.set(f"left/{self.rank}", self.left[self.rank])
            if self.failure.by == self.rank or self.rank == 0:
                for rank in range(self.world):
                    if rank not in self.left and self.store.check([f"left/{rank}"]):
                        self.left[rank] = self.store.get(f"left/{rank}").decode()
        if self.wanted:
            names = {rank: f"place/{rank}" for rank in range(self.world)}
            found = {r: self.store.get(name) for r, name in names.items() if self.store.check([name])}
            self.places, self.wanted = {r: json.loads(value) for r, value in found.items()}, False

    def _read_places(self) -> dict[int, dict[str, Any]]:
        """Of all ranks, as they last wrote them; empty where the store does not answer."""
        self.places, self.wanted = None, True
        self.wake.set()
        self._until(lambda: self.places is not None or bool(self.lost), 10)
        return self.places or {}

    # The thread that judges

    def _judge(self) -> None:
        while not self.closing.wait(self.interval / 2):
            if self.ending:
                return
            limit = _place.limit or _timeout
            if self.failure is not None:
                if self.rank in self.left:
                    self.leaving.acquire()
                    _print(f"rank {self.rank}: stopped because of rank {self.failure.rank}")
                    self._exit(self.failure.status)
            elif self.lost:
                time.sleep(GRACE)
                if not self.ending:
                    self._leave(Failure(self.lost, 1, 0, self.rank))
            elif time.monotonic() - self.answered > max(limit, 10.0):
                text = f"rank 0, or the launcher, at which the ranks meet, has not answered for {limit:g} s"
                self._leave(Failure(text, 1, 0, self.rank))
            elif time.monotonic() - _place.since > limit:
                failure = self._who_is_behind(limit)
                if failure and not self.ending:
                    self._leave(failure)

    def _who_is_behind(self, limit: float) -> Failure | None:
        """The rank that the others wait for: in an earlier phase, else silent, else not in a collective."""
        here = _place.number
        before = self._read_places()
        time.sleep(SILENCE * self.interval)
        after = self._read_places()
        if _place.number != here or self.failure is not None:
            return None
        if not after:
            return Failure("rank 0, or the launcher, at which the ranks meet, does not answer", 1, 0, self.rank)
        least = min(place["number"] for place in after.values())
        behind = [r for r, place in after.items() if place["number"] == least]
        silent = [r for r in behind if r in before and before[r]["beat"] == after[r]["beat"]]
        busy = [r for r in behind if not after[r]["waits"]]
        chosen = silent or busy or behind
        names = ", ".join(map(str, chosen[:8])) + (" ..." if len(chosen) > 8 else "")
        how = "does not answer, and was last" if silent else "is"
        text = (
            f"no step forward for {limit:g} s (training.collective_timeout): rank {names} is behind; it {how} in "
            f"{_tell(after[chosen[0]])}"
        )
        return Failure(text, 1, chosen[0], self.rank)

    def _until(self, holds: Callable[[], bool], seconds: float) -> bool:
        end = time.monotonic() + seconds
        while not holds() and time.monotonic() < end:
            time.sleep(0.01)
        return holds()


def _where() -> tuple[str, bool]:
    """Our innermost line that the main thread is in, and whether it waits in a collective."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    place, waits, depth = "", False, 0
    package = str(Path(__file__).parent.parent)
    while frame is not None and not place:
        name = frame.f_code.co_filename
        waits = waits or (depth < 12 and any(part in name for part in ("torch/distributed/", "deepspeed/comm/")))
        if name.startswith(package):
            place = f"{name.removeprefix(package).lstrip('/')}:{frame.f_lineno}"
        frame, depth = frame.f_back, depth + 1
    return place, waits


def _tell(place: dict[str, Any]) -> str:
    step = "" if place["step"] is None else f"step {place['step']}, "
    keys = f", batch {', '.join(place['keys'])} ..." if place["keys"] else ""
    where = f" ({place['where']})" if place["where"] else ""
    return f"{step}{place['phase']}{where}{keys}"


def _line(error: BaseException) -> str:
    """The beginning of an error's first line, without the place in a library's sources."""
    text = re.sub(r"\[\S*/\S*\] *", "", str(error) or "no text").splitlines()[0]
    return f"{type(error).__name__}: {text.split('. ')[0][:160]}"


def _print(text: str) -> None:
    sys.stdout.flush()
    print(text, file=sys.stderr, flush=True)
