"""Greedy answers from any image-text-to-text folder that stock ``transformers`` loads, ours or not."""

import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, AutoProcessor, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from medvlm.errors import UserError

# The images in order, and chat messages with lists of {"type": "image"} and {"type": "text", "text": ...} as contents.
# The images may be a lazy sequence: they are looked at only when their batch is due.
Request = tuple[Sequence[Image.Image], list[dict[str, Any]]]
WEIGHTS = ("*.safetensors", "*.bin")


class Generator:
    """A model and its processor.

    ``folder`` is a local folder or a hub name. On a GPU in bfloat16, else on the CPU in float32, unless told. Code that
    comes with a folder (``auto_map``) runs only with ``trust_remote_code``.
    Raises UserError if the folder is incomplete, is not such a model, or lacks a weight.
    """

    def __init__(
        self,
        folder: str | Path,
        device: str | None = None,
        dtype: torch.dtype | None = None,
        *,
        trust_remote_code: bool = False,
    ):
        self.name = str(folder)
        check_folder(self.name)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        try:
            refuse_own_code(self.name, "AutoModelForImageTextToText", trust_remote_code)
            options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
            self.processor = AutoProcessor.from_pretrained(self.name, **options)
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                self.name, dtype=self.dtype, output_loading_info=True, **options
            )
        except UserError:  # which is a ValueError
            raise
        except torch.OutOfMemoryError:
            raise
        except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"{self.name}: does not load as an image-text-to-text model ({reason})") from error
        model, info = loaded
        refuse_absent(self.name, info)
        if not hasattr(self.processor, "tokenizer") or not hasattr(self.processor, "image_processor"):
            raise UserError(
                f"{self.name}: its processor is not one for images and text ({type(self.processor).__name__})"
            )
        if not getattr(self.processor, "chat_template", None):
            raise UserError(f"{self.name}: its processor has no chat template; add chat_template.jinja to the folder")
        self.model: Any = model.to(self.device).eval()
        self.tokenizer: Any = self.processor.tokenizer
        self.tokenizer.padding_side = "left"  # so that every row's new tokens start in the same column
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.accepts = set(inspect.signature(self.model.forward).parameters)

    def answers(
        self, requests: Sequence[Request], max_new_tokens: int = 32, batch_size: int = 16, title: str = "generate"
    ) -> list[str]:
        """The greedy continuation of each request, stripped, in the order of the requests.

        Raises UserError if a request's messages and images disagree in number.
        """
        prompts = [self._prompt(request, i) for i, request in enumerate(requests)]
        out = [""] * len(requests)
        with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as progress:
            bar = progress.add_task(title, total=len(requests))
            for rows in _batches(prompts, [len(images) for images, _ in requests], batch_size):
                images = [[image.convert("RGB") for image in requests[i][0]] for i in rows]
                for i, text in zip(
                    rows, self._generate([prompts[i] for i in rows], images, max_new_tokens), strict=True
                ):
                    out[i] = text
                progress.advance(bar, len(rows))
        return out

    def _prompt(self, request: Request, number: int) -> str:
        images, messages = request
        wanted = sum(
            part["type"] == "image" for m in messages if not isinstance(m["content"], str) for part in m["content"]
        )
        if wanted != len(images):
            raise UserError(f"request {number}: the messages refer to {wanted} image(s) but {len(images)} were given")
        return self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

    @torch.inference_mode()
    def _generate(self, prompts: list[str], images: list[list[Image.Image]], max_new_tokens: int) -> list[str]:
        bos = self.tokenizer.bos_token
        inputs = self.processor(
            images=images if images[0] else None,
            text=prompts,
            padding=True,
            return_tensors="pt",
            # as transformers' own apply_chat_template(tokenize=True): never a second beginning-of-text token
            add_special_tokens=not (bos and prompts[0].startswith(bos)),
        ).to(self.device, self.dtype)
        inputs = {name: value for name, value in inputs.items() if name in self.accepts}
        tokens = self.model.generate(  # [B, T prompt + T new]
            **inputs,
            max_new_tokens=max_new_tokens,
            min_new_tokens=1,  # an empty answer is none: off its training data a small model may stop at once
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        new = tokens[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]


def _batches(prompts: list[str], n_images: list[int], batch_size: int) -> Iterator[list[int]]:
    """Request numbers, the longest first (memory runs out at once or never); a batch has one number of images.

    Processors disagree on how a batch that mixes requests with and without images is to be written.
    """
    order = sorted(range(len(prompts)), key=lambda i: (n_images[i], len(prompts[i]), i), reverse=True)
    start = 0
    while start < len(order):
        end = start + 1
        while end < len(order) and end - start < batch_size and n_images[order[end]] == n_images[order[start]]:
            end += 1
        yield order[start:end]
        start = end


def refuse_own_code(name: str, auto: str, trust: bool) -> None:
    """Raise UserError for a folder whose ``auto`` class is code of its own, not transformers', unless it is trusted."""
    values, _ = PretrainedConfig.get_config_dict(name)
    own = auto in values.get("auto_map", {}) and values.get("model_type") not in CONFIG_MAPPING
    if own and not trust:
        raise UserError(f"{name}: runs code of its own; if you trust it, add --trust-remote-code")


def refuse_absent(name: str, info: dict[str, Any]) -> None:
    """Raise UserError where a loaded model lacks weights: transformers would go on with random values."""
    absent = sorted(info["missing_keys"]) + sorted(str(m) for m in info["mismatched_keys"])
    if absent:
        raise UserError(f"{name}: {len(absent)} weight(s) are missing or misshapen, first {absent[0]}")


def check_folder(name: str) -> None:
    """Raises UserError for a name that is neither a model folder nor a hub name."""
    path = Path(name)
    if not path.is_dir():
        if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
            raise UserError(f"{name}: no such model folder, and not a hub name of the form owner/name")
        return
    if not (path / "config.json").exists():
        hint = "; this is a run: `medvlm export` it first" if (path / "config.yaml").exists() else ""
        raise UserError(f"{path}: holds no config.json, so it is not a Hugging Face model folder{hint}")
    if not any(any(path.glob(pattern)) for pattern in WEIGHTS):
        raise UserError(f"{path}: holds no weights ({' or '.join(WEIGHTS)})")
