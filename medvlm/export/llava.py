"""A run's checkpoint -> a stock ``LlavaForConditionalGeneration`` folder, proven by a fresh process; of a convolutional
tower, which that class does not take, one that brings `llava_modeling` along.

Settings that make the export exact (single linear projector, towers without CLS) are transformers' own fields.
"""

import io
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import GenerationConfig, LlavaConfig, LlavaForConditionalGeneration

from medvlm.config.schema import RunConfig
from medvlm.data.conversation import ConversationEncoder
from medvlm.data.images import ImageTransform
from medvlm.data.schema import make_message
from medvlm.errors import UserError
from medvlm.export import llava_modeling as modeling
from medvlm.export.model_card import model_card
from medvlm.export.writing import TOLERANCE, fresh_process, open_run, pretrained_parts, stored_buffers, write_weights
from medvlm.models.backbones import CONVOLUTIONAL
from medvlm.models.build import Components, build_components, build_plain_model, load_backbone
from medvlm.models.lora import add_adapters
from medvlm.models.vision_language_model import VisionLanguageModel
from medvlm.training import checkpoint

QUESTION = "Is there a pleural effusion?"


def export_run(run: Path, out: Path, tag: str | None = None, ema: bool = False, prove: bool = True) -> dict[str, Any]:
    """Export a run's checkpoint (the newest, or ``tag``), or its moving average, to ``out``; returns what was proven.

    Weights go from the checkpoint to ``out`` one by one. The proof needs the model in memory, once; without it names,
    shapes and the checkpoint's checksums are what is checked. Raises UserError if the fresh process's logits differ by
    more than 1e-5 in fp32; ``out`` is then not written.
    """
    config, source = open_run(run, out, tag)
    parts = build_components(config.llava)
    weights = checkpoint.consolidate(source, ema=ema)
    frozen = pretrained_parts(weights, config.llava, partial(load_backbone, config.llava, parts))
    values = checkpoint.StockWeights(weights, merge=True, built=frozen)
    expected = answers(trained_model(config, parts, weights), parts) if prove else None
    buffers = tower_buffers(parts, source)

    staging = checkpoint.new_folder(out)
    bf16 = checkpoint.read_manifest(source)["bf16"]
    dtype = torch.float32 if prove or not bf16 else torch.bfloat16
    kind = write_llava(staging, values, parts, config, dtype, buffers)
    proof = None
    if expected:
        proof = {**compare(expected, staging), "stored": "bf16" if bf16 else "fp32"}
        if bf16:  # proven in fp32, published in the type it was trained in
            for path in staging.glob("model*"):
                path.unlink()
            write_llava(staging, values, parts, config, torch.bfloat16, buffers)
    (staging / "README.md").write_text(model_card(config, source.name, kind, proof))
    checkpoint.finish_folder(staging, out)
    return {"path": str(out), "checkpoint": str(source), "class": kind, **(proof or {"proof": "left out"})}


def trained_model(config: RunConfig, parts: Components, weights: checkpoint.Weights) -> VisionLanguageModel:
    """The model of a run with the weights of its checkpoint, in fp32, on one process."""
    model = build_plain_model(config.llava, parts, config.run.seed)
    add_adapters(model, config.model, parts.unused, config.run.seed)
    checkpoint.load_weights(model, weights, str(weights.path))
    return model.eval()


def tower_buffers(parts: Components, source: Path) -> dict[str, Tensor]:
    """The vision tower's running statistics in a checkpoint, by our names."""
    with torch.device("meta"):
        tower = transformers.AutoModel.from_config(parts.vision_config)
    return stored_buffers(tower, source, "vision_tower.")


def llava_config(parts: Components, config: RunConfig, cls: type[LlavaConfig] = LlavaConfig) -> LlavaConfig:
    tower = config.llava.vision_tower
    linear = config.llava.multi_modal_projector.kind == "linear"
    return cls(
        vision_config=parts.vision_config,
        text_config=parts.text_config,
        image_token_index=parts.image_token_id,
        image_seq_length=parts.image_tokens,
        projector_hidden_act="linear" if linear else "gelu",
        vision_feature_layer=tower.feature_layer,
        vision_feature_select_strategy=tower.select_strategy,
        multimodal_projector_bias=True,
        tie_word_embeddings=bool(getattr(parts.text_config, "tie_word_embeddings", False)),
    )


