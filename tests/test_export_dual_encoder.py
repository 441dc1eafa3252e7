"""Exports of dual encoders, each loaded by a fresh process through unmodified transformers."""

import ast
import json
import math

import pytest
import torch
from conftest import REPO, launch, medvlm
from dual_toy import BERT, CLIP_TEXT, RESNET, SIGLIP_TEXT, SWIN, VIT, dual_config
from dual_world import make_pairs, pairs_recipe
from safetensors.torch import load_file
from toy import CLIP, SIGLIP, make_recipe, make_tokenizer
from transformers import AutoModel

from medvlm.config.load import load_recipe
from medvlm.config.model import VisionTower
from medvlm.config.objective import Objective
from medvlm.errors import UserError
from medvlm.export.dual_encoder import Trained, answers, compare, not_expressible, write_folder
from medvlm.inference.embed import Embedder
from medvlm.models import build
from medvlm.models.backbones import backbone_config, load_tower
from medvlm.models.build_dual_encoder import build_components, build_model
from medvlm.models.joint_space import Similarity
from medvlm.training.checkpoint.fragments import persistent_buffers

pytestmark = pytest.mark.usefixtures("forked_proof")

POOLED = {"text_tower__pooling": "pooler"}
NO_HEADS = {"vision_head__kind": "none", "text_head__kind": "none", "embedding_dim": 32}
PRIOR = {"kind": "conv", "norm": "batch", "bias": True, "prior_image": {"width": 16, "layers": 1, "heads": 2}}
MLP = {"kind": "mlp", "activation": "gelu", "norm": "layer"}
VARIANTS = {
    "clip": (CLIP, CLIP_TEXT, POOLED, "CLIPModel"),
    "siglip": (SIGLIP, SIGLIP_TEXT, {**POOLED, **NO_HEADS, "similarity__bias": -10.0}, "SiglipModel"),
    "vit-bert": (VIT, BERT, POOLED, "VisionTextDualEncoderModel"),
    "convirt": (RESNET, BERT, {"vision_head": MLP, "text_head": MLP, "text_tower__pooling": "max"}, "DualEncoder"),
    "medclip": (SWIN, BERT, {"text_tower__pooling": "mean", "text_tower__pooling_layers": [1, 2, -1]}, "DualEncoder"),
    "biovil_t": (RESNET, BERT, {"vision_head": PRIOR, "text_head": MLP}, "DualEncoder"),
    "vit-cls": (VIT, BERT, {"vision_tower__pooling": "cls"}, "DualEncoder"),
    "siglip-linear": (SIGLIP, SIGLIP_TEXT, {**POOLED, "similarity__bias": -3.0}, "DualEncoder"),
    "siglip-mean": (SIGLIP, SIGLIP_TEXT, {"text_tower__pooling": "mean"}, "DualEncoder"),
    "siglip-bert": (SIGLIP, BERT, POOLED, "VisionTextDualEncoderModel"),
}


def exported(folder, variant):
    """A random model whose scale is above its limit and whose running statistics are not the initial ones."""
    vision, text, overrides, kind = VARIANTS[variant]
    config = dual_config(folder, vision, text, **{"similarity__max_scale": 20.0, **overrides})
    masked = {"masked_language_modeling": {}} if variant == "biovil_t" else {}
    parts = build_components(config, Objective(**masked))
    torch.manual_seed(0)
    model = build_model(config, parts, torch.float32)
    with torch.no_grad():
        model.similarity.log_scale.fill_(4.0)
        for name, buffer in persistent_buffers(model).items():
            if "running" in name:
                buffer.uniform_(0.5, 1.5) if "var" in name else buffer.uniform_(-0.2, 0.2)
    trained = Trained(config, parts, dict(model.named_parameters()), persistent_buffers(model))
    assert write_folder(folder / "hf", trained, torch.float32) == kind
    return model.eval(), parts, trained


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_kind_of_model_exports_exactly(tmp_path, variant):
    model, parts, trained = exported(tmp_path, variant)
    expected = answers(model, parts)
    assert torch.allclose(expected["image"].norm(dim=1), torch.ones(2)) and expected["image"].diff(dim=0).norm() > 1e-3
    proof = compare(expected, tmp_path / "hf")
    assert proof["max_abs_image_diff"] <= 1e-5 and proof["max_abs_pixel_diff"] <= 1e-5
    assert ("max_abs_prior_diff" in proof) == (variant == "biovil_t")
    part = VisionTower(path=str(tmp_path / "hf"))
    tower = load_tower(
        part, backbone_config(part, "model.vision_tower", "vision_config"), torch.float32, "model.vision_tower"
    )
    for name, value in trained.weights.items():
        if name.startswith("vision_tower."):
            assert torch.equal(dict(tower.named_parameters())[name.removeprefix("vision_tower.")], value), name


