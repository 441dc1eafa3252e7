"""The chunked loss against the full one, also under ZeRO-3; Liger's kernels by fakes, as they need a GPU."""

import sys
import types

import pytest
import torch
from conftest import two_ranks
from torch.utils._python_dispatch import TorchDispatchMode
from toy import LLAMA, SIGLIP, make_recipe, make_tokenizer
from transformers import AutoConfig

from medvlm.config.load import load_recipe
from medvlm.errors import UserError
from medvlm.models import kernels
from medvlm.models.build import build_components, build_model, build_plain_model
from medvlm.models.kernels import Machine, choose_kernels
from medvlm.objectives.language_modeling import linear_cross_entropy_sum, token_cross_entropy_sum

GPU = Machine(True, (9, 0), True, frozenset({"liger"}))


def llama(**values):
    values = {**LLAMA, **values}
    return AutoConfig.for_model(values.pop("model_type"), **values)


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("frozen", [None, "weight", "hidden"])
def test_chunked_loss_and_gradients_equal_the_full_ones(chunk, frozen):
    torch.manual_seed(0)
    inputs = {"hidden": torch.randn(30, 16), "weight": torch.randn(50, 16), "bias": torch.randn(50)}
    wanted = [v.requires_grad_() for name, v in inputs.items() if name != frozen]
    targets = torch.randint(0, 50, (30,))
    full = token_cross_entropy_sum(torch.nn.functional.linear(*inputs.values()), targets)
    expected = torch.autograd.grad(full * 0.37, wanted)
    loss = linear_cross_entropy_sum(inputs["hidden"], inputs["weight"], targets, inputs["bias"], chunk)
    assert float(loss) == pytest.approx(float(full), rel=1e-6)
    for found, plain in zip(torch.autograd.grad(loss * 0.37, wanted), expected, strict=True):
        assert torch.allclose(found, plain, rtol=1e-6, atol=1e-6)


def test_bf16_gradients_are_about_as_near_to_fp32_as_the_full_loss_has_them():
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(200, 64), torch.randn(300, 64) / 8, torch.randint(0, 300, (200,))

    def gradient(dtype, loss):
        leaf = weight.to(dtype).requires_grad_()
        return torch.autograd.grad(loss(hidden.to(dtype), leaf), leaf)[0].float()

    full = lambda h, w: token_cross_entropy_sum(h @ w.T, targets)  # noqa: E731
    exact = gradient(torch.float32, full)
    error = (gradient(torch.bfloat16, full) - exact).norm()
    chunked = gradient(torch.bfloat16, lambda h, w: linear_cross_entropy_sum(h, w, targets, chunk=16))
    assert (chunked - exact).norm() < 1.3 * error  # 13 chunks, each rounded once; measured 1.18


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("grad", [True, False])
def test_full_logits_are_never_allocated(grad):
    hidden, weight = torch.randn(1000, 8, requires_grad=grad), torch.randn(500, 8, requires_grad=grad)
    targets = torch.randint(0, 500, (1000,))
    with Largest() as largest, torch.set_grad_enabled(grad):
        loss = linear_cross_entropy_sum(hidden, weight, targets, chunk=20)
        if grad:
            loss.backward()
    assert largest.elements == 20 * 500
    with Largest() as largest:
        token_cross_entropy_sum(hidden @ weight.T, targets)
    assert largest.elements == 1000 * 500, "the comparison must be able to fail"