def write_llava(
    folder: Path,
    values: Mapping[str, Tensor],
    parts: Components,
    config: RunConfig,
    dtype: torch.dtype = torch.float32,
    buffers: Mapping[str, Tensor] | None = None,
) -> str:
    """A folder of transformers' own class, or of one with its code, whose name is returned. Weights are ``values``,
    and ``buffers`` those of the tower, both ours by name; each is asked for once, when it is written, so a mapping that
    reads them from elsewhere needs memory for one at a time.

    Raises UserError if they are not exactly the weights of that class.
    """
    own = parts.vision_config.model_type == CONVOLUTIONAL
    with torch.device("meta"):
        if own:
            target: Any = modeling.ConvolutionalLlava(llava_config(parts, config, modeling.ConvolutionalLlavaConfig))
            target.config.auto_map = {
                "AutoConfig": "llava_modeling.ConvolutionalLlavaConfig",
                "AutoModelForImageTextToText": "llava_modeling.ConvolutionalLlava",
            }
        else:
            target = LlavaForConditionalGeneration(llava_config(parts, config))
    target.to(dtype)  # type: ignore[arg-type]
    target.generation_config = GenerationConfig(
        eos_token_id=_stop_tokens(parts), pad_token_id=parts.tokenizer.pad_token_id, do_sample=False
    )
    target.save_pretrained(folder, state_dict={})
    if own:
        shutil.copy(modeling.__file__, folder)
    parts.processor.save_pretrained(folder)
    identity = dict(values_of_identity(config, parts))
    sources = {stock_name(name): (held, name) for held in (values, buffers or {}, identity) for name in held}
    write_weights(folder, target, sources, dtype)
    return type(target).__name__


def values_of_identity(config: RunConfig, parts: Components) -> Iterator[tuple[str, Tensor]]:
    """The stock projector has a second layer, which a single linear projector leaves as the identity."""
    if config.llava.multi_modal_projector.kind == "linear":
        dim = parts.text_config.hidden_size
        yield "multi_modal_projector.linear_2.weight", torch.eye(dim)
        yield "multi_modal_projector.linear_2.bias", torch.zeros(dim)


def stock_name(name: str) -> str:
    """Of a parameter or layer of ours in ``LlavaForConditionalGeneration``."""
    part, _, rest = name.partition(".")
    if part != "language_model":
        return f"model.{name}"
    return rest if rest.startswith("lm_head") else f"model.{part}.{rest.removeprefix('model.')}"


def _stop_tokens(parts: Components) -> list[int]:
    """The token that the chat template ends an assistant turn with, and the tokenizer's end of text."""
    turns = [make_message("user", "a"), make_message("assistant", "b")]
    encoder = ConversationEncoder(parts.tokenizer, parts.chat_template, parts.image_tokens)
    labels = [label for label in encoder(turns)[1] if label >= 0]
    stops = {labels[-1], parts.tokenizer.eos_token_id}
    return sorted(s for s in stops if s is not None)


def verify(model: VisionLanguageModel, parts: Components, folder: Path, adapter: Path | None = None) -> dict[str, Any]:
    """Compare the training model with the folder as unmodified transformers loads it in a fresh process.

    ``adapter``: a PEFT folder that unmodified ``peft`` puts on it.
    """
    return compare(answers(model, parts), folder, adapter)


def answers(model: VisionLanguageModel, parts: Components) -> dict[str, Any]:
    """The training model's logits of two samples, with an image and without, from raw pixels and messages."""
    size = parts.image_size
    ramp = np.add.outer(np.arange(size + size // 2), np.arange(2 * size))
    noise = np.random.default_rng(0).integers(0, 64, ramp.shape)
    png = io.BytesIO()
    Image.fromarray(((ramp * 191 // ramp.max()) + noise).astype(np.uint8)).save(png, "png")
    encoder = ConversationEncoder(parts.tokenizer, parts.chat_template, parts.image_tokens)
    transform = ImageTransform(parts.processor.image_processor, exact=True)
    expected: dict[str, Any] = {"png": png.getvalue()}
    for name, lead in (("image", "<image>\n"), ("text", "")):
        turns = [make_message("user", lead + QUESTION), make_message("assistant", "No.")]
        ids, _ = encoder(turns)
        pixels = transform(png.getvalue(), "probe")[None] if lead else torch.zeros(0, 3, size, size).byte()
        expected[f"{name}_ids"] = torch.tensor([ids])
        expected[f"{name}_logits"] = model.logits(torch.tensor([ids]), pixels)
        if lead:
            expected["pixels"] = pixels
    return expected


def compare(expected: dict[str, Any], folder: Path, adapter: Path | None = None) -> dict[str, Any]:
    """A fresh process's answers from a folder beside the training model's. Raises UserError where they differ."""
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        (work / "image.png").write_bytes(expected["png"])
        torch.save({key: value for key, value in expected.items() if key != "png"}, work / "expected.pt")
        proof = fresh_process("verify.py", folder, work, QUESTION, *([adapter] if adapter else []))
    if not proof["max_abs_logit_diff"] <= TOLERANCE:
        raise UserError(f"{folder}: exported logits differ by {proof['max_abs_logit_diff']:.2e}, more than {TOLERANCE}")
    return {**proof, "transformers": transformers.__version__}
