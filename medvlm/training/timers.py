"""Where a step's time goes: phases, collectives, waiting for data. On CUDA by events, with one wait per step."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.comm import comm

COLLECTIVES = (
    *("all_reduce", "all_reduce_coalesced", "reduce", "reduce_scatter", "reduce_scatter_tensor", "broadcast"),
    *("all_gather", "all_gather_into_tensor", "all_gather_coalesced", "all_to_all", "all_to_all_single", "barrier"),
)


class Timer:
    """Sums of named spans, on the host's clock or, on CUDA, on the clock of the stream that is current."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = self.now()
        yield
        self.spans.append((name, started, self.now()))

    def now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> dict[str, float]:
        """Seconds by name since the last read. On CUDA the caller has waited for the device."""
        totals: dict[str, float] = {}
        for name, start, end in self.spans:
            seconds = start.elapsed_time(end) / 1000 if self.cuda else end - start
            totals[name] = totals.get(name, 0.0) + seconds
        self.spans.clear()
        return totals


class CommunicationTimer:
    """Times every collective, of DeepSpeed's backend and of models and losses, and the waits for those started early.

    On a CPU that is the time a rank stands still, waiting for slower ranks included. On CUDA it is the time on the
    stream that the collective was given to, which may overlap with computing on another; it is not what a step
    would save without it.
    """

    def __init__(self, device: torch.device):
        self.timer = Timer(device)
        self.inside = False
        # what calls PyTorch's own (gathers of contrastive losses, statistics of batches) does so as `dist.all_gather`
        places = [(place, name) for place in (comm.cdb, torch.distributed) for name in COLLECTIVES]
        self.kept = [(place, name, getattr(place, name)) for place, name in places if hasattr(place, name)]
        for place, name, call in self.kept:
            setattr(place, name, self._timed(call))

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self.inside:  # one collective made of others
                return call(*args, **kwargs)
            self.inside = True
            try:
                with self.timer("communication"):
                    work = call(*args, **kwargs)
            finally:
                self.inside = False
            return _Waiting(work, self.timer) if isinstance(work, torch.distributed.Work) else work

        return timed

    def read(self) -> float:
        return self.timer.read().get("communication", 0.0)

    def close(self) -> None:
        for place, name, call in self.kept:
            setattr(place, name, call)


class _Waiting:
    """A collective under way; the time until it is done counts when somebody waits for it."""

    def __init__(self, work: Any, timer: Timer):
        self.work, self.timer = work, timer

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        with self.timer("communication"):
            return self.work.wait(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.work, name)


class Starvation:
    """Says once that steps wait for data for more than ``share`` of their time, over a window of steps."""

    def __init__(self, workers: int, window: int = 20, share: float = 0.2):
        self.workers, self.share, self.said = workers, share, False
        self.steps: deque[tuple[float, float]] = deque(maxlen=window)
        self.started = False

    def warning(self, step: int, data: float, seconds: float) -> str | None:
        if not self.started:  # the workers of the first step have only begun to read
            self.started = True
            return None
        self.steps.append((data, seconds))
        waited = sum(d for d, _ in self.steps) / sum(s for _, s in self.steps)
        if self.said or len(self.steps) < (self.steps.maxlen or 0) or waited <= self.share:
            return None
        self.said = True
        mend = "read in processes of their own" if not self.workers else "raise it, or prepare smaller images"
        return (
            f"steps {step - len(self.steps) + 1} to {step} waited for data for {waited:.0%} of their time; "
            f"data.workers is {self.workers}: {mend}"
        )
