"""Small dual encoders for tests: a tokenizer with special tokens, towers of each kind, and their recipes' sections."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from toy import CLIP, SIGLIP, override
from transformers import PreTrainedTokenizerFast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from medvlm.config.model import DualEncoder

WORDS = [
    "no",
    "the",
    "left",
    "right",
    "lung",
    "is",
    "heart",
    "normal",
    "enlarged",
    "effusion",
    "pneumonia",
    "small",
    "large",
    "new",
    "stable",
]
SPECIAL = ["[PAD]", "[UNK]", "[MASK]", "[CLS]", "[SEP]"]
BERT = {
    "model_type": "bert",
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "vocab_size": len(SPECIAL) + len(WORDS),
    "max_position_embeddings": 40,
    "initializer_range": 0.2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
TEXT = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": BERT["vocab_size"],
    "max_position_embeddings": 20,
    "bos_token_id": 3,
    "eos_token_id": 4,
    "pad_token_id": 0,
}
CLIP_TEXT = {**TEXT, "model_type": "clip_text_model"}
SIGLIP_TEXT = {**TEXT, "model_type": "siglip_text_model", "projection_size": 32}
VIT = {**SIGLIP, "model_type": "vit", "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DINOV2 = {**SIGLIP, "model_type": "dinov2", "mlp_ratio": 2}
SWIN = {
    "model_type": "swin",
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "window_size": 4,
    "drop_path_rate": 0.0,
}
RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1]}
VISION = {"vit": VIT, "clip": CLIP, "siglip": SIGLIP, "dinov2": DINOV2, "swin": SWIN, "resnet": RESNET}


def make_bert_tokenizer(folder: Path) -> Path:
    """Words are tokens; a text becomes [CLS] text [SEP]."""
    tokens = {token: n for n, token in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 3), ("[SEP]", 4)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        mask_token="[MASK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        bos_token="[CLS]",
        eos_token="[SEP]",
        model_max_length=20,
    ).save_pretrained(folder)
    return folder


def dual_values(folder: Path, vision: dict = VIT, text: dict = BERT, **overrides: Any) -> dict[str, Any]:
    """The ``model`` section of a recipe; overrides are dotted keys with ``__`` for the dots."""
    if not (folder / "bert-tokenizer").exists():
        make_bert_tokenizer(folder / "bert-tokenizer")
    values: dict[str, Any] = {
        "family": "dual_encoder",
        "vision_tower": {"config": vision},
        "text_tower": {"config": text, "tokenizer": str(folder / "bert-tokenizer")},
        "vision_head": {},
        "text_head": {},
        "similarity": {},
        "embedding_dim": 16,
    }
    if vision["model_type"] == "resnet":
        values["vision_tower"]["image_size"] = 32
    override(values, overrides)
    return values


def dual_config(folder: Path, vision: dict = VIT, text: dict = BERT, **overrides: Any) -> DualEncoder:
    return DualEncoder.model_validate(dual_values(folder, vision, text, **overrides))


@contextmanager
def attending_to_one(tower: Any, token: int) -> Iterator[None]:
    """Every token attends to this one alone in the last layer of a vision transformer."""
    usual, name = ALL_ATTENTION_FUNCTIONS["sdpa"], tower.config._attn_implementation
    *_, last = (m for path, m in tower.named_modules() if path.endswith((".attention", ".self_attn")))

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        if module is not last:
            return usual(module, query, key, value, mask, **options)
        return value[:, :, [token]].transpose(1, 2).expand(-1, query.shape[2], -1, -1), None

    ALL_ATTENTION_FUNCTIONS.register("to_one_token", attention)
    tower.config._attn_implementation = "to_one_token"
    try:
        yield
    finally:
        tower.config._attn_implementation = name
