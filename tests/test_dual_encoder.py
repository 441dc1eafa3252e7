"""Dual encoders against transformers' own classes with the same weights, and poolings and heads by hand."""

import math

import numpy as np
import pytest
import torch
from dual_toy import BERT, CLIP_TEXT, DINOV2, RESNET, SIGLIP_TEXT, VISION, VIT, attending_to_one, dual_config
from torch import nn
from torch.nn.functional import cross_entropy, gelu, layer_norm, normalize
from toy import CLIP, SIGLIP
from transformers import (
    AutoConfig,
    AutoModel,
    BertForMaskedLM,
    BitImageProcessor,
    CLIPConfig,
    ConvNextImageProcessor,
    SiglipConfig,
    VisionTextDualEncoderConfig,
)

from medvlm.config.objective import Objective
from medvlm.errors import UserError
from medvlm.models.backbones import backbone_config
from medvlm.models.build_dual_encoder import build_components, build_model
from medvlm.models.lora import add_adapters
from medvlm.models.trainable import apply_trainable

DISTILBERT = {"model_type": "distilbert", "dim": 24, "n_layers": 1, "n_heads": 2, "hidden_dim": 48, "vocab_size": 20}
MASKED = Objective(masked_language_modeling={})


def built(folder, *towers, objective=None, **overrides):
    config = dual_config(folder, *towers, **overrides)
    parts = build_components(config, objective)
    torch.manual_seed(1)
    return config, parts, build_model(config, parts, torch.float32, seed=3).eval()


def texts(parts, pad_side=None):
    """Two of unequal length, padded to the longer: ids and mask [2, L]."""
    found = parts.tokenizer(
        ["no effusion", "the heart is enlarged new left effusion"], padding=True, return_tensors="pt"
    )
    return found["input_ids"], found["attention_mask"]


def images(channels=3, count=2):
    return torch.randint(0, 256, (count, channels, 32, 32), generator=torch.Generator().manual_seed(0)).byte()


def stock(config, theirs, ours, names):
    """A model of transformers with the weights of ours, by the pairs of their names."""
    model = AutoModel.from_config(config).eval()
    state = model.state_dict()
    for key in state:
        for old, new in names.items():
            if key.startswith(old):
                found = ours.state_dict()[new + key.removeprefix(old)]
                found = found + ours.similarity.start if key == "logit_scale" else found
                state[key] = found.reshape(state[key].shape)
    model.load_state_dict(state)
    assert theirs in type(model).__name__
    return model


def logits(found):
    return found["scale"] * normalize(found["image"], dim=-1) @ normalize(found["text"], dim=-1).T + found.get(
        "bias", 0
    )


NAMES = {
    "vision_model.": "vision_tower.",
    "text_model.": "text_tower.",
    "visual_projection.": "vision_head.linear_1.",
    "text_projection.": "text_head.linear_1.",
    "logit_scale": "similarity.log_scale",
    "logit_bias": "similarity.bias",
}


def compare(model, parts, theirs, mask=True):
    ids, attention = texts(parts)
    found = model(images(), ids, attention)
    if not mask:
        ids = parts.tokenizer(
            ["no effusion", "the heart is enlarged new left effusion"],
            padding="max_length",
            max_length=20,
            return_tensors="pt",
        )["input_ids"]
    its = theirs(pixel_values=model.pixels(images()), input_ids=ids, **({"attention_mask": attention} if mask else {}))
    for name, values in (("image", its.image_embeds), ("text", its.text_embeds)):
        torch.testing.assert_close(normalize(found[name], dim=-1), values, atol=2e-6, rtol=0)
    torch.testing.assert_close(logits(found), its.logits_per_image, atol=2e-5, rtol=0)
    return found


def test_clip_equals_transformers(tmp_path):
    _, parts, model = built(tmp_path, CLIP, CLIP_TEXT, text_tower__pooling="pooler")
    config = CLIPConfig(vision_config=CLIP, text_config=CLIP_TEXT, projection_dim=16)
    compare(model, parts, stock(config, "CLIPModel", model, NAMES))


def test_siglip_equals_transformers(tmp_path):
    """Its texts are padded to the full length and take no mask: what a batch's other texts are makes no difference."""
    _, parts, model = built(
        *(tmp_path, SIGLIP, SIGLIP_TEXT),
        **{"text_tower__pooling": "pooler", "vision_head__kind": "none", "text_head__kind": "none"},
        **{"embedding_dim": 32, "similarity__bias": -10.0, "similarity__temperature": 0.1},
    )
    config = SiglipConfig(vision_config=SIGLIP, text_config=SIGLIP_TEXT)
    compare(model, parts, stock(config, "SiglipModel", model, NAMES), mask=False)
    ids, mask = texts(parts)
    alone = model.text_features(ids[:1, :4], mask[:1, :4])
    torch.testing.assert_close(alone, model.text_features(ids, mask)[:1])


