"""A Chrome trace of a few steps: open it in chrome://tracing or ui.perfetto.dev."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

SKIPPED = 2  # the first step pays for what happens once; another warms the profiler up


class Trace:
    """Records ``steps`` steps of this rank after the first two and writes ``path``; None records nothing."""

    def __init__(self, path: Path, steps: int | None):
        self.path, self.profiler = path, None
        if steps:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            plan = schedule(wait=SKIPPED - 1, warmup=1, active=steps, repeat=1)
            self.profiler = profile(activities=activities, schedule=plan, on_trace_ready=self._write)
            self.profiler.start()

    def _write(self, profiler: profile) -> None:
        profiler.export_chrome_trace(str(self.path))
        print(f"{self.path}: a trace of {profiler.step_num - SKIPPED + 1} steps", flush=True)

    def step(self) -> None:
        if self.profiler:
            self.profiler.step()

    def close(self) -> None:
        if self.profiler:
            self.profiler.stop()
