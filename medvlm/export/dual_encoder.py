"""A dual encoder's checkpoint -> a folder of `CLIPModel`, `SiglipModel` or `VisionTextDualEncoderModel` where one of
these is exactly the model, else with its own modelling code; proven by a fresh process."""

import copy
import io
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    SiglipConfig,
    SiglipModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
)

import medvlm.models
from medvlm.config.model import DualEncoder as DualEncoderRecipe
from medvlm.config.schema import RunConfig
from medvlm.data.images import ImageTransform
from medvlm.errors import UserError
from medvlm.export import dual_encoder_modeling as modeling
from medvlm.export.dual_encoder_card import LABELS, dual_encoder_card
from medvlm.export.writing import TOLERANCE, fresh_process, open_run, pretrained_parts, stored_buffers, write_weights
from medvlm.models.backbones import TOWER
from medvlm.models.build_dual_encoder import (
    DualComponents,
    build_components,
    build_model,
    fixed_length,
    load_backbone,
)
from medvlm.models.dual_encoder import DualEncoderModel
from medvlm.models.joint_space import Similarity
from medvlm.models.lora import add_adapters
from medvlm.training import checkpoint

CODE = ("poolings", "prior_image", "heads", "joint_space")  # modules of `medvlm.models` that the modelling code imports
MODELING = "dual_encoder_modeling"
NAMES = {
    "vision_tower.": "vision_model.",
    "text_tower.": "text_model.",
    "vision_head.linear_1.": "visual_projection.",
    "text_head.linear_1.": "text_projection.",
    "similarity.log_scale": "logit_scale",
    "similarity.bias": "logit_bias",
}


@dataclass
class Trained:
    """What a model consists of: weights by our names, and buffers, such as running means."""

    config: DualEncoderRecipe
    parts: DualComponents
    weights: Mapping[str, Tensor]
    buffers: dict[str, Tensor]


def export_run(run: Path, out: Path, tag: str | None = None, ema: bool = False, prove: bool = True) -> dict[str, Any]:
    """Export a run's checkpoint (the newest, or ``tag``), or its moving average, to ``out``; returns what was proven.

    Weights go from the checkpoint to ``out`` one by one. The proof needs the model in memory, once. Raises UserError if
    the fresh process's embeddings differ by more than 1e-5 in fp32; ``out`` is then not written.
    """
    config, source = open_run(run, out, tag)
    assert isinstance(config.model, DualEncoderRecipe)
    parts = build_components(config.model, config.objective)
    stored = checkpoint.consolidate(source, ema=ema)
    frozen = pretrained_parts(stored, config.model, partial(load_backbone, config.model, parts))
    values = checkpoint.StockWeights(stored, merge=True, built=frozen)
    expected = answers(trained_model(config, parts, stored), parts) if prove else None
    buffers = stored_buffers(build_on_meta(config.model, parts), source)

    trained = Trained(config.model, parts, values, buffers)
    staging = checkpoint.new_folder(out)
    bf16 = checkpoint.read_manifest(source)["bf16"]
    dtype = torch.bfloat16 if bf16 else torch.float32
    kind = write_folder(staging, trained, torch.float32 if prove else dtype)
    proof = {**compare(expected, staging), "stored": "bf16" if bf16 else "fp32"} if expected else None
    if proof and bf16:  # proven in fp32, published in the type it was trained in
        for path in staging.rglob("model*.safetensors*"):
            path.unlink()
        write_folder(staging, trained, dtype)
    (staging / "README.md").write_text(dual_encoder_card(config, parts, kind, source.name, proof))
    checkpoint.finish_folder(staging, out)
    return {"path": str(out), "checkpoint": str(source), "class": kind, **(proof or {"proof": "left out"})}


def trained_model(config: RunConfig, parts: DualComponents, weights: checkpoint.Weights) -> DualEncoderModel:
    """The model of a run with the weights of its checkpoint, in fp32, on one process."""
    assert isinstance(config.model, DualEncoderRecipe)
    model = build_model(config.model, parts, torch.float32, seed=config.run.seed)
    add_adapters(model, config.model, parts.unused, config.run.seed)
    checkpoint.load_weights(model, weights, str(weights.path))
    return model.eval()


def build_on_meta(config: DualEncoderRecipe, parts: DualComponents) -> DualEncoderModel:
    """The model's structure; `path` of its towers is not read."""
    towers = {part: {"path": None, "config": {"model_type": "given"}} for part in ("vision_tower", "text_tower")}
    values = {part: getattr(config, part).model_copy(update=given) for part, given in towers.items()}
    with torch.device("meta"):
        return build_model(config.model_copy(update=values), parts, torch.float32)


