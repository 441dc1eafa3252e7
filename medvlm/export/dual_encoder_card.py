"""The README.md of an exported dual encoder."""

from typing import Any

from medvlm.config.model import DualEncoder
from medvlm.config.schema import RunConfig
from medvlm.export.model_card import origin, rounded
from medvlm.models.build_dual_encoder import DualComponents

LABELS = ["No pleural effusion.", "There is a pleural effusion on the left."]


def dual_encoder_card(
    config: RunConfig, parts: DualComponents, kind: str, checkpoint: str, proof: dict[str, Any] | None
) -> str:
    model = config.model
    assert isinstance(model, DualEncoder)
    own = kind == "DualEncoder"
    trust = ", trust_remote_code=True" if own else ""
    code = "`AutoModel` with the code in this folder" if own else f"A `{kind}`"
    fixed = parts.text_config.model_type == "siglip_text_model" and model.text_tower.pooling == "pooler"
    padding = f'"max_length", max_length={parts.text_limit}' if fixed else "True"
    chance = "sigmoid()" if model.similarity.bias is not None else "softmax(-1)"
    data = "\n".join(f"- `{source.path}`" for source in config.data.sources)
    rows = [
        f"| image tower | {origin(model.vision_tower)}, {model.vision_tower.pooling} | {model.vision_tower.train} |",
        f"| image head | {model.vision_head.kind} | {model.vision_head.train} |",
        f"| text tower | {origin(model.text_tower)}, {model.text_tower.pooling} | {model.text_tower.train} |",
        f"| text head | {model.text_head.kind} | {model.text_head.train} |",
    ]
    table = "\n".join(rows)
    objective = config.objective.kind if config.objective else ""
    return f"""---
library_name: transformers
pipeline_tag: zero-shot-image-classification
tags: [medical, radiology, dual-encoder, medvlm]
---
# {config.run.name}

{config.description}

{code}: images and texts in a space of {model.embedding_dim} dimensions. Trained with medvlm for
`{objective}`, checkpoint `{checkpoint}`.

| part | origin | training |
|---|---|---|
{table}

Trained on:

{data}

```python
from PIL import Image
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("."{trust}).eval()
processor = AutoProcessor.from_pretrained("."{trust})
labels = {LABELS!r}
image = Image.open("radiograph.png").convert("RGB")
inputs = processor(text=labels, images=image, padding={padding}, return_tensors="pt")
chances = model(**inputs).logits_per_image.{chance}[0]
print(dict(zip(labels, chances.tolist())))
```

`vision_tower/` is the image tower alone, which `model.vision_tower.path` of another recipe may name.

{_checked(proof)}

Not a medical device. Not for clinical use. What it says has not been validated on patients.
"""


def _checked(proof: dict[str, Any] | None) -> str:
    if proof is None:
        return "Checked at export: names and shapes of the weights, not embeddings against the training model's."
    worst = max(proof["max_abs_image_diff"], proof["max_abs_text_diff"])
    return f"""Checked at export: normalised embeddings of this folder in a fresh process differ from the training
model's by at most {worst:.1e} (fp32, transformers {proof["transformers"]}).{rounded(proof)}"""
