"""Optimizers, schedules, groups, clipping and averages: published formulas by hand, torch.optim, plain PyTorch."""

import math
from pathlib import Path

import pytest
import torch
import transformers
from conftest import launch, medvlm
from plain import assert_same_run, metrics, plain_pytorch
from safetensors.torch import load_file
from toy import make_recipe

from medvlm.config.load import load_recipe
from medvlm.config.schema import RunConfig
from medvlm.models.build import build_components, build_model
from medvlm.models.trainable import apply_trainable
from medvlm.training import checkpoint
from medvlm.training.adamw_8bit import BLOCK, AdamW8bit, dequantize, dynamic_map, quantize
from medvlm.training.lion import Lion
from medvlm.training.optimizer import parameter_groups, rates
from medvlm.training.schedule import by_part, learning_rate_factor, learning_rates

# --- schedules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "reference", "options"),
    [
        ("cosine", "get_cosine_with_min_lr_schedule_with_warmup", {"min_lr_rate": 0.1}),
        ("linear", "get_linear_schedule_with_warmup", {}),
        ("constant", "get_constant_schedule_with_warmup", {}),
        ("warmup_stable_decay", "get_wsd_schedule", {"decay_type": "1-sqrt", "min_lr_ratio": 0.1}),
    ],
)
def test_schedules_equal_transformers_after_the_warm_up(shape, reference, options):
    """transformers' warm-up begins with a rate of 0, so that its first update does nothing; ours does not."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    lengths = {"num_warmup_steps": 5}
    if shape == "warmup_stable_decay":
        lengths |= {"num_training_steps": 50, "num_decay_steps": 10}
    elif shape != "constant":
        lengths |= {"num_training_steps": 50}
    theirs = getattr(transformers, reference)(optimizer, **lengths, **options).lr_lambdas[0]
    minimum = next((v for k, v in options.items() if k.startswith("min")), 0.0)
    for step in range(5, 50):
        assert learning_rate_factor(step, 50, 5, shape, minimum, 0.2) == pytest.approx(theirs(step)), step
    assert [learning_rate_factor(step, 50, 5, shape) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_a_run_without_warm_up_begins_at_the_peak():
    assert learning_rate_factor(0, 10, 0) == 1.0


# --- parameter groups ------------------------------------------------------------------------------------------------


def groups_of(folder: Path, **options) -> tuple[dict[str, dict], RunConfig]:
    """By parameter name its group, without DeepSpeed."""
    config = load_recipe(str(make_recipe(folder, "groups", **options)))
    parts = build_components(config.model)
    model = build_model(config.model, parts, torch.float32)
    apply_trainable(model, config.model, parts.unused)
    groups = parameter_groups(model, config)
    names = {id(p): name for name, p in model.named_parameters()}
    assert sum(len(g["params"]) for g in groups) == sum(p.requires_grad for p in model.parameters())
    return {names[id(p)]: g for g in groups for p in g["params"]}, config


def test_layer_decay_by_hand(world):
    """Two blocks: embeddings 0, blocks 1 and 2, final norm and output layer 3; 8e-3 * 0.5^(3 - depth)."""
    options = {"model__language_model__layer_decay": 0.5, "model__language_model__learning_rate": 8e-3}
    found, _ = groups_of(world, **options)
    expected = {
        "embed_tokens.weight": 1e-3,
        "layers.0.mlp.up_proj.weight": 2e-3,
        "layers.1.input_layernorm.weight": 4e-3,
        "norm.weight": 8e-3,
    }
    for name, rate in expected.items():
        assert found[f"language_model.model.{name}"]["lr"] == pytest.approx(rate)
    assert found["language_model.lm_head.weight"]["lr"] == pytest.approx(8e-3)
    assert found["multi_modal_projector.linear_1.weight"]["lr"] == 3e-3


def test_a_part_has_its_own_weight_decay_and_warm_up(world):
    options = {
        "model__vision_tower__weight_decay": 0.2,
        "model__vision_tower__warmup_steps": 4,
        "training__warmup_steps": 2,
        "training__steps": 10,
        "training__schedule": "constant",
    }
    found, config = groups_of(world, **options)
    assert found["vision_tower.encoder.layers.0.mlp.fc1.weight"]["weight_decay"] == 0.2
    assert found["vision_tower.encoder.layers.0.mlp.fc1.bias"]["weight_decay"] == 0.0
    assert found["language_model.lm_head.weight"]["weight_decay"] == 0.05
    groups = list({id(g): g for g in found.values()}.values())
    now = rates(groups, config, 10)
    second = by_part(now, learning_rates(1, 10, now, config.training))
    assert second == {"vision_tower": 3e-3 * 0.5, "multi_modal_projector": 3e-3, "language_model": 3e-3}


def test_muon_takes_hidden_matrices_only(world):
    found, _ = groups_of(world, training__optimizer={"name": "muon", "muon_learning_rate": 0.01})
    muon = {name for name, group in found.items() if group["muon"]}
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in muon
    assert "multi_modal_projector.linear_1.weight" in muon
    assert not [n for n in muon if "embed" in n or "norm" in n or "bias" in n or "lm_head" in n]
    assert {group["lr"] for name, group in found.items() if name in muon} == {0.01}


# --- Lion and 8-bit Adam ---------------------------------------------------------------------------------------------


def test_lion_by_hand():
    """Algorithm 2 of arXiv 2302.06675 in plain numbers."""
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = Lion([p], lr=0.1, betas=(0.9, 0.99), weight_decay=0.5)
    theta, m = [1.0, -2.0], [0.0, 0.0]
    for gradient in ([0.3, -0.1], [-2.0, 0.0], [0.1, 0.2]):
        p.grad = torch.tensor(gradient)
        optimizer.step()
        for i, g in enumerate(gradient):
            c = 0.9 * m[i] + 0.1 * g
            theta[i] -= 0.1 * (math.copysign(1, c) + 0.5 * theta[i])
            m[i] = 0.99 * m[i] + 0.01 * g
        assert p.tolist() == pytest.approx(theta)


def test_dynamic_map_has_the_values_of_the_paper():
    """Signed: 64 fractions in [0.1, 1], then 32 a decade lower, ...; 2 * 127 + 2 = 256 values."""
    signed, unsigned = dynamic_map(True), dynamic_map(False)
    assert len(signed) == len(unsigned) == 256 and signed[127] == unsigned[0] == 0 and signed[-1] == unsigned[-1] == 1
    assert signed.unique().numel() == unsigned.unique().numel() == 256
    assert signed[-2] == pytest.approx(1 - 0.9 / 64 / 2) and unsigned[-2] == pytest.approx(1 - 0.9 / 128 / 2)
    assert signed[128] == pytest.approx(0.55e-6) and int((signed > 0.1).sum()) == 65


@pytest.mark.parametrize("n", [BLOCK, 1000, 3 * BLOCK + 1])
def test_quantized_values_are_near_and_survive_a_second_time(n):
    values = torch.randn(n, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.linspace(-3, 3, n)
    book = dynamic_map(True)
    codes, scales = quantize(values, book)
    back = dequantize(codes, scales, book)
    largest = torch.nn.functional.pad(values.abs(), (0, -n % BLOCK)).view(-1, BLOCK).amax(1)
    assert torch.equal(scales, largest)
    # half of the widest gap between neighbours, relative to the largest value of the block
    assert bool(((back - values).abs() <= 0.5 * book.diff().max() * largest.repeat_interleave(BLOCK)[:n] * 1.001).all())
    assert torch.equal(quantize(back, book)[0], codes)


def test_8bit_adam_follows_adam_at_a_quarter_of_the_memory():
    torch.manual_seed(0)
    target, start = torch.randn(64, 300), torch.randn(64, 300)
    ends = []
    for make in (AdamW8bit, torch.optim.AdamW):
        p = torch.nn.Parameter(start.clone())
        optimizer = make([p], lr=0.02, weight_decay=0.01)
        for _ in range(100):
            p.grad = (p.detach() - target) * torch.linspace(0.1, 2, 300)
            optimizer.step()
        ends.append(p.detach())
        held = sum(v.nbytes for v in optimizer.state[p].values() if torch.is_tensor(v) and v.dim())
        assert (held < 2.05 * p.numel()) == (make is AdamW8bit)
    assert (ends[0] - ends[1]).norm() < 0.05 * (start - ends[1]).norm()


# --- two ranks beside plain PyTorch ----------------------------------------------------------------------------------


def recipe(world: Path, name: str, **options) -> Path:
    return make_recipe(world, name, model__init_from=str(world / "runs" / "init"), training__steps=6, **options)


def test_lion_on_two_ranks_equals_one_process(world):
    """The sign makes steps out of rounding errors of gradients near 0, hence the tolerance."""
    path = recipe(world, "lion", training__optimizer={"name": "lion"}, training__zero="zero3")
    launch(path)
    for row, plain in zip(metrics(world, "lion"), plain_pytorch(path, optimizer=Lion), strict=True):
        assert row["loss"] == pytest.approx(plain["loss"], rel=1e-3)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_8bit_adam_on_two_ranks_follows_adam(world, stage):
    path = recipe(world, f"8bit{stage}", training__optimizer={"name": "adamw_8bit"}, training__zero=f"zero{stage}")
    launch(path, "training.checkpoint_every=3")
    launch(path, f"run.name=8bit{stage}-resumed", "training.stop_after=3")
    launch(path, f"run.name=8bit{stage}-resumed")
    rows, expected = metrics(world, f"8bit{stage}"), plain_pytorch(path)
    for row, plain in zip(rows, expected, strict=True):
        assert row["loss"] == pytest.approx(plain["loss"], rel=0.02)
    assert [row["loss"] for row in rows] == [row["loss"] for row in metrics(world, f"8bit{stage}-resumed")]


def torch_muon(groups):
    """torch.optim.Muon for the matrices and AdamW for the rest, as one."""

    class Both(torch.optim.Optimizer):
        def __init__(self):
            super().__init__(groups, {})
            hidden, rest = ([g for g in self.param_groups if g["muon"] is m] for m in (True, False))
            self.inner = [torch.optim.Muon(hidden, momentum=0.95), torch.optim.AdamW(rest)]

        def step(self):
            for group, inner in zip(self.param_groups, self._groups(), strict=True):
                inner["lr"] = group["lr"]
            for optimizer in self.inner:
                optimizer.step()

        def _groups(self):
            by_params = {id(g["params"][0]): g for o in self.inner for g in o.param_groups}
            return [by_params[id(g["params"][0])] for g in self.param_groups]

    return Both()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_muon_on_two_ranks_equals_torch(world, stage):
    """With two micro-steps a step. Both orthogonalise in bf16 or fp16, hence the tolerance."""
    options = {
        "training__optimizer": {"name": "muon", "muon_learning_rate": 0.02},
        "training__gradient_clipping": None,
        "training__zero": f"zero{stage}",
    }
    path = recipe(world, f"muon{stage}", **options)
    launch(path, "training.gradient_clipping=null", TORCHDYNAMO_DISABLE="1")
    rows = metrics(world, f"muon{stage}")
    expected = plain_pytorch(path, optimizer=torch_muon, clip=lambda model: 0.0)
    for row, plain in zip(rows, expected, strict=True):
        assert row["loss"] == pytest.approx(plain["loss"], rel=2e-3)
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_muon_with_clipping_under_zero_is_refused(world):
    output = launch(recipe(world, "muon-clipped", training__optimizer={"name": "muon"}), ranks=1, fails=True)
    assert "set it to null with muon" in output and "Traceback" not in output


LIMITS = {"vision_tower": 0.1, "multi_modal_projector": 0.05}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_parts_with_settings_of_their_own_equal_plain_pytorch(world, stage):
    """Clipping by part before the global norm, layer decay, weight decay and warm-up by part, and an average."""
    options = {f"model__{part}__gradient_clipping": limit for part, limit in LIMITS.items()}
    options |= {
        "model__vision_tower__layer_decay": 0.7,
        "model__vision_tower__warmup_steps": 3,
        "model__language_model__weight_decay": 0.3,
        "training__schedule": "linear",
        "training__ema_decay": 0.6,
        "training__zero": f"zero{stage}",
    }
    path = recipe(world, f"parts{stage}", **options)
    launch(path)
    average: dict[str, torch.Tensor] = {}
    norms = []

    def clip(model) -> float:
        norms.append({})
        for part in ("vision_tower", "multi_modal_projector", "language_model"):
            own = [p for p in getattr(model, part).parameters() if p.grad is not None]
            limit = LIMITS.get(part, math.inf)
            norms[-1][part] = float(torch.nn.utils.clip_grad_norm_(own, limit))
        return float(torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0))

    def after(model) -> None:
        for name, p in model.named_parameters():
            average[name] = p.detach().clone() if name not in average else 0.6 * average[name] + 0.4 * p.detach()

    config = load_recipe(str(path))
    parts = build_components(config.model)
    model = build_model(config.model, parts, torch.float32)
    apply_trainable(model, config.model, parts.unused)
    groups = parameter_groups(model, config)

    def by_hand(step: int) -> list[float]:
        factors = {3: [1 / 3, 2 / 3, 1, 1, 2 / 3, 1 / 3], 1: [1, 1, 4 / 5, 3 / 5, 2 / 5, 1 / 5]}
        return [g["lr"] * factors[3 if g["name"] == "vision_tower" else 1][step] for g in groups]

    expected = plain_pytorch(path, clip=clip, rates=by_hand, after=after)
    rows = metrics(world, f"parts{stage}")
    assert_same_run(rows, expected)
    for row, plain in zip(rows, norms, strict=True):
        assert row["grad_norms"] == pytest.approx(plain, rel=1e-4)
    held = checkpoint.consolidate(checkpoint.newest(world / "runs" / f"parts{stage}"), ema=True)
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(held[name], average[name], rtol=0, atol=1e-4)
    assert any(n["vision_tower"] > 0.1 for n in norms) and any(n["multi_modal_projector"] > 0.05 for n in norms)


def test_the_average_survives_an_interruption_and_another_number_of_ranks(world, tmp_path):
    options = {
        "training__ema_decay": 0.8,
        "model__language_model__train": "lora",
        "model__language_model__lora": {"dropout": 0.0},  # it is drawn anew on each rank
    }
    path = recipe(world, "average", **options)
    launch(path)
    broken = recipe(world, "average-broken", **options)
    launch(broken, "training.stop_after=3")
    launch(broken, "training.zero=zero2", "training.micro_batch_size=4", ranks=1)
    whole, resumed = (
        checkpoint.consolidate(checkpoint.newest(world / "runs" / name), ema=True)
        for name in ("average", "average-broken")
    )
    weights = checkpoint.consolidate(whole.path)
    moved = "multi_modal_projector.linear_1.weight"
    for name in whole:
        torch.testing.assert_close(whole[name], resumed[name], rtol=0, atol=1e-4)
        trains = "lora_" in name or name.startswith(("vision_tower", "multi_modal"))
        assert trains or torch.equal(whole[name], weights[name])
    assert not torch.equal(
        whole["multi_modal_projector.linear_1.weight"], weights["multi_modal_projector.linear_1.weight"]
    )
    output = medvlm("export", world / "runs" / "average", "--out", tmp_path / "hf", "--ema")
    assert "max_abs_logit_diff" in output
    assert torch.equal(load_file(tmp_path / "hf" / "model.safetensors")[moved], whole[moved])
    assert "no moving average" in medvlm(
        "export", world / "runs" / "init", "--out", tmp_path / "none", "--ema", status=2
    )