@pytest.mark.parametrize("variant", ["clip", "siglip", "convirt"])
def test_the_scale_is_exact_in_bf16(tmp_path, variant):
    _, _, trained = exported(tmp_path, variant)
    trained.weights["similarity.log_scale"].data.fill_(0.3)  # above its beginning
    write_folder(tmp_path / "half", trained, torch.bfloat16)
    scale = math.exp(Similarity(0.07, 20.0, None).start + 0.3)
    assert Embedder(tmp_path / "half", trust_remote_code=variant == "convirt").logit_scale == pytest.approx(scale)


def test_exported_code_imports_nothing_of_ours(tmp_path):
    exported(tmp_path, "biovil_t")
    files = sorted(path.name for path in (tmp_path / "hf").glob("*.py"))
    assert files == ["dual_encoder_modeling.py", "heads.py", "joint_space.py", "poolings.py", "prior_image.py"]
    for name in files:
        for node in ast.walk(ast.parse((tmp_path / "hf" / name).read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level:
                assert node.module.split(".")[0] in ("collections", "torch", "transformers", "typing"), node.module
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "dual_encoder_modeling.DualEncoder"


def test_a_wrong_export_is_refused(tmp_path):
    """Other weights, a weight too few, and other running statistics."""
    model, parts, trained = exported(tmp_path, "convirt")
    expected = answers(model, parts)
    name = "text_head.linear_1.weight"
    wrong = {**trained.weights, name: trained.weights[name] + 0.01}
    write_folder(tmp_path / "wrong", Trained(trained.config, parts, wrong, trained.buffers), torch.float32)
    with pytest.raises(UserError, match="max_abs_text_diff"):
        compare(expected, tmp_path / "wrong")
    less = {key: value for key, value in trained.weights.items() if key != name}
    with pytest.raises(UserError, match="weights are not the trained ones"):
        write_folder(tmp_path / "less", Trained(trained.config, parts, less, trained.buffers), torch.float32)
    other = {key: value + 1 for key, value in trained.buffers.items()}
    write_folder(tmp_path / "other", Trained(trained.config, parts, trained.weights, other), torch.float32)
    with pytest.raises(UserError, match="max_abs_image_diff"):
        compare(expected, tmp_path / "other")


def test_why_no_class_of_transformers_will_do(tmp_path):
    for overrides, reason in (
        ({}, "poolers"),
        ({**POOLED, "text_head__kind": "mlp"}, "linear"),
        ({**POOLED, "vision_head__bias": True}, "without bias"),
        ({**POOLED, "similarity__bias": -1.0}, "no bias"),
    ):
        config = dual_config(tmp_path, VIT, BERT, **overrides)
        parts = build_components(config, None)
        assert reason in not_expressible(config, parts)["VisionTextDualEncoderModel"]
    config = dual_config(tmp_path, VIT, BERT, **POOLED)
    reasons = not_expressible(config, build_components(config, None))
    assert reasons.keys() == {"CLIPModel", "SiglipModel"} and "CLIP's" in reasons["CLIPModel"]


def test_the_model_cards_example_runs(tmp_path, monkeypatch):
    from PIL import Image

    from medvlm.config.schema import RunConfig
    from medvlm.export.dual_encoder_card import dual_encoder_card

    for variant in ("clip", "convirt", "siglip"):
        folder = tmp_path / variant
        folder.mkdir()
        _, parts, trained = exported(folder, variant)
        config = RunConfig.model_construct(
            description="",
            run=type("Run", (), {"name": "toy"}),
            model=trained.config,
            objective=Objective(),
            data=type("Data", (), {"sources": []}),
        )
        card = dual_encoder_card(config, parts, VARIANTS[variant][3], "step-1", None)
        example = card.split("```python\n")[1].split("```")[0]
        Image.new("L", (50, 40), 90).save(folder / "hf/radiograph.png")
        monkeypatch.chdir(folder / "hf")
        values: dict = {}
        exec(example, values)
        assert len(values["chances"]) == 2 and len(example.splitlines()) <= 12
        assert (
            type(values["model"]).__name__
            == type(AutoModel.from_pretrained(folder / "hf", trust_remote_code=True)).__name__
        )


def test_the_documented_example_runs(tmp_path, monkeypatch):
    from PIL import Image

    exported(tmp_path, "convirt")
    (tmp_path / "runs").mkdir()
    (tmp_path / "hf").rename(tmp_path / "runs" / "convirt-model")
    Image.new("L", (50, 40), 90).save(tmp_path / "radiograph.png")
    monkeypatch.chdir(tmp_path)
    page = (REPO / "docs" / "export.md").read_text()
    blocks = [block.split("```")[0] for block in page.split("```python\n")[1:]]
    [example] = [block for block in blocks if "convirt-model" in block]
    values: dict = {}
    exec(example, values)
    assert float(values["chances"].sum()) == pytest.approx(1) and len(example.splitlines()) <= 11


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """BioViL-T's kind in bf16 on two ranks under ZeRO-3, with batch normalisation, prior images and masked words."""
    folder = make_pairs(tmp_path_factory.mktemp("pairs"))
    objective = {"kind": "info_nce", "masked_language_modeling": {"weight": 0.1}}
    sections = {"model__vision_head": PRIOR, "model__text_head": MLP, "objective": objective}
    training = {"training__steps": 3, "training__ema_decay": 0.5, "training__precision": "bf16"}
    launch(pairs_recipe(folder, "biovil_t", RESNET, **sections, **training))
    return folder / "runs" / "biovil_t"


def test_a_zero3_run_exports_through_the_command_line(run, tmp_path):
    """The embedder of the evaluation loads what it writes; running statistics are those of the run."""
    printed = medvlm("export", run, "--out", tmp_path / "hf", FRESH="1")
    assert "max_abs_image_diff" in printed and "class: DualEncoder" in printed
    tower = AutoModel.from_pretrained(tmp_path / "hf/vision_tower")
    assert tower.embedder.embedder.normalization.running_mean.abs().max() > 1e-3
    assert int(tower.embedder.embedder.normalization.num_batches_tracked) >= 3
    assert "stored: bf16" in printed and "rounded to bf16 after that" in (tmp_path / "hf/README.md").read_text()
    for name, value in load_file(tmp_path / "hf/model.safetensors").items():
        if not name.endswith("num_batches_tracked"):
            exact = ".running_" in name or name == "similarity.log_scale"
            assert value.dtype == (torch.float32 if exact else torch.bfloat16), name
    embedder = Embedder(tmp_path / "hf", trust_remote_code=True)
    found = embedder.texts(["no pleural effusion", "cardiomegaly"])
    assert found.shape == (2, 16) and torch.allclose(found.norm(dim=1), torch.ones(2))
    medvlm("export", run, "--out", tmp_path / "ema", "--ema", "--no-proof")
    assert "not embeddings" in (tmp_path / "ema/README.md").read_text()
    assert "--adapter is of language models" in medvlm("export", run, "--out", tmp_path / "a", "--adapter", status=2)


def test_an_exported_image_tower_is_a_language_models_vision_tower(tmp_path):
    model, _, _ = exported(tmp_path, "clip")
    make_tokenizer(tmp_path / "tokenizer")
    tower = {"path": str(tmp_path / "hf"), "feature_layer": -2}
    config = load_recipe(str(make_recipe(tmp_path, model__vision_tower=tower)))
    parts = build.build_components(config.llava)
    assert parts.processor.image_processor.size == {"shortest_edge": 32}
    llava = build.build_model(config.llava, parts, torch.float32)
    for name, value in model.vision_tower.named_parameters():
        assert torch.equal(dict(llava.vision_tower.named_parameters())[name], value), name
