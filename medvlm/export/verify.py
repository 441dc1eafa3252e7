"""Run as a script in a fresh process: an export through unmodified transformers, compared with the expected logits.

Imports nothing of medvlm, on purpose. Prints one JSON line; exits non-zero on any difference in the token ids.
"""

import json
import sys
from pathlib import Path
from typing import Any


def main(folder: str, work: Path, question: str, adapter: str | None = None) -> None:
    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    own = "auto_map" in json.loads((Path(folder) / "config.json").read_text())
    options: dict[str, Any] = {"trust_remote_code": True} if own else {}
    loaded: Any = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **options
    )
    model, info = loaded
    if info["missing_keys"] or info["unexpected_keys"]:
        sys.exit(f"missing {sorted(info['missing_keys'])}, unexpected {sorted(info['unexpected_keys'])}")
    processor = AutoProcessor.from_pretrained(adapter or folder, **options)
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter).eval()
    expected = torch.load(work / "expected.pt")
    differences, pixel_difference = [], 0.0
    for name in ("image", "text"):
        content = [{"type": "image"}] * (name == "image") + [{"type": "text", "text": question}]
        messages = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": "No."}]},
        ]
        text = processor.apply_chat_template(messages, tokenize=False)
        images = [Image.open(work / "image.png").convert("RGB")] if name == "image" else None
        inputs = processor(text=text, images=images, return_tensors="pt", add_special_tokens=False)
        if inputs["input_ids"].tolist() != expected[f"{name}_ids"].tolist():
            sys.exit(f"the processor's token ids differ from training's for {text!r}")
        if images:
            processor_of = processor.image_processor
            mean = torch.tensor(processor_of.image_mean).view(1, 3, 1, 1)
            std = torch.tensor(processor_of.image_std).view(1, 3, 1, 1)
            trained_on = (expected["pixels"].float() / 255 - mean) / std
            pixel_difference = float((inputs["pixel_values"] - trained_on).abs().max())
        with torch.no_grad():
            logits = model(**inputs).logits
        differences.append(float((logits - expected[f"{name}_logits"]).abs().max()))
    print(json.dumps({"max_abs_logit_diff": max(differences), "max_abs_pixel_diff": pixel_difference}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
