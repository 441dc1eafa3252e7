"""Run as a script in a fresh process: an exported dual encoder through unmodified transformers, compared with the
training model's answers.

Imports nothing of medvlm, on purpose. Prints one JSON line; exits non-zero where weights are missing or left over, or
token ids differ.
"""

import io
import json
import sys
from pathlib import Path
from typing import Any


def loaded(folder: Path, **options: Any) -> Any:
    """A model by ``AutoModel``, with exactly the weights of its folder."""
    import torch
    from transformers import AutoModel

    model, info = AutoModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **options)
    if info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]:
        sys.exit(f"{folder}: {', '.join(f'{name} {sorted(map(str, keys))}' for name, keys in info.items() if keys)}")
    return model.eval()


def main(folder: Path, answers: Path) -> None:
    import torch
    from PIL import Image
    from transformers import AutoImageProcessor, AutoProcessor

    own = "auto_map" in json.loads((folder / "config.json").read_text())
    options: dict[str, Any] = {"trust_remote_code": True} if own else {}
    model = loaded(folder, **options)
    processor: Any = AutoProcessor.from_pretrained(folder, **options)
    tokenizer = processor.tokenizer
    expected = torch.load(answers)
    if (ids := tokenizer(expected["texts"], truncation=True)["input_ids"]) != expected["ids"]:
        sys.exit(f"the tokenizer's ids {ids} differ from training's {expected['ids']}")
    images = [Image.open(io.BytesIO(data)).convert("RGB") for data in expected["png"]]
    length = {"padding": "max_length", "max_length": expected["length"]} if expected["length"] else {"padding": True}
    inputs = processor(text=expected["texts"], images=images, truncation=True, return_tensors="pt", **length)
    tower = loaded(folder / "vision_tower")
    its = AutoImageProcessor.from_pretrained(folder / "vision_tower")(images=images, return_tensors="pt")[
        "pixel_values"
    ]
    found: dict[str, Any] = {}
    with torch.no_grad():
        output = model(**inputs)
        found["image"], found["text"], found["logits"] = (
            output.image_embeds,
            output.text_embeds,
            output.logits_per_image,
        )
        found["tower"] = tower(its).last_hidden_state
        if own:
            found["patches"] = model.get_image_patch_features(inputs["pixel_values"])
        if "prior" in expected:
            pixels = inputs["pixel_values"]
            priors = (pixels.flip(0), torch.tensor([True, False]))
            found["prior"] = model.get_image_features(pixels, *priors).pooler_output

    def difference(name: str) -> float:
        """Of embeddings as they are, of other values relative to the largest."""
        scale = 1.0 if name in ("image", "text") else max(1.0, float(expected[name].abs().max()))
        return float((found[name] - expected[name]).abs().max()) / scale

    pixels = float((inputs["pixel_values"] - expected["pixels"]).abs().max())
    print(json.dumps({f"max_abs_{name}_diff": difference(name) for name in found} | {"max_abs_pixel_diff": pixels}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
