"""Towers that transformers and open_clip both build, for `contrastive.py`: CLIP's, or CLIP's images with a BERT."""

import tempfile
from dataclasses import dataclass
from typing import Any

import torch
from transformers import BertConfig

from medvlm.models.dual_encoder import DualEncoderModel


@dataclass(frozen=True)
class Shape:
    """Pixels a side, width of both towers, layers, attention heads, tokens of a text, and vocabulary."""

    image: int
    width: int
    layers: int
    heads: int
    length: int
    vocabulary: int
    bert: bool = False
    patch: int = 16

    @property
    def text(self) -> dict[str, Any]:
        values = {
            "hidden_size": self.width,
            "intermediate_size": 4 * self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.length,
            "pad_token_id": 0,
        }
        if self.bert:
            return {**values, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return {**values, "hidden_act": "gelu", "bos_token_id": 3, "eos_token_id": 4}


SHAPES = {
    "tiny": Shape(32, 64, 2, 1, 16, 100),
    "tiny_bert": Shape(32, 64, 2, 1, 16, 100, bert=True),
    "small": Shape(112, 384, 12, 6, 32, 8192),
    "base": Shape(224, 768, 12, 12, 128, 30522, bert=True),
}


def sections(shape: Shape, tokenizer: str) -> dict[str, Any]:
    """The ``model`` section of a recipe."""
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": shape.width,
        "intermediate_size": 4 * shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "image_size": shape.image,
        "patch_size": shape.patch,
        "hidden_act": "gelu",
    }
    text = {"model_type": "bert" if shape.bert else "clip_text_model", **shape.text}
    pooling = "cls" if shape.bert else "pooler"
    return {
        "family": "dual_encoder",
        "vision_tower": {"config": vision},
        "text_tower": {"config": text, "tokenizer": tokenizer, "pooling": pooling},
        "embedding_dim": shape.width,
    }


def open_clip_model(shape: Shape, source: DualEncoderModel) -> torch.nn.Module:
    """open_clip's own classes with the weights of ours."""
    from open_clip.model import CLIP, CustomTextCLIP

    vision: dict[str, Any] = {"layers": shape.layers, "width": shape.width, "head_width": shape.width // shape.heads}
    vision |= {"patch_size": shape.patch, "image_size": shape.image}
    weights = {key: value.detach() for key, value in source.state_dict().items()}
    found = {"logit_scale": source.similarity()[0].detach().log()}
    found |= _tower(weights, "vision_tower.", "visual.", shape.layers)
    found["visual.proj"] = weights["vision_head.linear_1.weight"].T
    if not shape.bert:
        text = {"context_length": shape.length, "vocab_size": shape.vocabulary, "width": shape.width}
        text |= {"heads": shape.heads, "layers": shape.layers, "pool_type": "eos", "eos_id": 4}
        model: torch.nn.Module = CLIP(shape.width, vision, text, output_dict=True)
        found |= _tower(weights, "text_tower.", "", shape.layers)
        found["text_projection"] = weights["text_head.linear_1.weight"].T
    else:
        with tempfile.TemporaryDirectory() as folder:  # it takes its configuration from a folder
            BertConfig(**shape.text).save_pretrained(folder)
            text = {"hf_model_name": folder, "hf_model_pretrained": False, "hf_proj_type": "linear"}
            text |= {"hf_pooler_type": "cls_last_hidden_state_pooler"}
            model = CustomTextCLIP(shape.width, vision, text, output_dict=True)
        own = {k.removeprefix("text_tower."): v for k, v in weights.items() if k.startswith("text_tower.")}
        found |= {f"text.transformer.{key}": value for key, value in own.items()}
        found["text.proj.weight"] = weights["text_head.linear_1.weight"]
    missing, unexpected = model.load_state_dict(found, strict=False)
    assert not unexpected and set(missing) <= {"attn_mask", "text.transformer.embeddings.position_ids"}, missing
    return model


def _tower(weights: dict[str, torch.Tensor], own: str, theirs: str, layers: int) -> dict[str, torch.Tensor]:
    names = {
        "embeddings.class_embedding": "class_embedding",
        "embeddings.patch_embedding.weight": "conv1.weight",
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
    }
    norms = {"pre_layrnorm": "ln_pre", "post_layernorm": "ln_post", "final_layer_norm": "ln_final"}
    names |= {f"{a}.{kind}": f"{b}.{kind}" for a, b in norms.items() for kind in ("weight", "bias")}
    found = {theirs + b: weights[own + a] for a, b in names.items() if own + a in weights}
    parts = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj"}
    parts |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    for n in range(layers):
        layer, block = f"{own}encoder.layers.{n}.", f"{theirs}transformer.resblocks.{n}."
        for kind in ("weight", "bias"):
            found |= {f"{block}{b}.{kind}": weights[f"{layer}{a}.{kind}"] for a, b in parts.items()}
            rows = [weights[f"{layer}self_attn.{name}_proj.{kind}"] for name in "qkv"]
            found[f"{block}attn.in_proj_{kind}"] = torch.cat(rows)
    return found
