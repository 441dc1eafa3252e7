"""Small real inputs for tests: a tokenizer, shards with images, text-only samples and long answers, and recipes."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from medvlm.data.schema import Sample
from medvlm.data.shards import write_shards
from medvlm.data.volumes import encode_volume

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'Q: ' + m['content'] + '\n' }}"
    "{% elif m['role'] == 'assistant' %}{{ 'A: ' + m['content'] + eos_token + '\n' }}"
    "{% else %}{{ m['content'] + '\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}"
)
WORDS = "is there an effusion on the left right yes no heart enlarged normal image of report findings Q: A: text only"
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "initializer_range": 0.1,
}
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}
CLIP = {**SIGLIP, "model_type": "clip_vision_model"}


def make_tokenizer(folder: Path, template: str | None = TEMPLATE) -> Path:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS] * 20, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.chat_template = template
    fast.save_pretrained(folder)
    return folder


def png(seed: int, size: int = 40) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def sample(i: int, images: int, answers: list[str], **values: Any) -> tuple[Sample, dict[str, bytes]]:
    messages = []
    for n, answer in enumerate(answers):
        lead = "<image>\n" * images if n == 0 else ""
        messages += [{"role": "user", "content": f"{lead}is there an effusion {n}"}]
        messages += [{"role": "assistant", "content": answer, "answer_type": "closed"}]
    fields = {
        "key": f"s{i:04d}",
        "source": "toy",
        "license": "CC0-1.0",
        "split": "train",
        "patient_id": f"p{i}",
        "images": [{"file": f"{n}.png", "width": 40, "height": 40} for n in range(images)],
        "messages": messages,
        **values,
    }
    return Sample.model_validate(fields), {f"{n}.png": png(100 * i + n) for n in range(images)}


def volume_sample(i: int, depth: int, windows: int = 0, picture: bool = False) -> tuple[Sample, dict[str, bytes]]:
    """A question about a volume, int16 or uint8 with ``windows`` channels, after one about a ``picture``."""
    rng = np.random.default_rng(i)
    shape = (windows, depth, 40, 40) if windows else (depth, 40, 40)
    array = rng.integers(0, 256, shape).astype(np.uint8 if windows else np.int16)
    listed = [{"file": "0.b2", "width": 40, "height": 40, "depth": depth}]
    data = {"0.b2": encode_volume(array)}
    if picture:
        listed.insert(0, {"file": "0.png", "width": 40, "height": 40})
        listed[1]["file"] = "1.b2"
        data = {"0.png": png(i), "1.b2": data["0.b2"]}
    made, _ = sample(i, len(listed), ["no effusion on the left " * (i % 3) + "no"])
    return Sample.model_validate({**made.model_dump(), "images": listed}), data


def make_shards(folder: Path, count: int = 24, images: Any = lambda i: (1, 0, 2, 1)[i % 4]) -> Path:
    """Uneven on purpose: one image, none, several; answers from one to many tokens."""
    items = (
        sample(i, images(i), ["yes", "no effusion on the left " * (i % 5) + "no"][: 1 + i % 2]) for i in range(count)
    )
    write_shards(items, folder, "toy", 10)
    return folder


def override(values: dict[str, Any], changes: dict[str, Any]) -> None:
    """In place; keys are dotted, with ``__`` for the dots, and None removes."""
    for key, value in changes.items():
        *sections, last = key.split("__")
        target = values
        for section in sections:
            target = target[section]
        if value is None:
            target.pop(last, None)
        else:
            target[last] = value


def make_recipe(folder: Path, name: str = "run", **overrides: Any) -> Path:
    """A recipe on toy data under ``folder``; overrides are dotted keys with ``__`` for the dots."""
    values: dict[str, Any] = {
        "run": {"name": name, "root": str(folder / "runs"), "trackers": []},
        "model": {
            "vision_tower": {"config": SIGLIP, "feature_layer": -1, "select_strategy": "full", "learning_rate": 3e-3},
            "multi_modal_projector": {"learning_rate": 3e-3},
            "language_model": {"config": LLAMA, "tokenizer": str(folder / "tokenizer"), "learning_rate": 3e-3},
        },
        "data": {"train": [str(folder / "shards")], "workers": 0, "max_length": 256},
        "training": {
            "zero": "zero3",
            "precision": "fp32",
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "steps": 4,
            "weight_decay": 0.05,
        },
    }
    override(values, overrides)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def make_world(folder: Path, **options: Any) -> Path:
    make_tokenizer(folder / "tokenizer")
    make_shards(folder / "shards", **options)
    return folder
