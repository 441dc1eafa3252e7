"""Image towers that dual encoders trained here, as vision towers of language models: trained on, exported, asked."""

import ast
import io

import pytest
import torch
from conftest import launch, medvlm
from dual_toy import RESNET, SWIN, VIT
from dual_world import make_pairs, pairs_recipe
from PIL import Image
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from toy import CLIP, SIGLIP, make_recipe, make_tokenizer, make_world, png
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    ConvNextImageProcessor,
    LlavaForConditionalGeneration,
    ViTImageProcessor,
)

from medvlm.config.load import load_recipe
from medvlm.data.images import ImageTransform
from medvlm.errors import UserError
from medvlm.export.llava import verify, write_llava
from medvlm.inference.generate import Generator
from medvlm.models.build import build_components, build_model
from medvlm.models.lora import merged
from medvlm.models.trainable import apply_trainable
from medvlm.planning.batch import longest, make_batch
from medvlm.planning.rehearsal import Job, rehearse, steps_needed
from medvlm.training.checkpoint.fragments import persistent_buffers
from medvlm.training.families.llava import LLAVA
from medvlm.training.flops import CostRecorder, attended_pairs, work
from medvlm.training.memory import bound
from medvlm.training.setup import deepspeed_config, prepare

pytestmark = pytest.mark.usefixtures("forked_proof")

FULL = {"feature_layer": -1, "select_strategy": "full"}
TOWERS = {
    "resnet": (RESNET, {}, FULL),
    "swin": ({**SWIN, "drop_path_rate": 0.5}, {}, {**FULL, "feature_layer": [-2, -1]}),
    "vit": (VIT, {"model__vision_tower__pooling": "mean"}, {"feature_layer": -2}),
    "clip": (CLIP, {}, {"feature_layer": [-2, -1], "select_strategy": "full"}),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_pairs(make_world(tmp_path_factory.mktemp("world")))


@pytest.fixture(scope="module", params=TOWERS)
def trained(request, world):
    """The name of a tower, the folder that its dual encoder was exported to, and the run of a LLaVA with it."""
    kind = request.param
    vision, options, tower = TOWERS[kind]
    launch(pairs_recipe(world, f"pairs-{kind}", vision, training__steps=2, **options), ranks=1)
    folder = world / f"{kind}-model"
    medvlm("export", world / "runs" / f"pairs-{kind}", "--out", folder, "--no-proof")
    section = {"path": str(folder), "train": "frozen", **tower}
    launch(make_recipe(world, f"llava-{kind}", model__vision_tower=section, training__steps=2))
    return kind, folder, world / "runs" / f"llava-{kind}"


def test_a_trained_tower_stays_as_it_is_and_the_export_answers(trained, tmp_path):
    """Two steps on two ranks under ZeRO-3; weights and running statistics are those of the dual encoder's folder."""
    kind, folder, run = trained
    fresh = {"FRESH": "1"} if kind == "resnet" else {}  # of code that comes along
    assert "max_abs_logit_diff" in medvlm("export", run, "--out", tmp_path / "hf", **fresh)
    medvlm("export", run, "--out", tmp_path / "unproven", "--no-proof")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("hf", "unproven")]
    assert weights[0] == weights[1]
    own = kind == "resnet"
    if own:
        with pytest.raises(
            UserError, match=r"^[^ ]+hf: runs code of its own; if you trust it, add --trust-remote-code$"
        ):
            Generator(tmp_path / "hf")
        code = ast.parse((tmp_path / "hf/llava_modeling.py").read_text())
        modules = {node.module for node in ast.walk(code) if isinstance(node, ast.ImportFrom)}
        assert not any(isinstance(node, ast.Import) for node in ast.walk(code))
        assert modules == {"typing", "torch", "transformers"}
    model = Generator(tmp_path / "hf", trust_remote_code=own).model
    assert own != (type(model) is LlavaForConditionalGeneration)
    given, kept = own_tower(folder).state_dict(), model.model.vision_tower.state_dict()
    assert kept.keys() == given.keys() and own == any("running" in name for name in given)
    for name, value in given.items():
        assert torch.equal(kept[name], value), name
    (tmp_path / "a.png").write_bytes(png(1))
    trust = ["--trust-remote-code"] if own else []
    image = ["--image", tmp_path / "a.png", "--max-new-tokens", 4]
    assert medvlm("generate", tmp_path / "hf", *image, "--prompt", "is there an effusion", *trust).strip()


