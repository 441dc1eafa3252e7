"""Dual encoders on two ranks: batch normalisation over all rows, and every ZeRO stage, against plain PyTorch."""

import json

import pytest
import torch
from conftest import two_ranks
from dual_toy import BERT, CLIP_TEXT, RESNET, SIGLIP_TEXT, dual_values
from toy import CLIP, SIGLIP
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

import medvlm.models.backbones  # noqa: F401  (registers SigLIP's text tower)
from medvlm.config.model import DualEncoder
from medvlm.config.objective import Objective
from medvlm.models.batch_norm import BatchNorm2d
from medvlm.models.build_dual_encoder import build_components, build_model
from medvlm.objectives.info_nce import info_nce

CONV = {"kind": "conv", "norm": "batch", "prior_image": {"width": 16, "layers": 2, "heads": 2}}
VARIANTS = {
    "biovil_t": (RESNET, BERT, {"vision_head": CONV, "text_head": {"kind": "mlp", "norm": "layer"}}, True),
    "siglip": (SIGLIP, SIGLIP_TEXT, {"text_tower__pooling": "pooler"}, False),
    "clip": (CLIP, CLIP_TEXT, {"text_tower__pooling": "pooler", "vision_tower__pooling": "mean"}, False),
}


def test_batch_norm_on_two_ranks_is_batch_norm_on_all_rows(tmp_path):
    """Three rows here and two there; a pass without gradients, and a frozen layer, leave no trace."""
    torch.manual_seed(0)
    x, upstream = torch.randn(5, 4, 3, 3) * 2 + 1, torch.randn(5, 4, 3, 3)
    norm = torch.nn.BatchNorm2d(4)
    torch.nn.init.uniform_(norm.weight), torch.nn.init.uniform_(norm.bias)
    torch.save({"x": x, "upstream": upstream, "state": norm.state_dict()}, tmp_path / "given.pt")
    two_ranks(
        f"""
        import torch
        from medvlm.models.batch_norm import BatchNorm2d
        from medvlm.training import distributed
        distributed.start()
        given, rank = torch.load("{tmp_path}/given.pt"), distributed.rank()
        mine = slice(0, 3) if rank == 0 else slice(3, 5)
        norm = BatchNorm2d(4)
        norm.load_state_dict(given["state"])
        x = given["x"][mine].requires_grad_()
        with torch.no_grad():
            first = norm(x)
        assert float(norm.running_mean.abs().max()) == 0 and int(norm.num_batches_tracked) == 0
        y = norm(x)
        assert torch.equal(first, y)
        y.backward(given["upstream"][mine])
        found = {{"y": y.detach(), "x": x.grad, "weight": norm.weight.grad, "bias": norm.bias.grad,
                  "state": {{k: v.clone() for k, v in norm.state_dict().items()}}}}
        norm.requires_grad_(False)
        frozen = norm(x)
        for key, value in norm.state_dict().items():
            assert torch.equal(value, found["state"][key])
        norm.eval()
        assert torch.equal(frozen, norm(x))
        torch.save(found, f"{tmp_path}/found-{{rank}}.pt")
        """,
        tmp_path,
    )
    found = [torch.load(tmp_path / f"found-{rank}.pt") for rank in range(2)]
    x.requires_grad_()
    y = norm(x)
    y.backward(upstream)
    torch.testing.assert_close(torch.cat([f["y"] for f in found]), y.detach())
    torch.testing.assert_close(torch.cat([f["x"] for f in found]), x.grad)
    for name in ("weight", "bias"):
        torch.testing.assert_close(sum(f[name] for f in found), getattr(norm, name).grad)
    for name, value in norm.state_dict().items():
        torch.testing.assert_close(found[0]["state"][name], value)
        assert torch.equal(found[0]["state"][name], found[1]["state"][name]), "ranks must agree to the bit"


@pytest.mark.parametrize(("dtype", "bytes_"), [(torch.float32, 4), (torch.bfloat16, 2)])
@pytest.mark.parametrize("fixed", [False, True])
def test_batch_norm_keeps_its_input_alone_for_the_backward_pass(dtype, bytes_, fixed):
    kept = []
    norm = BatchNorm2d(4).to(dtype)
    norm.fixed = fixed
    x = torch.randn(3, 4, 16, 16, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes), lambda t: t):
        norm(x)
    assert x.numel() * bytes_ <= sum(kept) < 1.1 * x.numel() * bytes_


def batch(parts, masked, rows):
    """Rows of four pairs, of which only the last has a prior image."""
    generator = torch.Generator().manual_seed(5)
    texts = ["no effusion", "the heart is enlarged new left effusion", "normal lung", "stable small effusion"]
    ids = parts.tokenizer(texts, padding=True, return_tensors="pt")
    values = {
        "pixel_values": torch.randint(0, 256, (4, 1, 32, 32), generator=generator).byte(),
        "input_ids": ids["input_ids"],
        "attention_mask": ids["attention_mask"],
    }
    if masked:
        values["masked_ids"] = ids["input_ids"].clone()
        values["masked_labels"] = torch.full_like(ids["input_ids"], -100)
        values["masked_ids"][1, 2:4], values["masked_labels"][1, 2:4] = 2, ids["input_ids"][1, 2:4]
        values["prior_pixel_values"] = torch.randint(0, 256, (4, 3, 32, 32), generator=generator).byte()
        values["has_prior"] = torch.tensor([False, False, False, True])
    return {name: value[rows] for name, value in values.items()}


