"""What the pipeline does to the texts of an item before they become a sample: scan, mask, no masks in answers."""

from collections import Counter
from typing import Any

from medvlm.data.phi import drop_masked_sentences, mask, scan
from medvlm.data.schema import DEIDENTIFICATION_MASK, IMAGE_MARK


def apply_mask(fields: dict[str, Any], mode: str) -> tuple[dict[str, Any], Counter[str]]:
    """Scan, and with ``mask`` replace, what looks like protected health information in messages and report.

    In answers the replacement is ``___``, which takes the sentence out: a model must not learn to write "[DATE]".
    """
    found: Counter[str] = Counter()
    if mode == "off":
        return fields, found

    def one(text: str, target: bool = False) -> str:
        masked, findings = mask(text) if mode == "mask" else (text, scan(text))
        found.update(f.kind for f in findings)
        if mode == "mask" and target:
            # drop_masked_turns takes the whole sentence: no model shall learn to write [NAME].
            for finding in reversed(findings):
                text = text[: finding.start] + DEIDENTIFICATION_MASK + text[finding.end :]
            return text
        return masked

    def content(message: dict[str, Any]) -> Any:
        value, target = message["content"], message["role"] == "assistant"
        if isinstance(value, str):
            return IMAGE_MARK.join(one(piece, target) for piece in value.split(IMAGE_MARK))
        return [{**part, "text": one(part["text"], target)} if "text" in part else part for part in value]

    changed = dict(fields)
    if fields.get("messages"):
        changed["messages"] = [{**m, "content": content(m)} for m in fields["messages"]]
    if fields.get("report"):
        changed["report"] = {name: one(text) for name, text in fields["report"].items()}
    return changed, found


def drop_masked_turns(fields: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Take sentences with ``___`` out of the answers; an answer of which nothing is left goes with its question.

    The images of a question that goes move to the next one. Raises ValueError where no answer is left.
    """
    messages = fields.get("messages") or []
    if not any(m["role"] == "assistant" and DEIDENTIFICATION_MASK in _text(m) for m in messages):
        return fields, 0
    kept: list[dict[str, Any]] = []
    images = dropped = 0
    for message in messages:
        if message["role"] == "assistant" and DEIDENTIFICATION_MASK in _text(message):
            message = {**message, "content": drop_masked_sentences(_text(message))}
            if not message["content"].strip():
                dropped += 1
                while kept and kept[-1]["role"] == "user":
                    images += _n_images(kept.pop())
                continue
        elif message["role"] == "user" and images:
            message = {**message, "content": _with_images(message["content"], images)}
            images = 0
        kept.append(message)
    if images or not any(m["role"] == "assistant" for m in kept):
        raise ValueError(f"no usable answer is left without the masks {DEIDENTIFICATION_MASK}")
    return {**fields, "messages": kept}, dropped


def _text(message: dict[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else " ".join(part.get("text", "") for part in content)


def _n_images(message: dict[str, Any]) -> int:
    content = message["content"]
    return content.count(IMAGE_MARK) if isinstance(content, str) else sum(p["type"] == "image" for p in content)


def _with_images(content: Any, images: int) -> Any:
    if isinstance(content, str):
        return f"{IMAGE_MARK}\n" * images + content
    return [{"type": "image"}] * images + content