def built(world, folder, dtype=torch.float32, **tower):
    section = {"path": str(folder), **FULL, **tower}
    config = load_recipe(str(make_recipe(world, f"built-{folder.name}", model__vision_tower=section)))
    parts = build_components(config.llava)
    model = build_model(config.llava, parts, dtype)
    return config, parts, model


def own_tower(folder):
    tower = AutoModel.from_pretrained(folder / "vision_tower")
    for name, buffer in tower.named_buffers():
        assert "running" not in name or not torch.equal(buffer, buffer.round()), name  # 0 and 1 at first
    return tower


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """Folders as of an exported dual encoder, of random towers whose running statistics are not the initial ones."""
    folder, found = make_tokenizer(tmp_path_factory.mktemp("towers") / "tokenizer").parent, {}
    for kind, values in {"resnet": RESNET, "swin": TOWERS["swin"][0], "siglip": SIGLIP}.items():
        torch.manual_seed(0)
        tower = AutoModel.from_config(AutoConfig.for_model(**values))
        for name, buffer in tower.named_buffers():
            if "running" in name:
                buffer.uniform_(0.5, 1.5)
        tower.save_pretrained(folder / kind / "vision_tower")
        size = {"shortest_edge": 32} if kind == "resnet" else {"height": 32, "width": 32}
        processor = ConvNextImageProcessor(size=size) if kind == "resnet" else ViTImageProcessor(size=size)
        processor.save_pretrained(folder / kind / "vision_tower")
        found[kind] = folder / kind
    return folder, found