def not_expressible(config: DualEncoderRecipe, parts: DualComponents) -> dict[str, str]:
    """By class of transformers: why it cannot be this model exactly; a class that can is not in it."""
    vision, text = parts.vision_config.model_type, parts.text_config.model_type
    heads = (config.vision_head, config.text_head)
    linear = all(head.kind == "linear" and not head.bias for head in heads)
    pooled = config.vision_tower.pooling == config.text_tower.pooling == "pooler"
    common = "" if pooled else "it pools by the towers' own poolers"
    reasons = {
        "CLIPModel": common
        or ("" if (vision, text) == ("clip_vision_model", "clip_text_model") else "its towers are CLIP's")
        or ("" if linear else "its heads are linear without bias")
        or ("" if config.similarity.bias is None else "its logits have no bias"),
        "SiglipModel": common
        or ("" if (vision, text) == ("siglip_vision_model", "siglip_text_model") else "its towers are SigLIP's")
        or ("" if all(head.kind == "none" for head in heads) else "it has no heads"),
        "VisionTextDualEncoderModel": common
        or ("" if vision != "resnet" and text != "siglip_text_model" else f"it does not take {vision} and {text}")
        or ("" if linear else "its heads are linear without bias")
        or ("" if config.similarity.bias is None else "its logits have no bias"),
    }
    return {name: reason for name, reason in reasons.items() if reason}


def write_folder(folder: Path, trained: Trained, dtype: torch.dtype) -> str:
    """Model, processor and image tower; returns the model's class. Raises UserError if its weights are not these."""
    config, parts = trained.config, trained.parts
    reasons = not_expressible(config, parts)
    with torch.device("meta"):
        if "CLIPModel" not in reasons:
            target: Any = CLIPModel(CLIPConfig(**_halves(parts), projection_dim=config.embedding_dim))
        elif "SiglipModel" not in reasons:
            target = SiglipModel(SiglipConfig(**_halves(parts)))
        elif "VisionTextDualEncoderModel" not in reasons:
            target = VisionTextDualEncoderModel(
                VisionTextDualEncoderConfig(**_halves(parts), projection_dim=config.embedding_dim)
            )
        else:
            target = modeling.DualEncoder(own_config(config, parts))
    own = isinstance(target, modeling.DualEncoder)
    target.to(dtype)
    if own:
        target.config.auto_map = {"AutoConfig": f"{MODELING}.DualEncoderConfig", "AutoModel": f"{MODELING}.DualEncoder"}
    target.save_pretrained(folder, state_dict={})
    # the logarithm of 100 is that of 98.9 in bf16
    exact = ("similarity.log_scale", "similarity.bias") if own else ("logit_scale", "logit_bias")
    write_weights(folder, target, sources(trained, own, isinstance(target, SiglipModel)), dtype, exact)
    if own:
        write_code(folder)
    save_processor(config, parts, folder)
    write_tower(folder / TOWER, trained, dtype)
    return type(target).__name__


def own_config(config: DualEncoderRecipe, parts: DualComponents) -> modeling.DualEncoderConfig:
    model = build_on_meta(config, parts)
    return modeling.DualEncoderConfig(
        **_halves(parts),
        **{f"{part}_head": model.head_arguments[f"{part}_head"] for part in ("vision", "text")},
        image_pooling=config.vision_tower.pooling,
        text_pooling=config.text_tower.pooling,
        text_layers=config.text_tower.pooling_layers,
        text_length=model.text_length,
        text_pad_token_id=parts.tokenizer.pad_token_id,
        max_scale=config.similarity.max_scale,
        has_bias=config.similarity.bias is not None,
        architectures=["DualEncoder"],
    )


def _halves(parts: DualComponents) -> dict[str, Any]:
    return {"vision_config": parts.vision_config.to_dict(), "text_config": parts.text_config.to_dict()}


def sources(trained: Trained, own: bool, bias: bool) -> dict[str, tuple[Mapping[str, Tensor], str]]:
    """By the name in the exported class: where a weight is. What a masked language model has above its encoder is left
    out; the scale is stored as it acts, below its limit. ``bias``: the class has one though the model may not."""
    found: dict[str, tuple[Mapping[str, Tensor], str]] = {}
    for values in (trained.weights, trained.buffers):
        for name in values:
            if (kept := without_output_layer(trained.parts, name)) is not None:
                found[kept] = (values, name)
    similarity = Similarity(trained.config.similarity.temperature, trained.config.similarity.max_scale, None)
    scale = (similarity.start + trained.weights["similarity.log_scale"].float()).clamp(max=similarity.limit)
    found["similarity.log_scale"] = ({"scale": scale}, "scale")
    if bias and "similarity.bias" not in found:
        found["similarity.bias"] = ({"bias": torch.zeros(1)}, "bias")
    if own:
        return found
    return {_renamed(name): source for name, source in found.items()}


