"""Variable-length attention against transformers' own, sample by sample; which one is taken, and why."""

import inspect

import pytest
import torch
from toy import LLAMA, make_recipe, make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from medvlm.config.load import load_recipe
from medvlm.errors import UserError
from medvlm.models import attention
from medvlm.models.build import build_components, build_model
from medvlm.models.kernels import Machine, attention_implementation, choose_attention

LENGTHS = (7, 1, 12, 4)
MISTRAL = {"model_type": "mistral", "sliding_window": 5}
GEMMA2 = {"model_type": "gemma2", "sliding_window": 5, "head_dim": 8}


def decoder(values: dict, implementation: str):
    values = {**LLAMA, **values}
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation).get_decoder()


def packed(model, embeds: torch.Tensor, lengths=LENGTHS) -> torch.Tensor:
    edges = torch.tensor([0, *lengths]).cumsum(0).int()
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    longest = {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    segments = {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, **longest}
    return model(inputs_embeds=embeds, position_ids=positions, use_cache=False, **segments).last_hidden_state


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({}, "varlen"),
        ({}, "sdpa"),
        ({}, "eager"),
        (MISTRAL, "varlen"),
        (MISTRAL, "sdpa"),
        ({"model_type": "qwen2"}, "varlen"),
        ({"model_type": "qwen3", "head_dim": 8}, "varlen"),
        ({"model_type": "phi3", "pad_token_id": 0}, "varlen"),
        (GEMMA2, "eager"),
    ],
    ids=lambda v: v if isinstance(v, str) else v.get("model_type", "llama"),
)
def test_packed_rows_equal_single_samples_forward_and_backward(values, name):
    """The reference is transformers' eager attention over each sample alone: grouped heads, windows, soft caps."""
    reference = decoder(values, "eager")
    assert choose_attention(name, Machine(), reference.config).name == name
    model = decoder(values, attention.VARLEN if name == "varlen" else name)
    model.load_state_dict(reference.state_dict())
    torch.manual_seed(1)
    embeds = torch.randn(1, sum(LENGTHS), 32, requires_grad=True)
    weight = torch.randn(1, sum(LENGTHS), 32)
    alone = [reference(inputs_embeds=e, use_cache=False).last_hidden_state for e in embeds.split(LENGTHS, dim=1)]
    expected = torch.autograd.grad((torch.cat(alone, 1) * weight).sum(), embeds)[0]
    found = packed(model, embeds)
    assert torch.allclose(found, torch.cat(alone, 1), atol=2e-6)
    assert torch.allclose(torch.autograd.grad((found * weight).sum(), embeds)[0], expected, atol=2e-5)


def test_padded_rows_equal_sdpa():
    model, reference = decoder({}, attention.VARLEN), decoder({}, "sdpa")
    model.load_state_dict(reference.state_dict())
    embeds, mask = torch.randn(2, 6, 32), torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])
    options = {"inputs_embeds": embeds, "attention_mask": mask, "use_cache": False}
    assert torch.equal(model(**options).last_hidden_state, reference(**options).last_hidden_state)


def test_nothing_leaks_in_silence(tmp_path):
    make_tokenizer(tmp_path / "tokenizer")
    config = load_recipe(str(make_recipe(tmp_path)))
    model = build_model(config.model, build_components(config.model), torch.float32)
    ids, none = torch.randint(5, 250, (1, 9)), torch.zeros(0, 3, 32, 32, dtype=torch.uint8)
    positions, edges = torch.tensor([[*range(4), *range(5)]]), torch.tensor([0, 4, 9], dtype=torch.int32)
    with pytest.raises(ValueError, match="no attention mask"):
        model(ids, ids, none, torch.ones(1, 9).long(), positions)
    with pytest.raises(ValueError, match="no attention mask"):
        model.hidden_states(ids, none, torch.ones(1, 9).long(), cu_seqlens=edges)
    with pytest.raises(TypeError, match="use_cache"):
        model(ids, ids, none, position_ids=positions, use_cache=True)
    inner, segments = model.language_model.get_decoder(), {"cu_seq_lens_q": edges, "max_length_q": 5}
    with pytest.raises(ValueError, match="use_cache=False"):  # transformers' default
        inner(input_ids=ids, position_ids=positions, **segments)
    with pytest.raises(ValueError, match="no attention mask and no cache"):
        inner(input_ids=ids, position_ids=positions, use_cache=False, attention_mask=torch.ones(1, 9), **segments)
    with pytest.raises(ValueError, match="neither a mask nor the edges"):
        inner(input_ids=ids, position_ids=positions, use_cache=False)
    # positions alone are enough: their restarts are the edges
    assert torch.equal(
        model.hidden_states(ids, none, position_ids=positions),
        model.hidden_states(ids, none, position_ids=positions, cu_seqlens=edges, max_seqlen=5),
    )