def test_no_supervised_token_gives_zero_gradients():
    hidden, weight = torch.randn(0, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    loss = linear_cross_entropy_sum(hidden, weight, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert float(loss) == 0 and weight.grad is not None and not weight.grad.any()


def test_ranks_with_different_numbers_of_chunks_equal_one_process_under_zero3(tmp_path):
    """Tied and untied output layers; rank 0 has three chunks, rank 1 none in one step and one in the next."""
    script = """
        import json, torch
        from transformers import LlamaConfig, LlamaForCausalLM
        from medvlm.models import vision_language_model as vlm
        from medvlm.objectives import language_modeling as lm
        from medvlm.training import distributed

        distributed.start()
        rank = distributed.rank()
        vlm.OutputHead.loss = staticmethod(lambda h, w, t, b: lm.linear_cross_entropy_sum(h, w, t, b, chunk=4))

        class Text(torch.nn.Module):
            def __init__(self, tied):
                super().__init__()
                torch.manual_seed(0)
                self.llama = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                    num_attention_heads=2, vocab_size=96, tie_word_embeddings=tied, initializer_range=0.2))
                self.head = [self.llama.lm_head]

            def forward(self, ids, supervised):
                hidden = self.llama.model(input_ids=ids, use_cache=False).last_hidden_state[0]
                targets = ids[0].roll(-1)[:supervised]
                return self.head[0](hidden[:supervised], targets) if self.chunked else \\
                    lm.token_cross_entropy_sum(self.head[0](hidden[:supervised]), targets)

        def run(tied):
            whole, sharded = Text(tied), Text(tied)
            whole.chunked, sharded.chunked = False, True
            sharded.llama.lm_head.__class__ = vlm.OutputHead
            rates = {"lr": 0.02}
            plain = torch.optim.SGD(whole.parameters(), **rates)
            config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3,
                      "stage3_param_persistence_threshold": 0}, "zero_allow_untested_optimizer": True,
                      "gradient_clipping": 0.0}
            engine, *_ = distributed.deepspeed.initialize(
                model=sharded, optimizer=torch.optim.SGD(sharded.parameters(), **rates), config=config)
            rows = []
            for step in range(3):
                torch.manual_seed(step)
                ids = torch.randint(0, 96, (2, 1, 16))
                counts = [12, 0 if step == 0 else 3]
                plain.zero_grad()
                expected = sum(whole(ids[r], counts[r]) for r in range(2)) / 15
                expected.backward()
                plain.step()
                loss = engine(ids[rank], counts[rank])
                engine.backward(loss * (2 / 15))
                engine.step()
                mean = distributed.sum_over_ranks([float(loss)])[0] / 15
                rows.append([mean, float(expected)])
            return rows

        print(json.dumps({"untied": run(False), "tied": run(True)}), flush=True)
    """
    for row in two_ranks(script, tmp_path):
        for tied in ("untied", "tied"):
            for found, expected in row[tied]:
                assert found == pytest.approx(expected, rel=1e-6)
            assert row[tied][2][0] != row[tied][1][0]


def test_liger_is_taken_where_it_works_and_its_absence_is_said():
    assert choose_kernels("auto", GPU, llama()).line("kernels") == "kernels: liger"
    assert "Liger needs a GPU" in choose_kernels("auto", Machine(), llama()).line("kernels")
    without = Machine(True, (9, 0), True)
    assert "liger-kernel is not installed" in choose_kernels("auto", without, llama()).line("kernels")
    assert choose_kernels("torch", GPU, llama()).line("kernels") == "kernels: torch"
    assert "no kernels for opt" in choose_kernels("auto", GPU, AutoConfig.for_model("opt")).line("kernels")
    with pytest.raises(UserError, match="liger: Liger needs a GPU"):
        choose_kernels("liger", Machine(), llama())


def fake_liger(monkeypatch, calls: list) -> None:
    def patch(rope=True, cross_entropy=False, fused_linear_cross_entropy=True, rms_norm=True, swiglu=True, model=None):
        calls.append({"model": model, "rope": rope, "swiglu": swiglu, "loss": fused_linear_cross_entropy})

    def loss(hidden, weight, targets, bias=None, *, reduction, accum_dtype):
        calls.append((reduction, accum_dtype))
        return linear_cross_entropy_sum(hidden, weight, targets, bias)

    package, inner = types.ModuleType("liger_kernel"), types.ModuleType("liger_kernel.transformers")
    inner.monkey_patch = types.SimpleNamespace(MODEL_TYPE_TO_APPLY_LIGER_FN={"llama": patch})
    functional = types.ModuleType("liger_kernel.transformers.functional")
    functional.liger_fused_linear_cross_entropy = loss
    for module in (package, inner, functional):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def test_liger_patches_this_model_and_makes_its_loss(monkeypatch, tmp_path):
    calls: list = []
    fake_liger(monkeypatch, calls)
    monkeypatch.setattr(Machine, "here", staticmethod(lambda dtype: GPU))
    make_tokenizer(tmp_path / "tokenizer")
    config = load_recipe(str(make_recipe(tmp_path, model__attention="sdpa")))
    model = build_model(config.model, build_components(config.model), torch.float32)
    assert model.choices == ("attention: sdpa", "kernels: liger")
    assert calls == [{"model": model.language_model, "rope": True, "swiglu": True, "loss": False}]
    ids, none = torch.randint(5, 250, (1, 9)), torch.zeros(0, 3, SIGLIP["image_size"], 32, dtype=torch.uint8)
    model(ids, ids, none).backward()
    assert calls[1:] == [("sum", torch.float32)]
    with torch.no_grad():
        model(ids, ids, none)
    assert len(calls) == 2, "Liger makes gradients in its forward pass: evaluation must not"


def test_export_builds_on_the_cpu_whatever_the_recipe_asks_of_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(Machine, "here", staticmethod(lambda dtype: GPU))
    make_tokenizer(tmp_path / "tokenizer")
    options = {"model__attention": "flash_attention_2", "model__kernels": "liger"}
    config = load_recipe(str(make_recipe(tmp_path, **options)))
    parts = build_components(config.model)
    with pytest.raises(UserError, match="flash-attn is not installed"):
        build_model(config.model, parts, torch.float32)
    assert build_plain_model(config.model, parts).choices == ("attention: varlen", "kernels: torch")


def test_liger_leaves_what_its_kernels_do_not_compute(monkeypatch):
    calls: list = []
    fake_liger(monkeypatch, calls)
    partial = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    kernels.apply_liger(types.SimpleNamespace(config=llama(hidden_act="gelu", rope_parameters=partial)))
    assert not calls[0]["swiglu"] and not calls[0]["rope"]