def _renamed(name: str) -> str:
    return next((new + name.removeprefix(old) for old, new in NAMES.items() if name.startswith(old)), name)


def without_output_layer(parts: DualComponents, name: str) -> str | None:
    """A name in a masked language model, as it is in its encoder; None of what the encoder does not have."""
    part, _, rest = name.partition(".")
    if part != "text_tower" or not parts.masked:
        return name
    prefix, _, inner = rest.partition(".")
    encoder: Any = transformers.MODEL_MAPPING[type(parts.text_config)]
    return f"text_tower.{inner}" if prefix == encoder.base_model_prefix else None


def write_code(folder: Path) -> None:
    """The modelling code, and the files of `medvlm.models` that it imports, beside it."""
    models = Path(str(medvlm.models.__file__)).parent
    for path in [Path(modeling.__file__), *(models / f"{name}.py" for name in CODE)]:
        text = path.read_text().replace("from medvlm.models.", "from .")
        (folder / path.name).write_text(text)


def save_processor(config: DualEncoderRecipe, parts: DualComponents, folder: Path) -> None:
    tokenizer = copy.deepcopy(parts.tokenizer)
    tokenizer.model_max_length = min(tokenizer.model_max_length, parts.text_limit)
    if fixed_length(config, parts.text_config):
        # as SigLIP's own, whose texts take no mask; the attribute alone is not stored
        tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = ["input_ids"]
    VisionTextDualEncoderProcessor(parts.image_processor, tokenizer).save_pretrained(folder)


def write_tower(folder: Path, trained: Trained, dtype: torch.dtype) -> None:
    """The image tower as a model of its own, such as a language model's vision tower is loaded from. A pooler that the
    dual encoder does without is zero."""
    with torch.device("meta"):
        target = transformers.AutoModel.from_config(trained.parts.vision_config)
    target.to(dtype)
    target.save_pretrained(folder, state_dict={})
    prefix = "vision_tower."
    found: dict[str, tuple[Mapping[str, Tensor], str]] = {
        name.removeprefix(prefix): (values, name)
        for values in (trained.weights, trained.buffers)
        for name in values
        if name.startswith(prefix)
    }
    zeros = {
        n: torch.zeros(p.shape) for n, p in target.named_parameters() if n.startswith("pooler.") and n not in found
    }
    write_weights(folder, target, found | {name: (zeros, name) for name in zeros}, dtype)
    trained.parts.image_processor.save_pretrained(folder)


@torch.no_grad()
def answers(model: DualEncoderModel, parts: DualComponents) -> dict[str, Any]:
    """The training model's embeddings of two pictures and two texts, from raw pixels and characters."""
    size = parts.image_size
    ramp = np.add.outer(np.arange(size + size // 2), np.arange(2 * size))
    files = []
    for seed in range(2):
        noise = np.random.default_rng(seed).integers(0, 64, ramp.shape)
        buffer = io.BytesIO()
        Image.fromarray(((ramp[:: 1 - 2 * seed] * 191 // ramp.max()) + noise).astype(np.uint8)).save(buffer, "png")
        files.append(buffer.getvalue())
    transform = ImageTransform(parts.image_processor, exact=True)
    pictures = torch.stack([transform(data, "probe") for data in files])
    tokens = parts.tokenizer(LABELS, padding=True, truncation=True, max_length=parts.text_limit, return_tensors="pt")
    found = model(pictures, tokens["input_ids"], tokens["attention_mask"])
    image, text = (torch.nn.functional.normalize(found[name], dim=-1) for name in ("image", "text"))
    expected: dict[str, Any] = {
        "png": files,
        "texts": LABELS,
        "ids": [
            row[mask.bool()].tolist() for row, mask in zip(tokens["input_ids"], tokens["attention_mask"], strict=True)
        ],
        "length": model.text_length,
        "pixels": model.pixels(pictures),
        "image": image,
        "text": text,
        "logits": found["scale"] * image @ text.T + found.get("bias", 0.0),
        "patches": model.patch_features(pictures),
        "tower": model.vision_tower(model.pixels(pictures)).last_hidden_state,
    }
    if model.vision_head.prior_image is not None:
        expected["prior"] = model.image_features(pictures, pictures.flip(0), torch.tensor([True, False]))
    return expected


def compare(expected: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A fresh process's answers from a folder beside the training model's. Raises UserError where they differ."""
    with tempfile.TemporaryDirectory() as temporary:
        torch.save(expected, Path(temporary) / "expected.pt")
        proof = fresh_process("verify_dual_encoder.py", folder, Path(temporary) / "expected.pt")
    for name, difference in proof.items():
        if name != "max_abs_pixel_diff" and not difference <= TOLERANCE:
            raise UserError(f"{folder}: {name} is {difference:.2e}, more than {TOLERANCE}")
    return {**proof, "transformers": transformers.__version__}