def loss_of(found):
    return info_nce(found["image"], found["text"], found["scale"]) + 0.05 * found.get("masked_loss", 0)


def still(model):
    """In training mode, without what is random."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "probability"):
            module.probability = 0.0
    return model.train()


@pytest.fixture(scope="module")
def plain(request, tmp_path_factory):
    """Pretrained towers in folders, and the gradients of one process with the whole batch."""
    folder = tmp_path_factory.mktemp(request.param)
    vision, text, overrides, masked = VARIANTS[request.param]
    torch.manual_seed(0)
    for name, values, auto in (
        ("vision", vision, AutoModel),
        ("text", text, AutoModelForMaskedLM if masked else AutoModel),
    ):
        rest = {k: v for k, v in values.items() if k != "model_type"}
        auto.from_config(AutoConfig.for_model(values["model_type"], **rest)).save_pretrained(folder / name)
    values = dual_values(folder, vision, text, **overrides)
    for name, tower in (("vision", "vision_tower"), ("text", "text_tower")):
        values[tower] = {**values[tower], "config": None, "path": str(folder / name)}
    (folder / "model.json").write_text(json.dumps(values))
    config = DualEncoder.model_validate(values)
    parts = build_components(config, Objective(masked_language_modeling={} if masked else None))
    model = still(build_model(config, parts, torch.float32))
    loss_of(model(**batch(parts, masked, slice(0, 4)))).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    unused = {f"{part}.{name}" for part, names in parts.unused.items() for name in names}
    assert gradients.keys() == {name for name, _ in model.named_parameters()} - unused
    torch.save({"gradients": gradients, "buffers": dict(model.named_buffers())}, folder / "plain.pt")
    return folder, masked


@pytest.mark.parametrize(
    ("plain", "stage"),
    [("biovil_t", 0), ("biovil_t", 1), ("biovil_t", 2), ("biovil_t", 3), ("siglip", 3), ("clip", 3)],
    indirect=["plain"],
    scope="module",
)
def test_gradients_of_two_ranks_equal_plain_pytorch(plain, stage):
    """Three pairs on one rank and one on the other, by the parameters after a step of plain gradient descent."""
    folder, masked = plain
    rows = two_ranks(
        f"""
        import json, sys, torch
        sys.path.insert(0, "{__file__.rpartition("/")[0]}")
        from test_dual_encoder_ranks import batch, loss_of, still
        from medvlm.config.model import DualEncoder
        from medvlm.config.objective import Objective
        from medvlm.models.build_dual_encoder import build_components, build_model
        from medvlm.training import distributed
        distributed.start()
        config = DualEncoder.model_validate(json.load(open("{folder}/model.json")))
        parts = build_components(config, Objective(masked_language_modeling={{}} if {masked} else None))
        zero = {{"stage": {stage}}} | ({{"stage3_param_persistence_threshold": 0}} if {stage} == 3 else {{}})
        settings = {{"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero,
                     "zero_allow_untested_optimizer": True, "gradient_clipping": 0.0}}
        model = still(build_model(config, parts, torch.float32, settings))
        if {stage} == 3:
            assert any(p.numel() == 0 for p in model.vision_tower.parameters()), "towers are born sharded"
        for part, names in parts.unused.items():
            for name, p in getattr(model, part).named_parameters():
                p.requires_grad_(name not in names)
        names = {{name: p for name, p in model.named_parameters()}}

        def full():
            with distributed.deepspeed.zero.GatheredParameters(list(names.values()), enabled={stage} == 3):
                return {{name: p.detach().clone() for name, p in names.items()}}

        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        engine, *_ = distributed.deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        before = full()
        mine = slice(0, 3) if distributed.rank() == 0 else slice(3, 4)
        loss = loss_of(engine(**batch(parts, {masked}, mine)))
        engine.backward(2 * loss)  # DeepSpeed averages over ranks what here is a sum
        engine.step()
        after = full()
        given = torch.load("{folder}/plain.pt")
        largest = max(float(g.abs().max()) for g in given["gradients"].values())
        worst = {{}}
        for name in names:
            expected = given["gradients"].get(name)
            moved = before[name] - after[name]
            difference = moved if expected is None else moved - expected.view_as(moved)
            worst[name] = float(difference.abs().max()) / largest
        name = max(worst, key=worst.get)
        buffers = max((float((b - given["buffers"][n]).abs().max()) for n, b in model.named_buffers()
                       if "running" in n), default=0.0)
        print(json.dumps({{"name": name, "worst": worst[name], "largest": largest, "buffers": buffers}}), flush=True)
        """,
        folder,
    )
    for row in rows:
        assert row["worst"] < 2e-5 and row["largest"] > 1e-3, row
        assert row["buffers"] < 1e-5, row
