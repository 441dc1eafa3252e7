"""How long a step would take, from what was counted and from stated rates. An estimate, not a measurement.

compute = FLOPs of forward, backward and recomputation / (peak x share of it that is reached)
transfer of V bytes over N ranks, n per node, as a ring: V (N - 1) / N over a rank's link inside the node and, at
    the same time, over the links between nodes, of which a node has one per GPU; an all-reduce is twice that;
    each call waits log2(N) times the latency
exposed = what is left of the transfers of forward and backward when a share of the compute time has hidden them,
    and all of those of the optimizer's step
optimizer = its state read and written once, in the memory where it lies, and copies between GPU and host
"""

import math
from dataclasses import dataclass

from medvlm.planning.fake import Collectives
from medvlm.planning.rehearsal import OPTIMIZER, Rehearsal


@dataclass(frozen=True)
class Rates:
    """Bytes and FLOPs per second and GPU. The defaults are data sheets', of an H100 SXM with one 400 Gb/s link per GPU;
    the shares are assumptions."""

    peak_flops: float = 989e12
    reached: float = 0.4
    within_node: float = 450e9
    between_nodes: float = 50e9
    gpus_per_node: int = 8
    latency: float = 10e-6
    hidden: float = 0.5
    memory: float = 3.35e12
    host_memory: float = 25e9
    host_link: float = 50e9


@dataclass(frozen=True)
class StepTime:
    """Seconds. ``communication`` is all of it, ``exposed`` the part that nothing hides."""

    compute: float
    communication: float
    exposed: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.compute + self.exposed + self.optimizer


def step_time(rehearsal: Rehearsal, world: int, accumulation: int, rates: Rates) -> StepTime:
    """Of a whole step of ``accumulation`` micro-steps; the rehearsal may have taken fewer."""
    repeats = accumulation / rehearsal.accumulation
    compute = rehearsal.flops * repeats / (rates.peak_flops * rates.reached)
    # up to stage 1 gradients are reduced once a step, from stage 2 on in every micro-step
    micro = seconds(rehearsal.collectives.get("forward_backward", {}), world, rates)
    micro *= repeats if rehearsal.stage >= 2 else 1
    once = seconds(rehearsal.collectives.get("step", {}), world, rates)
    on_host = rehearsal.host > 0
    state = 2 * rehearsal.state[OPTIMIZER] / (rates.host_memory if on_host else rates.memory)
    moved = rehearsal.transfers * repeats / rates.host_link if on_host else 0.0
    exposed = max(0.0, micro - rates.hidden * compute) + once
    return StepTime(compute, micro + once, exposed, state + moved)


def seconds(collectives: dict[str, Collectives], world: int, rates: Rates) -> float:
    if world == 1:
        return 0.0
    total = 0.0
    for kind, did in collectives.items():
        volume = did.bytes * (2 if kind == "all-reduce" else 1) * (world - 1) / world
        links = [volume / rates.within_node]
        if world > rates.gpus_per_node:
            links.append(volume / (rates.between_nodes * rates.gpus_per_node))
        total += max(links) + did.calls * rates.latency * math.log2(world)
    return total