@pytest.mark.parametrize("vision", ["vit", "clip", "siglip", "dinov2", "swin"])
def test_linear_heads_on_poolers_equal_vision_text_dual_encoder(tmp_path, vision):
    _, parts, model = built(tmp_path, VISION[vision], BERT, text_tower__pooling="pooler")
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        parts.vision_config, parts.text_config, projection_dim=16
    )
    compare(model, parts, stock(config, "VisionTextDualEncoder", model, NAMES))


def test_text_poolings_by_hand(tmp_path):
    for pooling, layers in (("cls", [-1]), ("mean", [-1]), ("max", [-1]), ("mean", [1, 2, -1]), ("max", [0, 2])):
        _, parts, model = built(tmp_path, text_tower__pooling=pooling, text_tower__pooling_layers=layers)
        ids, mask = texts(parts)
        hidden = model.text_tower(ids, attention_mask=mask, output_hidden_states=True).hidden_states
        for row, count in enumerate(mask.sum(1).tolist()):
            layer = sum(hidden[n][row] for n in layers) / len(layers)
            expected = {"cls": layer[0], "mean": layer[:count].mean(0), "max": layer[:count].max(0).values}[pooling]
            expected = model.text_head.linear_1.weight @ expected
            torch.testing.assert_close(model.text_features(ids, mask)[row], expected, atol=1e-5, rtol=1e-5)


def test_image_poolings_by_hand(tmp_path):
    for vision, pooling in (("vit", "cls"), ("vit", "mean"), ("dinov2", "max"), ("siglip", "mean"), ("clip", "cls")):
        _, _, model = built(tmp_path, VISION[vision], vision_tower__pooling=pooling)
        hidden = model.vision_tower(model.pixels(images())).last_hidden_state
        if vision == "clip":
            hidden = model.vision_tower.post_layernorm(hidden)
        patches = hidden if vision == "siglip" else hidden[:, 1:]
        assert patches.shape[1] == 4
        pooled = {"cls": hidden[:, 0], "mean": patches.mean(1), "max": patches.max(1).values}[pooling]
        torch.testing.assert_close(model.image_features(images()), pooled @ model.vision_head.linear_1.weight.T)
        if pooling != "cls":
            grid = model.patch_features(images())
            torch.testing.assert_close(grid.flatten(1, 2), patches @ model.vision_head.linear_1.weight.T)


@pytest.mark.parametrize(
    ("vision", "pooling"), [("vit", "cls"), ("vit", "pooler"), ("clip", "pooler"), ("dinov2", "cls")]
)
def test_a_patch_of_a_class_token_is_what_it_would_be_had_it_attended_to_that_patch_alone(tmp_path, vision, pooling):
    _, _, model = built(tmp_path, VISION[vision], vision_tower__pooling=pooling)
    grid = model.patch_features(images()).flatten(1, 2)
    assert grid.shape[1] == 4
    for patch in range(4):
        with attending_to_one(model.vision_tower, 1 + patch):
            torch.testing.assert_close(grid[:, patch], model.image_features(images()), atol=1e-5, rtol=1e-5)
    assert (grid - model.image_features(images())[:, None]).abs().max() > 1e-3


@pytest.mark.parametrize("vision", VISION)
def test_patches_have_a_place_in_the_joint_space(tmp_path, vision):
    """An image of which every patch is the same has the embedding of its patches."""
    _, _, model = built(tmp_path, VISION[vision])
    grid = model.patch_features(images())
    side = {"swin": 4, "resnet": 4}.get(vision, 2)
    assert grid.shape == (2, side, side, 16)
    if vision in ("swin", "resnet"):  # these pool by the mean, and their heads are linear
        torch.testing.assert_close(grid.mean((1, 2)), model.image_features(images()))
    grey = model.patch_features(images(1))
    torch.testing.assert_close(grey, model.patch_features(images(1).expand(-1, 3, -1, -1)))


