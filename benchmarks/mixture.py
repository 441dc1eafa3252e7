"""Synthetic shards with the lengths of a medical mixture, a tokenizer, and a recipe over them, for the benchmarks.

60 % questions about an image of 576 tokens (20 to 60 tokens of text), 25 % reports of one (about 200), 15 % text only
(20 to 1500). Images are 336 x 336 JPEG noise around a gradient; what they show does not matter here.
"""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from medvlm.data.schema import Sample
from medvlm.data.shards import write_shards

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'Q: ' + m['content'] + '\n' }}"
    "{% else %}{{ 'A: ' + m['content'] + eos_token + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}"
)


def make_tokenizer(folder: Path) -> Path:
    """Bytes only, but for the word " w": a text of n of them has n tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<s>", "</s>", "<pad>", *alphabet, "Ġw"]
    model = models.BPE({name: n for n, name in enumerate(names)}, [("Ġ", "w")])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=TEMPLATE
    )
    fast.save_pretrained(folder)
    return folder


def lengths(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of n samples: words asked, words answered, and whether there is an image."""
    rng = np.random.default_rng(seed)
    kind = rng.random(n)
    answer = np.where(kind < 0.6, rng.integers(1, 20, n), np.clip(rng.normal(180, 60, n), 40, 480))
    answer = np.where(kind < 0.85, answer, rng.integers(10, 1300, n))
    asked = np.where(kind < 0.85, rng.integers(10, 35, n), rng.integers(10, 180, n))
    return asked.astype(int), answer.astype(int), kind < 0.85


def make_shards(folder: Path, count: int, side: int = 336) -> Path:
    """``side`` 0: no images, and the lengths of the text alone."""
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(8 if side else 0):
        ramp = np.add.outer(np.arange(side), np.arange(side)) * (180 / (2 * side))
        buffer = io.BytesIO()
        Image.fromarray((ramp + rng.normal(20, 8, ramp.shape)).clip(0, 255).astype(np.uint8)).save(buffer, "jpeg")
        pictures.append(buffer.getvalue())

    def items() -> Iterator[tuple[Sample, dict[str, bytes]]]:
        for n, (asked, answer, image) in enumerate(zip(*lengths(count), strict=True)):
            image = image and side > 0
            lead = "<image>\n" if image else ""
            fields = {
                "key": f"s{n:06d}",
                "source": "synthetic",
                "license": "CC0-1.0",
                "split": "train",
                "images": [{"file": "0.jpg", "width": side, "height": side}] if image else [],
                "messages": [
                    {"role": "user", "content": lead + "w" + " w" * int(asked)},
                    {"role": "assistant", "content": "w" + " w" * int(answer)},
                ],
            }
            yield Sample.model_validate(fields), {"0.jpg": pictures[n % 8]} if image else {}

    write_shards(items(), folder, "train", 500)
    return folder


def make_recipe(folder: Path, name: str, model: dict[str, Any], data: dict[str, Any], training: dict[str, Any]) -> Path:
    """``model`` gives ``vision_tower`` and ``language_model`` sections; tokenizer and shards lie in ``folder``."""
    model["language_model"].setdefault("tokenizer", str(folder / "tokenizer"))
    values = {
        "run": {"name": name, "root": str(folder / "runs"), "trackers": []},
        "model": model,
        "data": {"train": [str(folder / "shards")], "workers": 2, "max_length": 2048, **data},
        "training": training,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path
