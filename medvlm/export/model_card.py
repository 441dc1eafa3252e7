"""The README.md of an exported model."""

from typing import Any

from medvlm.config.model import Backbone
from medvlm.config.schema import RunConfig


def model_card(config: RunConfig, checkpoint: str, kind: str, proof: dict[str, Any] | None) -> str:
    model = config.llava
    own = kind != "LlavaForConditionalGeneration"
    trust = ", trust_remote_code=True" if own else ""
    code = "`LlavaForConditionalGeneration` with the code in this folder" if own else f"`{kind}`"
    tower, language = origin(model.vision_tower), origin(model.language_model)
    data = "\n".join(f"- `{source.path}`" for source in config.data.sources)
    return f"""---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [medical, radiology, llava, medvlm]
---
# {config.run.name}

{config.description}

A {code}, trained with medvlm, checkpoint `{checkpoint}`.

| part | origin | training |
|---|---|---|
| vision tower | {tower} | {model.vision_tower.train} |
| multi-modal projector | {model.multi_modal_projector.kind} | {model.multi_modal_projector.train} |
| language model | {language} | {model.language_model.train} |

Trained on:

{data}

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("."{trust})
processor = AutoProcessor.from_pretrained("."{trust})
```

{_checked(proof)}

Not a medical device. Not for clinical use. Its answers have not been validated on patients.
"""


def _checked(proof: dict[str, Any] | None) -> str:
    if proof is None:
        return "Checked at export: names and shapes of the weights, not its logits against the training model's."
    return f"""Checked at export: image and text logits of this folder in a fresh process differ from the training
model's by at most {proof["max_abs_logit_diff"]:.1e} (fp32, transformers {proof["transformers"]}).{rounded(proof)}"""


def rounded(proof: dict[str, Any]) -> str:
    """What the proof does not cover."""
    return "" if proof["stored"] == "fp32" else f" The weights were rounded to {proof['stored']} after that."


def origin(part: Backbone) -> str:
    return part.path or f"{(part.config or {})['model_type']} (from scratch)"
