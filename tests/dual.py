"""Small random dual encoders of transformers' own classes, in folders with tokenizer and image processor."""

from pathlib import Path

import torch
from tokenizers.processors import TemplateProcessing
from toy import make_tokenizer
from transformers import (
    AutoTokenizer,
    BertConfig,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    Dinov2Config,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipVisionConfig,
    SwinConfig,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    ViTConfig,
    ViTImageProcessor,
)

SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
KINDS = ("clip", "siglip", "vit-bert")
TOWERS = {
    "vit": ViTConfig,
    "clip": CLIPVisionConfig,
    "dinov2": Dinov2Config,
    "siglip": SiglipVisionConfig,
    "swin": lambda **v: SwinConfig(
        image_size=32, patch_size=2, embed_dim=8, depths=[1, 1, 1], num_heads=[1, 1, 2], window_size=4
    ),
}


def make_dual(folder: Path, kind: str = "clip", seed: int = 0, positions: int = 64) -> Path:
    """32 px images in patches of 8, 16 joint dimensions. CLIP's processor cuts the centre out; the others squeeze."""
    tokenizer = AutoTokenizer.from_pretrained(make_tokenizer(folder.with_name(folder.name + "-tokenizer")))
    # CLIP reads the text at its end, the others at its first or last token
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    ends = {"bos_token_id": 1, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 3}
    frame = TemplateProcessing(single="<s> $A <end>", special_tokens=[("<s>", 1), ("<end>", ends["eos_token_id"])])
    tokenizer.backend_tokenizer.post_processor = frame
    vision = {**SIZE, "image_size": 32, "patch_size": 8, "initializer_range": 0.2}
    text = {**SIZE, "vocab_size": len(tokenizer), "max_position_embeddings": positions, "initializer_range": 0.2}
    torch.manual_seed(seed)
    square = {"height": 32, "width": 32}
    if kind == "clip":
        config = CLIPConfig(vision_config=vision, text_config={**text, **ends}, projection_dim=16)
        model, processor = CLIPModel(config), CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=square)
    elif kind == "siglip":
        config = SiglipConfig(vision_config=vision, text_config={**text, **ends, "projection_size": 32})
        model, processor = SiglipModel(config), SiglipImageProcessor(size=square)
    else:
        config = VisionTextDualEncoderConfig.from_vision_text_configs(
            TOWERS[kind.removesuffix("-bert")](**vision), BertConfig(**text, pad_token_id=3), projection_dim=16
        )
        model, processor = VisionTextDualEncoderModel(config), ViTImageProcessor(size=square)
    with torch.no_grad():  # far from symmetric, so that a wrong head or order changes what is measured
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "layrnorm.weight", "norm.bias", "layrnorm.bias", "layernorm.bias")):
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