@pytest.mark.parametrize("kind", ["resnet", "swin"])
def test_features_are_those_of_transformers_class(towers, kind):
    """By hand: what the folder's own processor makes of a picture, the tower's last map row by row, two layers."""
    world, folders = towers
    _, parts, model = built(world, folders[kind])
    assert parts.image_tokens == 16 and parts.image_size == 32
    text = parts.processor(text="<image>", images=Image.new("L", (50, 40)).convert("RGB"))
    assert text["input_ids"][0].count(parts.image_token_id) == 16
    tower = own_tower(folders[kind])
    picture = Image.open(io.BytesIO(png(3, 45)))
    its = AutoImageProcessor.from_pretrained(folders[kind] / "vision_tower")
    pixels = its(picture.convert("RGB"), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        hidden = tower(pixels, output_hidden_states=True).hidden_states[-1]
        if kind == "resnet":
            assert hidden.shape == (1, 32, 4, 4)
            hidden = torch.stack([hidden[:, :, row, column] for row in range(4) for column in range(4)], 1)
        projector = model.multi_modal_projector
        expected = projector.linear_2(torch.nn.functional.gelu(projector.linear_1(hidden)))
        given = ImageTransform(parts.processor.image_processor, exact=True)(png(3, 45), "x")[None]
        torch.testing.assert_close(model.image_features(given), expected, atol=1e-5, rtol=1e-5)


def test_batch_norm_keeps_its_statistics_whatever_trains(towers):
    """A trained tower gives in training what it gives in use, whatever else is in its batch, and statistics stay."""
    world, folders = towers
    config, parts, model = built(world, folders["resnet"], train="full")
    apply_trainable(model, config.model, parts.unused)
    assert model.training and model.vision_tower.training
    before = {name: value.clone() for name, value in persistent_buffers(model).items()}
    pixels = torch.randint(0, 256, (3, 1, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
    pixels[2] = 0  # a blank one
    found = model.image_features(pixels)
    found.sum().backward()
    assert all(p.grad is not None for p in model.vision_tower.parameters())
    for name, value in persistent_buffers(model).items():
        assert torch.equal(value, before[name]), name
    torch.testing.assert_close(model.eval().image_features(pixels[:2]), found[:2], atol=1e-5, rtol=1e-5)


def test_a_frozen_tower_has_no_dropout_and_a_trained_one_has(towers):
    """Swin's stochastic depth, of a folder: transformers gives it in evaluation mode."""
    world, folders = towers
    pixels = torch.full((8, 1, 32, 32), 99, dtype=torch.uint8)
    spread = {}
    for train in ("frozen", "full"):
        config, parts, model = built(world, folders["swin"], train=train)
        apply_trainable(model, config.model, parts.unused)
        torch.manual_seed(0)
        spread[train] = float(model.eval().train().image_features(pixels).std(0).max())
    assert spread["frozen"] < 1e-5 < 1e-3 < spread["full"]


def test_statistics_keep_their_precision_in_bf16(towers):
    world, folders = towers
    _, _, model = built(world, folders["resnet"], torch.bfloat16)
    given = load_file(folders["resnet"] / "vision_tower/model.safetensors")
    for name, value in model.vision_tower.state_dict().items():
        assert torch.equal(value, given[name].to(value.dtype)), name
        assert ("running" in name) == (value.dtype == torch.float32), name


@pytest.mark.parametrize(
    ("kind", "tower", "sentence"),
    [
        ("swin", {"select_strategy": "default"}, "which in 'swin' is a patch and no class token; give full"),
        ("siglip", {"select_strategy": "default"}, "which in 'siglip_vision_model' is a patch"),
        ("resnet", {"feature_layer": -2}, "feature_layer: layer -2 gives 64 tokens of width 16, .* width 32; give -1"),
        ("swin", {"feature_layer": [0, -1]}, "feature_layer: layer 0 gives 64 tokens of width 8, .* width 16; give -1"),
        ("resnet", {"feature_layer": 3}, "feature_layer: 3 does not exist"),
        ("resnet", {"train": "full", "frozen_layers": 3}, "frozen_layers: 3 is more than the 2 there are"),
        ("resnet", {"train": "lora"}, "lora.targets: this model has no torch.nn.Linear layers"),
        ("resnet", {"gradient_checkpointing": True}, "ResNetModel has no layers to do it by; leave it out"),
    ],
)
def test_what_a_tower_cannot_do_is_said(towers, kind, tower, sentence):
    world, folders = towers
    with pytest.raises(UserError, match=sentence):
        config, parts, model = built(world, folders[kind], **tower)
        prepare(model, config, parts)


def test_a_tower_in_stages_trains_by_layers_and_with_adapters(towers, tmp_path):
    """Swin: recomputed stages change no gradient, layers have rates of their own, the first train not at all, and
    merged adapters export exactly."""
    world, folders = towers
    pixels = torch.randint(0, 256, (2, 1, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
    gradients = []
    for again in (False, True):
        options = {"train": "full", "frozen_layers": 1, "layer_decay": 0.5, "gradient_checkpointing": again}
        config, parts, model = built(world, folders["swin"], **options)
        _, groups = prepare(model, config, parts)
        torch.manual_seed(0)
        model.image_features(pixels).square().sum().backward()
        gradients.append({n: p.grad for n, p in model.vision_tower.named_parameters() if p.grad is not None})
    assert {name.split(".")[2] for name in gradients[0]} == {"1"}
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value)
    rates = {group["lr"] for group in groups if group["name"] == "vision_tower"}
    assert rates == {1e-3 * 0.5}  # the norm above the layers, on which no feature depends, has the whole rate

    config, parts, model = built(world, folders["swin"], train="lora", lora={"rank": 2})
    prepare(model, config, parts)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    state = dict(merged({name: p.detach() for name, p in model.named_parameters()}, config.model))
    write_llava(tmp_path / "hf", state, parts, config, buffers=persistent_buffers(model))
    assert verify(model.eval(), parts, tmp_path / "hf")["max_abs_logit_diff"] <= 1e-5


@pytest.mark.parametrize("kind", ["resnet", "swin"])
def test_flops_and_memory_of_a_tower_are_predicted(towers, kind):
    world, folders = towers
    config, parts, model = built(world, folders[kind], train="full")
    prepare(model, config, parts)
    shape = longest(config, parts, 2, 60, 2)
    recorder = CostRecorder(model, config.model.PARTS, LLAVA.unit, parts.unused)
    batch = make_batch(shape, parts)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**batch.inputs(torch.device("cpu"))).backward()
    counts = {"images": 4, "tokens": 120, "targets": batch.supervised_tokens}
    costs = recorder.costs.of(work(counts, {None: attended_pairs([60, 60], None)}))
    assert sum(cost.model for cost in costs.values()) == pytest.approx(counter.get_total_flops(), rel=0.01)

    ds_config = deepspeed_config(config, 2)
    job = Job(config, parts, ds_config, 2, shape, "cpu", steps_needed(ds_config))
    (rehearsal,) = rehearse([job])
    assert rehearsal.peak < bound(config, parts, ds_config, 2, 60, 2) - 2**30 < 20 * rehearsal.peak
    # fused attention, which a plan counts, makes the language model's scores again on the way back
    assert rehearsal.flops / rehearsal.accumulation == pytest.approx(counter.get_total_flops(), rel=0.05)