def test_heads_by_hand(tmp_path):
    options = {"kind": "mlp", "hidden_dim": 12, "activation": "gelu", "norm": "layer", "bias": True}
    _, parts, model = built(tmp_path, text_head=options)
    ids, mask = texts(parts)
    x, head = model.text_tower(ids, attention_mask=mask).last_hidden_state[:, 0], model.text_head
    hidden = gelu(x @ head.linear_1.weight.T + head.linear_1.bias)
    hidden = layer_norm(hidden, (12,), head.norm.weight, head.norm.bias)
    torch.testing.assert_close(model.text_features(ids, mask), hidden @ head.linear_2.weight.T + head.linear_2.bias)

    options = {"kind": "conv", "hidden_dim": 12, "norm": "batch", "bias": True}
    _, _, model = built(tmp_path, RESNET, vision_head=options)
    x, head = model.vision_tower(model.pixels(images())).last_hidden_state, model.vision_head
    assert head.linear_1.bias is None and head.linear_2.bias is not None
    head.norm.running_mean.uniform_(-1, 1)
    grid = torch.einsum("ichw,dc->idhw", x, head.linear_1.weight[:, :, 0, 0])
    grid = (grid - head.norm.running_mean[:, None, None]) / (head.norm.running_var[:, None, None] + 1e-5).sqrt()
    grid = torch.einsum("ichw,dc->ihwd", grid.relu(), head.linear_2.weight[:, :, 0, 0]) + head.linear_2.bias
    torch.testing.assert_close(model.patch_features(images()), grid, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.image_features(images()), grid.mean((1, 2)), atol=1e-5, rtol=1e-5)


