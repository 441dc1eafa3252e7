"""Packed equals unpacked: loss and gradients of one packed row beside each sample alone, for each attention."""

from pathlib import Path

import pytest
import torch
from toy import make_recipe, sample
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from medvlm.config.load import load_recipe
from medvlm.data.loader import SampleEncoder, collate
from medvlm.models.build import build_components, build_model
from medvlm.training import feed

SEEN: list[list[int]] = []


def by_edges(module, query, key, value, mask, scaling=None, cu_seq_lens_q=None, **_):
    """Variable-length attention as its kernels define it: each segment between two edges alone, causally."""
    assert mask is None and cu_seq_lens_q is not None
    SEEN.append(cu_seq_lens_q.tolist())
    parts = []
    for a, b in zip(cu_seq_lens_q.tolist(), cu_seq_lens_q.tolist()[1:], strict=False):
        q, k, v = (x[:, :, a:b] for x in (query, key, value))
        groups = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        parts.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling))
    return torch.cat(parts, 2).transpose(1, 2), None


AttentionInterface.register("by_edges", by_edges)
AttentionMaskInterface.register("by_edges", flash_attention_mask)


@pytest.fixture(scope="module")
def recipe(world) -> Path:
    return make_recipe(world, "attention")


@pytest.mark.parametrize("attention", ["eager", "sdpa", "by_edges"])
def test_a_packed_row_equals_its_samples_alone(recipe, attention):
    config = load_recipe(str(recipe))
    parts = build_components(config.model)
    torch.manual_seed(0)
    model = build_model(config.model, parts, torch.float32)
    model.language_model.set_attn_implementation(attention)
    encoder: SampleEncoder = feed.training_data(config, parts).encoder
    made = [sample(i, images, answers) for i, (images, answers) in enumerate(MIX)]
    encoded = [encoder(s, [members[i.file] for i in s.images]) for s, members in made]
    pad, size = parts.tokenizer.pad_token_id, parts.image_size

    def run(groups) -> tuple[float, torch.Tensor]:
        model.zero_grad()
        total = 0.0
        for group in groups:
            loss = model(**collate(group, pad, size, padding_free=True).inputs(torch.device("cpu")))
            loss.backward()
            total += float(loss)
        return total, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    SEEN.clear()
    packed, gradient = run([encoded])
    edges = torch.tensor([0, *[len(e.ids) for e in encoded]]).cumsum(0).tolist()
    assert all(seen == edges for seen in SEEN) and bool(SEEN) == (attention == "by_edges")
    alone, reference = run([[e] for e in encoded])
    assert packed == pytest.approx(alone, rel=1e-5)
    assert torch.nn.functional.cosine_similarity(gradient, reference, dim=0) > 0.99999
    assert torch.allclose(gradient, reference, atol=1e-4 * float(reference.abs().max()))


MIX = [
    (1, ["yes", "no"]),
    (0, ["left"]),
    (2, ["no effusion on the left"]),
    (1, ["right " * 9]),
    (0, ["no", "yes", "no"]),
]
