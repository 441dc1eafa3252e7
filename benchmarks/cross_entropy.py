"""Memory and time of the chunked linear cross-entropy beside full logits.

    python benchmarks/cross_entropy.py [--positions 2048] [--width 1024]

Each line is a process of its own: resident memory at its peak, less that with hidden states and weight in place.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import torch
from torch.nn.functional import linear

from medvlm.objectives.language_modeling import linear_cross_entropy_sum, token_cross_entropy_sum


def measure(kind: str, positions: int, width: int, vocabulary: int) -> dict[str, float]:
    torch.manual_seed(0)
    hidden = torch.randn(positions, width, requires_grad=True)
    weight = (torch.randn(vocabulary, width) / width**0.5).requires_grad_()
    targets = torch.randint(0, vocabulary, (positions,))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    if kind == "chunked":
        loss = linear_cross_entropy_sum(hidden, weight, targets)
    else:
        loss = token_cross_entropy_sum(linear(hidden, weight), targets)
    loss.backward()
    seconds = time.process_time() - started
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    assert weight.grad is not None
    return {"gib": peak, "seconds": seconds, "loss": float(loss.detach()), "norm": float(weight.grad.norm())}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--positions", type=int, default=2048)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        kind, vocabulary = options.one
        print(json.dumps(measure(kind, options.positions, options.width, int(vocabulary))))
        return
    print("| vocabulary | loss | peak, GiB | CPU s | loss per token | norm of the weight's gradient |")
    print("|---|---|---|---|---|---|")
    sizes = ["--positions", str(options.positions), "--width", str(options.width)]
    for vocabulary in (32_000, 128_256):
        for kind in ("full", "chunked"):
            command = [sys.executable, __file__, *sizes, "--one", kind, str(vocabulary)]
            found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            mean = found["loss"] / options.positions
            cells = f"{found['gib']:.2f} | {found['seconds']:.1f} | {mean:.6f} | {found['norm']:.4f}"
            print(f"| {vocabulary} | {kind} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
