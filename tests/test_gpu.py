"""What only a GPU can show: its kernels against PyTorch's eager code, bf16 runs against fp32, resume, export."""

import json

import pytest
import torch
from conftest import launch, medvlm
from test_attention import LENGTHS, MISTRAL, decoder, packed
from toy import LLAMA, make_recipe
from transformers import AutoConfig

from medvlm.models.kernels import (
    FLASH,
    Machine,
    apply_liger,
    attention_implementation,
    attention_obstacle,
    choose_attention,
    liger_loss,
)
from medvlm.objectives.language_modeling import linear_cross_entropy_sum

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU in this machine")
SHAPE = {"head_dim": 16}  # of the toy's four heads: flash kernels want a multiple of 8


@pytest.mark.parametrize("values", [SHAPE, {**MISTRAL, **SHAPE}], ids=["llama", "mistral-window"])
@pytest.mark.parametrize("name", [*FLASH, "varlen", "sdpa", "flex_attention"])
def test_packed_rows_equal_single_samples_in_bf16(name, values):
    machine = Machine.here(torch.bfloat16)
    reference = decoder(values, "eager").cuda()
    if reason := attention_obstacle(name, machine, reference.config):
        pytest.skip(f"{name}: {reason}")
    choice = choose_attention(name, machine, reference.config)
    model = decoder(values, attention_implementation(choice)).cuda()
    model.load_state_dict(reference.state_dict())
    for part in (model, reference):  # not .to(bf16), which would round the rotary frequencies too
        for p in part.parameters():
            p.data = p.data.bfloat16()
    embeds = torch.randn(1, sum(LENGTHS), 32, device="cuda", dtype=torch.bfloat16)
    alone = [reference(inputs_embeds=e, use_cache=False).last_hidden_state for e in embeds.split(LENGTHS, dim=1)]
    expected = torch.cat(alone, 1).float()
    found = packed(model, embeds).float()
    assert (found - expected).abs().mean() < 0.02 * expected.abs().mean()


def test_liger_computes_the_model_and_its_loss_as_pytorch_does():
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    plain, fused = decoder(SHAPE, "sdpa").cuda(), decoder(SHAPE, "sdpa").cuda()
    fused.load_state_dict(plain.state_dict())
    apply_liger(_as_causal(fused))
    embeds = torch.randn(2, 24, 32, device="cuda")
    a, b = (m(inputs_embeds=embeds, use_cache=False).last_hidden_state for m in (plain, fused))
    assert torch.allclose(a, b, atol=1e-4)
    weight = torch.randn(LLAMA["vocab_size"], 32, device="cuda", requires_grad=True)
    hidden = torch.randn(50, 32, device="cuda", requires_grad=True)
    targets = torch.randint(0, LLAMA["vocab_size"], (50,), device="cuda")
    losses = [loss(hidden, weight, targets) for loss in (linear_cross_entropy_sum, liger_loss)]
    grads = [torch.autograd.grad(loss, (hidden, weight)) for loss in losses]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5)
    assert all(torch.allclose(x, y, atol=1e-4) for x, y in zip(*grads, strict=True))


def _as_causal(decoder_model):
    """Liger patches a causal language model in place; the test compares its decoder."""
    from transformers import AutoModelForCausalLM

    values = {k: v for k, v in {**LLAMA, **SHAPE}.items() if k != "model_type"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **values))
    model.model = decoder_model
    return model


def losses(world, name: str, **options) -> list[float]:
    recipe = make_recipe(world, name, training__steps=6, model__init_from=str(world / "runs" / "init"), **options)
    launch(recipe, ranks=1)
    return [json.loads(line)["loss"] for line in (world / "runs" / name / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("zero", ["zero1", "zero2", "zero3", "zero3_offload"])
@pytest.mark.parametrize("padding_free", [False, True], ids=["padded", "padding-free"])
def test_bf16_losses_follow_those_of_fp32(world, zero, padding_free):
    """Six updates; bf16 has three significant digits, so the runs may part slowly but not at once."""
    exact = losses(world, f"exact-{zero}-{padding_free}", data__padding_free=padding_free)
    options = {"training__precision": "bf16", "training__zero": zero, "data__padding_free": padding_free}
    assert losses(world, f"bf16-{zero}-{padding_free}", **options) == pytest.approx(exact, rel=0.03)


def test_a_bf16_run_resumes_where_it_was_and_exports(world):
    options = {"training__steps": 6, "training__precision": "bf16"}
    whole = make_recipe(world, "gpu-whole", **options)
    launch(whole, ranks=1)
    broken = make_recipe(world, "gpu-broken", **options)
    launch(broken, "training.stop_after=3", ranks=1)
    launch(broken, "run.resume=require", ranks=1)
    rows = [(world / "runs" / name / "metrics.jsonl").read_text().splitlines() for name in ("gpu-whole", "gpu-broken")]
    first, second = ([json.loads(row)["loss"] for row in part] for part in rows)
    assert second == pytest.approx(first, rel=1e-3)
    result = json.loads(medvlm("export", world / "runs" / "gpu-whole", "--out", world / "gpu-export", "--json"))
    assert result["max_abs_logit_diff"] <= 1e-5
