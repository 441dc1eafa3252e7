"""What a run measures of itself, on all ranks: time by phase, FLOPs against the peak, memory. Rank 0 writes it."""

import time
from functools import partial
from typing import Any

import torch

from medvlm.training import distributed
from medvlm.training.flops import Cost, CostRecorder, attention_windows, work
from medvlm.training.meters import peak_memory_gib
from medvlm.training.peak import peak_of
from medvlm.training.setup import Session, precision
from medvlm.training.step import Counts
from medvlm.training.timers import CommunicationTimer, Starvation, Timer

PHASES = ("forward", "backward", "optimizer")


class Gauges:
    """All ranks make one, and call :meth:`measure` after each step."""

    def __init__(self, session: Session):
        self.device = distributed.device()
        self.phases = Timer(self.device)
        self.communication = CommunicationTimer(self.device)
        self.windows = attention_windows(session.parts.text_config)
        family, parts = session.family, session.config.model.PARTS
        self.recorder = CostRecorder(session.engine.module, parts, family.unit, session.parts.unused)
        self.text_passes = family.text_passes(session.config)
        self.targets, self.repeated = family.targets, partial(family.repeated, session.config, session.accumulation)
        self.peak = peak_of(self.device, precision(session.config))
        self.peak_of_all = sum(flops for (flops,) in distributed.gather_numbers([self.peak.flops]))
        self.starvation = Starvation(session.config.data.workers)

    def start(self) -> float:
        """The step's first instant. What was exchanged between steps, for evaluation and checkpoints, is forgotten."""
        self.communication.read()
        return time.perf_counter()

    def close(self) -> None:
        self.communication.close()

    def measure(self, step: int, counts: Counts, started: float, data_seconds: float) -> dict[str, Any]:
        """The step's part of ``metrics.jsonl``; ``started`` as :meth:`start` gave it. Waits for the device, once."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - started
        phases = self.phases.read()
        mine = [
            seconds,
            data_seconds,
            self.communication.read(),
            peak_memory_gib(),
            *(phases.get(p, 0) for p in PHASES),
        ]
        ranks = distributed.gather_numbers(mine)
        slowest, _, _, memory, *_ = (max(column) for column in zip(*ranks, strict=True))
        _, data, communication, _, *by_phase = (sum(column) / len(ranks) for column in zip(*ranks, strict=True))
        # a layer's cost per token is that of all its calls, attention's per pair that of one
        pairs = {w: n * self.text_passes for w, n in counts.pairs.items()}
        units = {"images": counts.images, "tokens": counts.tokens, "targets": counts.targets, **counts.more}
        costs = self.recorder.costs.of(work(units, pairs), self.repeated)
        total = sum(costs.values(), Cost())
        warning = self.starvation.warning(step, data, slowest)
        if warning and distributed.rank() == 0:
            print(warning, flush=True)
        spent = {"data": data, **dict(zip(PHASES, by_phase, strict=True))}
        return {
            "seconds": slowest,
            "data_seconds": max(row[1] for row in ranks),
            "phase_seconds": {**spent, "other": slowest - sum(spent.values())},
            "communication_seconds": communication,
            "tokens_per_second": counts.tokens / slowest,
            f"{self.targets}_per_second": counts.targets / slowest,
            "images_per_second": counts.images / slowest,
            "model_tflop": {part: cost.model / 1e12 for part, cost in costs.items()},
            "mfu": total.model / slowest / self.peak_of_all,
            "hfu": total.hardware / slowest / self.peak_of_all,
            "peak_tflops_per_second": self.peak_of_all / 1e12,
            "peak_source": self.peak.source,
            "memory_gib": memory,
            "memory_rank": max(range(len(ranks)), key=lambda rank: ranks[rank][3]),
            "memory_gib_of_ranks": {str(rank): values[3] for rank, values in enumerate(ranks[:64])},
        }