def test_layers_with_a_state_are_not_packed(tmp_path):
    make_tokenizer(tmp_path / "tokenizer")
    config = load_recipe(str(make_recipe(tmp_path)))
    model = build_model(config.model, build_components(config.model), torch.float32)
    model.language_model.config.layer_types = ["linear_attention", "full_attention"]
    none = torch.zeros(0, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(UserError, match="linear_attention layers carry a state"):
        model.hidden_states(torch.ones(1, 4).long(), none, position_ids=torch.tensor([[0, 1, 0, 1]]))


def flash_like(query, key, value, edges, window, scale):
    """What flash attention documents: ``window`` tokens before the current one, -1 for all of them."""
    return attention.sdpa_segments(query, key, value, edges, scale, None if window == -1 else window + 1)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("grouped", ["enable_gqa", "repeated"])
def test_the_gpu_call_follows_the_signature_that_torch_has(monkeypatch, window, grouped):
    def newer(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
        assert enable_gqa and k.shape[1] == 2 and window_size[1] == 0
        return flash_like(q, k, v, cu_q, window_size[0], scale)

    def older(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        assert k.shape[1] == q.shape[1] and window_size[1] == 0
        return flash_like(q, k, v, cu_q, window_size[0], scale)

    chosen = newer if grouped == "enable_gqa" else older
    monkeypatch.setattr(attention, "varlen_attn", chosen)
    monkeypatch.setattr(attention, "KNOWN", inspect.signature(chosen).parameters)
    torch.manual_seed(0)
    query, key, value = torch.randn(24, 4, 8), torch.randn(24, 2, 8), torch.randn(24, 2, 8)
    edges = torch.tensor([0, 7, 8, 20, 24], dtype=torch.int32)
    found = attention.flash_segments(query, key, value, edges, 12, 0.3, window)
    assert torch.allclose(found, attention.sdpa_segments(query, key, value, edges, 0.3, window), atol=1e-6)


def test_a_varlen_attn_that_cannot_say_it_is_refused():
    with pytest.raises(NotImplementedError, match="window_size"):
        attention.varlen_options({"is_causal": 0, "scale": 0}, 0.3, 5, False)
    with pytest.raises(NotImplementedError, match="no scale"):
        attention.varlen_options({"is_causal": 0}, 0.3, None, False)
    assert attention.varlen_options({"is_causal": 0, "scale": 0}, 0.3, None, True) == {"is_causal": True, "scale": 0.3}


ALL = frozenset({"flash_attention_2", "flash_attention_3", "flash_attention_4", "varlen"})


@pytest.mark.parametrize(
    ("machine", "values", "expected", "reason"),
    [
        (Machine(), {}, "varlen", ""),
        (Machine(), GEMMA2, "eager", "varlen: gemma2 caps its attention scores; sdpa: gemma2 does not support SDPA"),
        (Machine(True, (9, 0), True, ALL), {}, "flash_attention_3", ""),
        (Machine(True, (10, 0), True, ALL), {}, "flash_attention_4", ""),
        (Machine(True, (8, 0), True, ALL), {}, "flash_attention_2", ""),
        (Machine(True, (9, 0), True, ALL), GEMMA2, "flash_attention_3", ""),
        (Machine(True, (10, 0), True, ALL), GEMMA2, "flash_attention_2", "flash_attention_4: its soft cap is untried"),
        (Machine(True, (9, 0), True, frozenset({"varlen"})), {}, "varlen", "flash_attention_3: flash-attn-3 is not"),
        (Machine(True, (9, 0), False, ALL), {}, "sdpa", "varlen: needs a bf16 run"),
        (Machine(True, (7, 5), True, ALL), {}, "sdpa", "flash_attention_2: needs compute capability 8.0"),
        (Machine(True, (8, 0), True, frozenset({"varlen"})), {"head_dim": 12}, "sdpa", "heads of 12 are not"),
        (Machine(True, (8, 0), True, frozenset({"varlen"})), {"attention_dropout": 0.1}, "sdpa", "has no dropout"),
        (Machine(True, (9, 0), True, frozenset({"varlen"})), GEMMA2, "flex_attention", "sdpa: gemma2 does not"),
    ],
)
def test_auto_takes_the_best_that_works_and_says_why(machine, values, expected, reason):
    values = {**LLAMA, **values}
    choice = choose_attention("auto", machine, AutoConfig.for_model(values.pop("model_type"), **values))
    assert choice.name == expected
    assert reason in choice.line("attention")
    assert attention_implementation(choice) == (attention.VARLEN if expected == "varlen" else expected)


@pytest.mark.parametrize(
    ("name", "values", "reason"),
    [
        ("flash_attention_2", {}, "needs a GPU"),
        ("flex_attention", {}, "no backward pass on a CPU"),
        ("varlen", GEMMA2, "caps its attention scores"),
        ("sdpa", GEMMA2, "does not support SDPA"),
        ("varlen", {"model_type": "falcon"}, "takes no registered attention"),
    ],
)
def test_what_cannot_compute_the_model_is_refused(name, values, reason):
    values = {**LLAMA, **values}
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with pytest.raises(UserError, match=f"model.attention: {name}: .*{reason}"):
        choose_attention(name, Machine(), config)


def test_the_vision_tower_attends_by_the_kernel_that_transformers_chooses(tmp_path):
    make_tokenizer(tmp_path / "tokenizer")
    config = load_recipe(str(make_recipe(tmp_path)))
    model = build_model(config.model, build_components(config.model), torch.float32)
    assert model.vision_tower.config._attn_implementation == "sdpa"
