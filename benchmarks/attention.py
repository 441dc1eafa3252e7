"""Packed rows on a CPU: one masked SDPA call over the row against one per segment (`model.attention: varlen`).

    python benchmarks/attention.py

A Llama of four layers (width 256, heads of 64, two query heads per key head) in fp32, forward and backward, one thread.
"""

import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from medvlm.models.attention import VARLEN

ROWS = ((512, 4), (2048, 1), (2048, 4), (2048, 16), (4096, 8), (4096, 24))  # tokens, segments


def lengths(tokens: int, segments: int) -> list[int]:
    weights = torch.rand(segments, generator=torch.Generator().manual_seed(1)) + 0.3
    found = (weights / weights.sum() * tokens).long().tolist()
    return [*found[:-1], tokens - sum(found[:-1])]


def measure(tokens: int, segments: int, implementation: str) -> tuple[float, torch.Tensor]:
    """CPU seconds, the least of three, and the gradient at the embeddings."""
    values = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = AutoConfig.for_model("llama", vocab_size=512, num_key_value_heads=2, **values)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).get_decoder()
    embeds = torch.randn(1, tokens, 256, requires_grad=True)
    weight = torch.randn(1, tokens, 256)
    row = lengths(tokens, segments)
    edges = torch.tensor([0, *row]).cumsum(0).int()
    options = {
        "position_ids": torch.cat([torch.arange(n) for n in row])[None],
        "use_cache": False,
        "cu_seq_lens_q": edges,
        "cu_seq_lens_k": edges,
        "max_length_q": max(row),
        "max_length_k": max(row),
    }
    best = float("inf")
    for _ in range(3):
        embeds.grad = None
        started = time.process_time()
        (model(inputs_embeds=embeds, **options).last_hidden_state * weight).sum().backward()
        best = min(best, time.process_time() - started)
    assert embeds.grad is not None
    return best, embeds.grad


def main() -> None:
    torch.set_num_threads(1)
    print("| tokens | segments | sdpa, s | varlen, s | ratio | gradients differ by |\n|---|---|---|---|---|---|")
    for tokens, segments in ROWS:
        sdpa, expected = measure(tokens, segments, "sdpa")
        varlen, found = measure(tokens, segments, VARLEN)
        error = float((found - expected).abs().max() / expected.abs().max())
        print(f"| {tokens} | {segments} | {sdpa:.2f} | {varlen:.2f} | {sdpa / varlen:.1f} | {error:.0e} |", flush=True)


if __name__ == "__main__":
    main()
