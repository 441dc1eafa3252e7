"""A run's checkpoint -> a stock ``LlavaForConditionalGeneration`` folder, proven by a fresh process.

Settings that make the export exact (single linear projector, towers without CLS) are transformers' own fields.
"""

import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import yaml
from PIL import Image
from transformers import GenerationConfig, LlavaConfig, LlavaForConditionalGeneration

from medvlm.config.schema import RunConfig
from medvlm.data.conversation import ConversationEncoder
from medvlm.data.images import ImageTransform
from medvlm.data.schema import make_message
from medvlm.errors import UserError
from medvlm.export.model_card import model_card
from medvlm.models.build import Components, build_components, build_plain_model
from medvlm.models.lora import add_adapters, merged
from medvlm.models.vision_language_model import VisionLanguageModel
from medvlm.training import checkpoint

TOLERANCE = 1e-5
QUESTION = "Is there a pleural effusion?"


def export_run(run: Path, out: Path, tag: str | None = None, ema: bool = False) -> dict[str, Any]:
    """Export a run's checkpoint (the newest, or ``tag``), or its moving average, to ``out``; returns what was proven.

    Raises UserError if the fresh process's logits differ by more than 1e-5 in fp32; ``out`` is then not written.
    """
    config, source = open_run(run, out, tag)
    parts = build_components(config.model)
    model = build_plain_model(config.model, parts, config.run.seed)
    add_adapters(model, config.model, parts.unused_vision_parameters, config.run.seed)
    checkpoint.load_weights(model, checkpoint.consolidate(source, ema=ema), str(source))
    model.eval()

    staging = out.with_name(out.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    bf16 = checkpoint.read_manifest(source)["bf16"]
    to_llava(model, parts, config).save_pretrained(staging)
    parts.processor.save_pretrained(staging)
    proof = verify(model, parts, staging)
    if bf16:  # proven in fp32, published in the type it was trained in
        to_llava(model, parts, config).bfloat16().save_pretrained(staging)
    (staging / "README.md").write_text(model_card(config, source.name, proof))
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.exists():
        out.rmdir()
    os.rename(staging, out)
    return {"path": str(out), "checkpoint": str(source), **proof}


def open_run(run: Path, out: Path, tag: str | None) -> tuple[RunConfig, Path]:
    """Configuration and checkpoint folder of a run. Raises UserError where one is absent, or ``out`` is in use."""
    if not (run / "config.yaml").exists():
        raise UserError(f"{run}: is not a run (it has no config.yaml)")
    config = RunConfig.model_validate(yaml.safe_load((run / "config.yaml").read_text()))
    source = run / "checkpoints" / tag if tag else checkpoint.newest(run)
    if source not in checkpoint.checkpoints(run):
        raise UserError(f"{source}: no such complete checkpoint")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: exists and is not empty")
    return config, source


def llava_config(parts: Components, config: RunConfig) -> LlavaConfig:
    tower = config.model.vision_tower
    linear = config.model.multi_modal_projector.kind == "linear"
    return LlavaConfig(
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


def to_llava(model: VisionLanguageModel, parts: Components, config: RunConfig) -> LlavaForConditionalGeneration:
    """The same weights in transformers' class, fp32, adapters merged."""
    target = LlavaForConditionalGeneration(llava_config(parts, config))
    state = {stock_name(name): tensor for name, tensor in merged(model.state_dict(), config.model)}
    if config.model.multi_modal_projector.kind == "linear":  # the stock projector has a second layer: the identity
        dim = parts.text_config.hidden_size
        state["model.multi_modal_projector.linear_2.weight"] = torch.eye(dim)
        state["model.multi_modal_projector.linear_2.bias"] = torch.zeros(dim)
    target.load_state_dict(state, strict=True)
    target.generation_config = GenerationConfig(
        eos_token_id=_stop_tokens(parts), pad_token_id=parts.tokenizer.pad_token_id, do_sample=False
    )
    return target.eval()


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

    Two samples (one image, no image) go from raw pixels and messages to logits on both sides, each by its own route.
    """
    size = parts.image_size
    ramp = np.add.outer(np.arange(size + size // 2), np.arange(2 * size))
    noise = np.random.default_rng(0).integers(0, 64, ramp.shape)
    png = io.BytesIO()
    Image.fromarray(((ramp * 191 // ramp.max()) + noise).astype(np.uint8)).save(png, "png")
    encoder = ConversationEncoder(parts.tokenizer, parts.chat_template, parts.image_tokens)
    transform = ImageTransform(parts.processor.image_processor, exact=True)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        (work / "image.png").write_bytes(png.getvalue())
        expected = {}
        for name, lead in (("image", "<image>\n"), ("text", "")):
            turns = [make_message("user", lead + QUESTION), make_message("assistant", "No.")]
            ids, _ = encoder(turns)
            pixels = transform(png.getvalue(), "probe")[None] if lead else torch.zeros(0, 3, size, size).byte()
            expected[f"{name}_ids"] = torch.tensor([ids])
            expected[f"{name}_logits"] = model.logits(torch.tensor([ids]), pixels)
            if lead:
                expected["pixels"] = pixels
        torch.save(expected, work / "expected.pt")
        script = Path(__file__).with_name("verify.py")
        done = subprocess.run(
            [sys.executable, str(script), str(folder), str(work), QUESTION, *([str(adapter)] if adapter else [])],
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise UserError(
            f"{folder}: the export does not load in a fresh process: {done.stderr.strip().splitlines()[-1]}"
        )
    proof = json.loads(done.stdout.strip().splitlines()[-1])
    if not proof["max_abs_logit_diff"] <= TOLERANCE:
        raise UserError(f"{folder}: exported logits differ by {proof['max_abs_logit_diff']:.2e}, more than {TOLERANCE}")
    return {**proof, "transformers": transformers.__version__}