def test_masked_language_modeling_is_berts_loss(tmp_path):
    _, parts, model = built(tmp_path, objective=MASKED)
    theirs = BertForMaskedLM(parts.text_config).eval()
    theirs.load_state_dict(model.text_tower.state_dict())
    ids, mask = texts(parts)
    masked, labels = ids.clone(), torch.full_like(ids, -100)
    for row, at in ((0, 1), (1, 2), (1, 5)):
        masked[row, at], labels[row, at] = parts.tokenizer.mask_token_id, ids[row, at]
    found = model(images(), ids, mask, masked_ids=masked, masked_labels=labels)
    expected = theirs(masked, attention_mask=mask, labels=labels)
    torch.testing.assert_close(found["masked_loss"], 3 * expected.loss)
    torch.testing.assert_close(found["text"], model.text_features(ids, mask))
    nothing = torch.full_like(ids, -100)
    assert model(images(), ids, mask, masked_ids=masked, masked_labels=nothing)["masked_loss"] == 0
    hidden = expected = theirs.bert(masked, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(
        found["masked_loss"], cross_entropy(theirs.cls(hidden)[labels >= 0], labels[labels >= 0], reduction="sum")
    )


def test_scale_is_clamped_and_comes_back(tmp_path):
    _, _, model = built(tmp_path, similarity__max_scale=20.0)
    similarity = model.similarity
    assert math.isclose(float(similarity()[0]), 1 / 0.07, rel_tol=1e-6)
    with torch.no_grad():
        similarity.log_scale.fill_(4.0)
    for sign, passes in ((1, True), (-1, False)):
        similarity.zero_grad()
        scale = similarity()[0]
        assert math.isclose(float(scale), 20, rel_tol=1e-6)
        (sign * scale).backward()
        assert bool(similarity.log_scale.grad) == passes


def test_parameters_without_influence_are_named(tmp_path):
    _, parts, _ = built(tmp_path, SIGLIP, vision_tower__pooling="mean", text_tower__pooling_layers=[0, 1])
    assert {name.split(".")[0] for name in parts.unused["vision_tower"]} == {"head"}
    assert {".".join(name.split(".")[:3]) for name in parts.unused["text_tower"]} == {
        "encoder.layer.1",
        "encoder.layer.2",
    }
    _, parts, _ = built(tmp_path, RESNET, text_tower__pooling="mean")
    assert not any(parts.unused.values())
    assert parts.text_limit == 40 and parts.image_size == 32
    _, parts, _ = built(tmp_path, text={**BERT, "model_type": "roberta", "pad_token_id": 0})
    assert parts.text_limit == 39  # its first position is that of the padding token


@pytest.mark.parametrize(
    ("towers", "overrides", "message"),
    [
        ((SIGLIP, BERT), {"vision_tower__pooling": "cls"}, "vision_tower.pooling: .*no class token"),
        ((VIT, CLIP_TEXT), {}, "text_tower.pooling: cls is a token that sees no other"),
        ((VIT, {**CLIP_TEXT, "eos_token_id": 9}), {"text_tower__pooling": "pooler"}, "does not end texts with it"),
        ((VIT, BERT), {"text_tower__pooling_layers": [4]}, "beyond the tower's 3 layers"),
        ((VIT, BERT), {"vision_head__kind": "none"}, "embedding_dim to be the tower's 32"),
        ((VIT, {**BERT, "vocab_size": 10}), {}, "20 tokens, the text tower 10"),
        ((VIT, BERT), {"vision_tower__image_size": 64}, "only a convolutional tower"),
        ((DINOV2, BERT), {"vision_tower__image_size": 60}, "no multiple of the tower's patches of 16"),
        ((VIT, DISTILBERT), {"text_tower__pooling": "pooler"}, "text_tower.pooling: 'distilbert' has no pooler"),
        (({**VIT, "model_type": "beit"}, BERT), {}, "'beit' is not supported"),
        ((VIT, BERT), {"text_tower__tokenizer": None}, "text_tower.tokenizer: .* needs a tokenizer"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, towers, overrides, message):
    with pytest.raises(UserError, match=message):
        built(tmp_path, *towers, **overrides)


@pytest.mark.parametrize(("asked", "size"), [(None, 48), (64, 64)])
def test_dinov2_takes_images_of_another_size_than_its_positions_are_for(tmp_path, asked, size):
    """Those of the hub are for 518 pixels and come with a processor that gives 224; as transformers' own class."""
    config, _, _ = built(tmp_path, DINOV2)
    theirs = AutoModel.from_config(backbone_config(config.vision_tower, "", "vision_config")).eval()
    theirs.save_pretrained(tmp_path / "dinov2")
    BitImageProcessor(size={"shortest_edge": 56}, crop_size=48).save_pretrained(tmp_path / "dinov2")
    tower = {"vision_tower__config": None, "vision_tower__path": str(tmp_path / "dinov2")}
    options = tower | ({} if asked is None else {"vision_tower__image_size": asked})
    _, parts, model = built(tmp_path, DINOV2, vision_head__kind="none", embedding_dim=32, **options)
    assert parts.image_size == size
    pixels = torch.randint(0, 256, (2, 1, size, size), dtype=torch.uint8)
    expected = theirs(model.pixels(pixels)).pooler_output
    torch.testing.assert_close(model.image_features(pixels), expected)
    assert model.patch_features(pixels).shape == (2, size // 16, size // 16, 32)


def test_masking_needs_a_masked_language_model(tmp_path):
    with pytest.raises(UserError, match="masked_language_modeling"):
        built(tmp_path, VIT, CLIP_TEXT, objective=MASKED, text_tower__pooling="mean")
    with pytest.raises(UserError, match="pooler"):
        built(tmp_path, objective=MASKED, text_tower__pooling="pooler")


def prior_model(folder):
    conv = {"kind": "conv", "prior_image": {"width": 16, "layers": 2, "heads": 4}}
    return built(folder, RESNET, vision_head=conv)[2]


def test_difference_from_a_prior_image_by_hand(tmp_path):
    """Two rows, of which the second has a prior image, with PyTorch's own attention."""
    model = prior_model(tmp_path)
    pooler = model.vision_head.prior_image
    grid = model.vision_tower(model.pixels(images(3, 3))).last_hidden_state
    joined = pooler(grid[:2], grid[2:], torch.tensor([False, True]))
    reduced = torch.einsum("ichw,dc->idhw", grid, pooler.reduce.weight[:, :, 0, 0])
    torch.testing.assert_close(joined[:, :16], reduced[:2], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(joined[0, 16:], pooler.missing[:, None, None].expand(-1, 4, 4))

    place = torch.zeros(4, 4, 16)  # DETR's: sine and cosine of the row's angle, then of the column's
    for row in range(4):
        for column in range(4):
            for half, at in enumerate((row, column)):
                for k in range(4):
                    angle = (at + 1) / 4 * 2 * math.pi / 10000 ** (k / 4)
                    place[row, column, 8 * half + 2 * k] = math.sin(angle)
                    place[row, column, 8 * half + 2 * k + 1] = math.cos(angle)
    positions = torch.cat([place.flatten(0, 1) + pooler.time[n] for n in range(2)])
    x = torch.cat([reduced[1].flatten(1).T, reduced[2].flatten(1).T])
    for block in pooler.blocks:
        theirs = nn.MultiheadAttention(16, 4, batch_first=True).eval()
        with torch.no_grad():
            theirs.in_proj_weight.copy_(torch.cat([block.query.weight, block.key.weight, block.value.weight]))
            theirs.in_proj_bias.zero_()
            theirs.out_proj.weight.copy_(block.out.weight)
        seen = block.norm_1(x) + positions
        x = x + theirs(seen[None], seen[None], seen[None])[0][0]
        x = x + block.down(gelu(block.up(block.norm_2(x))))
    expected = pooler.norm(x)[:16].T.view(16, 4, 4)
    torch.testing.assert_close(joined[1, 16:], expected, atol=1e-5, rtol=1e-4)


def test_prior_images_belong_to_their_rows(tmp_path):
    model = prior_model(tmp_path)
    current, prior = images(3, 3), images(1, 4)[1:]
    together = model.image_features(current, prior, torch.tensor([True, False, True]))
    alone = torch.cat(
        [
            model.image_features(current[:1], prior[:1]),
            model.image_features(current[1:2]),
            model.image_features(current[2:], prior[2:]),
        ]
    )
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    swapped = model.image_features(current, prior.flip(0), torch.tensor([True, False, True]))
    assert (swapped - together).abs().amax(1).gt(1e-4).tolist() == [True, False, True]
    patches = model.patch_features(current, prior, torch.tensor([True, False, True]))
    torch.testing.assert_close(patches.mean((1, 2)), together, atol=1e-5, rtol=1e-4)
    _, _, plain = built(tmp_path, RESNET, vision_head={"kind": "conv"})
    with pytest.raises(ValueError, match="prior_image is off"):
        plain.image_features(current, prior)


@pytest.mark.parametrize("size", [64, 384])
def test_a_convnext_processor_is_taken_as_one_that_crops(tmp_path, size):
    """ResNet's processor resizes by a share of its own, which training must follow; pixels equal its own."""
    own = ConvNextImageProcessor(size={"shortest_edge": size}, crop_pct=0.875)
    config = AutoConfig.for_model(**RESNET)
    AutoModel.from_config(config).save_pretrained(tmp_path / "resnet")
    own.save_pretrained(tmp_path / "resnet")
    section = {"path": str(tmp_path / "resnet")}
    parts = build_components(dual_config(tmp_path, RESNET, vision_tower=section), None)
    assert parts.image_size == size
    picture = np.random.default_rng(0).integers(0, 256, (500, 400, 3), dtype=np.uint8)
    found, expected = (p(picture, return_tensors="pt")["pixel_values"] for p in (parts.image_processor, own))
    torch.testing.assert_close(found, expected)
    larger = {**section, "image_size": 96}
    parts = build_components(dual_config(tmp_path, RESNET, vision_tower=larger), None)
    assert parts.image_processor(picture, return_tensors="pt")["pixel_values"].shape == (1, 3, 96, 96)


def test_adapters_are_put_where_they_act(tmp_path):
    """Not on the output layer of SigLIP's attention pool, whose weight is read without calling it."""
    train = {"vision_tower__train": "lora", "text_tower__train": "lora"}
    config, parts, model = built(tmp_path, SIGLIP, SIGLIP_TEXT, **train, text_tower__pooling="pooler")
    add_adapters(model, config, parts.unused, 0)
    apply_trainable(model, config, parts.unused)
    ids, mask = texts(parts)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    found = model(images(), ids, mask)
    (found["image"].sum() + found["text"].sum() + found["scale"]).backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    assert any("head.mlp.fc1.lora_A" in name for name, _ in model.vision_tower.named_parameters())


def test_a_convolutional_tower_has_no_layers_to_recompute(tmp_path):
    config, parts, model = built(tmp_path, RESNET, vision_tower__gradient_checkpointing=True)
    with pytest.raises(UserError, match=r"vision_tower.gradient_checkpointing: ResNetModel has no layers"):
        apply_trainable(model, config, parts.unused)


@pytest.mark.parametrize("vision", ["vit", "clip", "siglip", "dinov2"])
def test_towers_attend_by_the_kernel_that_transformers_chooses(tmp_path, vision):
    _, _, model = built(tmp_path, VISION[vision], BERT)
    assert model.vision_tower.config._attn_implementation == model.text_tower.config._attn_implementation == "sdpa"


def test_a_frozen_tower_stays_in_evaluation_mode(tmp_path):
    config = dual_config(tmp_path, VIT, BERT, text_tower__train="frozen")
    parts = build_components(config, None)
    model = build_model(config, parts, torch.float32)
    apply_trainable(model, config, parts.unused)
    assert model.training and model.vision_tower.training and not model.text_tower.training
