"""Embeddings of images and texts in the joint space of any Hugging Face dual encoder (CLIP, SigLIP, ...)."""

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from medvlm.errors import UserError
from medvlm.inference.generate import check_folder, refuse_absent, refuse_own_code
from medvlm.models.poolings import LAST_NORM, class_token_by_patch

NO_LENGTH = 1 << 20  # a tokenizer that knows no length says 1e30
FAILURES = (OSError, ValueError, KeyError, ImportError, AttributeError)


class Embedder:
    """A dual encoder with its tokenizer and image processor; on a GPU if there is one, in float32 unless told.

    ``folder`` is a local folder or a hub name of anything that ``AutoModel`` loads and that has ``get_image_features``
    and ``get_text_features``. Code that comes with a folder (``auto_map``) runs only with ``trust_remote_code``.
    Raises UserError if the folder is incomplete, is no such model, or lacks a weight.
    """

    def __init__(
        self,
        folder: str | Path,
        device: str | None = None,
        dtype: torch.dtype = torch.float32,
        *,
        trust_remote_code: bool = False,
    ):
        self.name = str(folder)
        check_folder(self.name)
        self.device, self.dtype = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")), dtype
        self.truncated: dict[str, int] = {}  # text -> its tokens, of those that did not fit
        model = self._load(trust_remote_code)
        for method in ("get_image_features", "get_text_features"):
            if not callable(getattr(model, method, None)):
                kind = type(model).__name__
                raise UserError(f"{self.name}: {kind} is no dual encoder of images and texts (it has no {method})")
        self.model: Any = model.to(self.device).eval()
        scale = getattr(self.model, "logit_scale", None)
        self.logit_scale: float | None = None if scale is None else float(torch.as_tensor(scale).detach().exp())
        self.max_length = self._max_length()
        # SigLIP has learnt from texts that are padded to the full length, and reads their last position
        fixed = str(getattr(self.model.config, "model_type", "")).startswith("siglip")
        self.padding: str | bool = "max_length" if fixed else True
        named = inspect.signature(self.model.get_text_features).parameters
        self.text_inputs = {"input_ids", "attention_mask", *named}

    def _load(self, trust: bool) -> Any:
        try:
            refuse_own_code(self.name, "AutoModel", trust)
            options = {"trust_remote_code": trust}
            self.tokenizer: Any = AutoTokenizer.from_pretrained(self.name, **options)
            self.image_processor: Any = AutoImageProcessor.from_pretrained(self.name, **options)
            loaded: Any = AutoModel.from_pretrained(self.name, dtype=self.dtype, output_loading_info=True, **options)
        except UserError:  # which is a ValueError
            raise
        except FAILURES as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"{self.name}: does not load as a dual encoder ({reason})") from error
        model, info = loaded
        refuse_absent(self.name, info)
        if self.tokenizer.pad_token is None:
            raise UserError(f"{self.name}: its tokenizer has no padding token; set pad_token in tokenizer_config.json")
        return model

    def _max_length(self) -> int:
        """Tokens that fit both the tokenizer's limit and the text tower's positions."""
        text = getattr(self.model.config, "text_config", self.model.config)
        positions = getattr(text, "max_position_embeddings", None)
        if positions is not None and "roberta" in str(getattr(text, "model_type", "")):
            positions -= text.pad_token_id + 1  # its positions begin after that of the padding
        padded = getattr(self.model.config, "text_length", None)  # of medvlm's own form, which pads all texts to it
        known = [n for n in (self.tokenizer.model_max_length, positions, padded) if n is not None and n < NO_LENGTH]
        if not known:
            raise UserError(f"{self.name}: no limit of a text is known; set model_max_length in tokenizer_config.json")
        return min(known)

    def images(self, images: Sequence[Image.Image], batch_size: int = 32, *, normalized: bool = True) -> Tensor:
        """Pictures (perhaps a lazy sequence) -> [N, D] float32 on the CPU, of length 1 unless not ``normalized``."""

        def embed(batch: list[Image.Image]) -> Tensor:
            return _features(self.model.get_image_features(**self.pixels(batch)))

        return self._all(images, embed, batch_size, normalized, "images")

    def texts(self, texts: Sequence[str], batch_size: int = 64, *, normalized: bool = True) -> Tensor:
        """Texts -> [N, D] float32 on the CPU. What exceeds ``max_length`` tokens is cut off and noted in ``truncated``.

        Raises UserError for an empty text.
        """
        empty = [i for i, text in enumerate(texts) if not text.strip()]
        if empty:
            raise UserError(f"text {empty[0]} is empty")

        def embed(batch: list[str]) -> Tensor:
            lengths = [len(ids) for ids in self.tokenizer(batch, verbose=False)["input_ids"]]
            self.truncated |= {t: n for t, n in zip(batch, lengths, strict=True) if n > self.max_length}
            inputs = self.tokenizer(
                batch, padding=self.padding, truncation=True, max_length=self.max_length, return_tensors="pt"
            )
            taken = {name: value.to(self.device) for name, value in inputs.items() if name in self.text_inputs}
            return _features(self.model.get_text_features(**taken))

        return self._all(texts, embed, batch_size, normalized, "texts")

    def patches(self, images: Sequence[Image.Image], batch_size: int = 32, *, normalized: bool = True) -> Tensor:
        """Pictures -> [N, h, w, D]: the patches of each, in the joint space.

        A model with ``get_image_patch_features(pixel_values) -> [N, h, w, D]`` is asked. Of CLIP, SigLIP and
        VisionTextDualEncoder a patch's embedding is what the image's would be if this patch were all that there is to
        pool. Raises UserError for other models.
        """
        return self._all(images, self._patches, batch_size, normalized, "patches")

    def occlusions(self, images: Sequence[Image.Image], batch_size: int = 32, *, grid: int = 8) -> Tensor:
        """Pictures -> [N, grid, grid, D]: by what each picture's embedding, of length 1, changes where the square
        around a cell of the grid, two cells wide, is hidden by the picture's mean.

        Its product with a text is what the picture's cosine with the text loses (occlusion sensitivity, arXiv
        1311.2901), whatever the tower and its pooling; it takes grid * grid + 1 passes. Raises UserError where the
        image processor gives no [N, C, H, W].
        """

        def embed(batch: list[Image.Image]) -> Tensor:
            values = self.pixels(batch)["pixel_values"]
            if values.dim() != 4:
                raise UserError(f"{self.name}: its image processor gives no pictures of which a square can be hidden")
            return torch.stack([self._occluded(picture, batch_size, grid) for picture in values])

        return self._all(images, embed, batch_size, False, "images")

    def _occluded(self, picture: Tensor, batch_size: int, grid: int) -> Tensor:
        versions = torch.stack([picture, *with_squares_hidden(picture, grid)])
        found = [_features(self.model.get_image_features(pixel_values=part)) for part in versions.split(batch_size)]
        rows = normalize(torch.cat(found).float(), dim=-1)
        return (rows[0] - rows[1:]).unflatten(0, (grid, grid))

    def pixels(self, images: list[Image.Image]) -> dict[str, Tensor]:
        """What the folder's image processor makes of pictures: ``pixel_values`` [N, C, H, W] and what it adds."""
        inputs = self.image_processor(images=[image.convert("RGB") for image in images], return_tensors="pt")
        return {
            name: value.to(self.device, self.dtype) if value.is_floating_point() else value.to(self.device)
            for name, value in inputs.items()
        }

    def _patches(self, images: list[Image.Image]) -> Tensor:
        values = self.pixels(images)["pixel_values"]
        own = getattr(self.model, "get_image_patch_features", None)
        if own is not None:
            return own(values)
        kind = type(self.model).__name__
        if kind not in ("CLIPModel", "SiglipModel", "VisionTextDualEncoderModel"):
            raise UserError(
                f"{self.name}: how the patches of {kind} come into the joint space is not known; a model may say it "
                "by a method get_image_patch_features"
            )
        tower = self.model.vision_model
        inner = getattr(tower, "vision_model", tower)
        config = tower.config
        # of a hierarchical tower (Swin) each stage but the last halves the grid
        side = (
            config.patch_size * 2 ** (len(getattr(config, "depths", [0])) - 1) if hasattr(config, "patch_size") else 0
        )
        height, width = (n // side for n in values.shape[-2:]) if side else (0, 0)
        run = partial(tower, pixel_values=values, return_dict=True)
        by_class_token = config.model_type in LAST_NORM
        tokens = class_token_by_patch(inner, run) if by_class_token else run().last_hidden_state
        if not 0 < height * width <= tokens.shape[1]:
            raise UserError(f"{self.name}: the {config.model_type} tower has no grid of patches that is known here")
        tokens = tokens[:, tokens.shape[1] - height * width :]  # class and register tokens come first
        # a ViT's, which takes the first token of a sequence, or SigLIP's, which attends to all
        attends = config.model_type == "siglip_vision_model"
        pool: Any = inner.head if attends else getattr(inner, "pooler", None)
        if attends or hasattr(pool, "dense"):
            tokens = pool(tokens.flatten(0, 1)[:, None]).unflatten(0, tokens.shape[:2])
        head = getattr(self.model, "visual_projection", None)
        return (tokens if head is None else head(tokens)).unflatten(1, (height, width))

    @torch.inference_mode()
    def _all(
        self, items: Sequence, embed: Callable[[list], Tensor], batch_size: int, normalized: bool, title: str
    ) -> Tensor:
        if not len(items):
            raise UserError(f"there are no {title} to embed")
        found = []
        with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as progress:
            bar = progress.add_task(title, total=len(items))
            for start in range(0, len(items), batch_size):
                batch = [items[i] for i in range(start, min(start + batch_size, len(items)))]
                rows = embed(batch).float().cpu()
                if not bool(torch.isfinite(rows).all()):
                    raise UserError(f"{self.name}: embeds {title} as NaN or infinity; the model is not usable")
                found.append(normalize(rows, dim=-1) if normalized else rows)
                progress.advance(bar, len(batch))
        return torch.cat(found)


def with_squares_hidden(picture: Tensor, grid: int) -> Iterator[Tensor]:
    """[C, H, W] -> as many as the grid has cells, row by row: the square around the cell, two cells wide where the
    picture does not end before, is the mean of each channel."""
    height, width = picture.shape[1:]
    mean = picture.mean((1, 2), keepdim=True)
    for row in range(grid):
        for column in range(grid):
            hidden = picture.clone()
            top, left = (round(max(0, n - 0.5) * side / grid) for n, side in ((row, height), (column, width)))
            bottom, right = (round((n + 1.5) * side / grid) for n, side in ((row, height), (column, width)))
            hidden[:, top:bottom, left:right] = mean
            yield hidden


def _features(output: Any) -> Tensor:
    """[N, D], which transformers 5 returns as the pooled output of the tower."""
    return output if isinstance(output, Tensor) else output.pooler_output
