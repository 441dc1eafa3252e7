"""Vision tower, projector and causal language model, trained for the next token."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medvlm.config.schema import RunConfig
from medvlm.data.augment import Augment
from medvlm.data.conversation import ConversationEncoder
from medvlm.data.images import ImageTransform
from medvlm.data.loader import MicroBatches, SampleEncoder, collate, load_batches
from medvlm.data.order import micro_batches
from medvlm.data.volume_slices import VolumeSlices
from medvlm.errors import UserError
from medvlm.models.build import Components, build_components, build_model
from medvlm.models.vision_language_model import VisionLanguageModel
from medvlm.training import distributed, watch
from medvlm.training.boundary import sum_and_agree
from medvlm.training.families.base import Family, Outcome, Pass
from medvlm.training.memory import bound, check_memory, longest_row
from medvlm.training.reading import open_shards, read


class LlavaFamily(Family):
    targets = "supervised_tokens"
    image_parts = ("vision_tower", "multi_modal_projector")

    def components(self, config: RunConfig) -> Components:
        return build_components(config.llava)

    def build(
        self, config: RunConfig, parts: Components, dtype: torch.dtype, ds_config: dict[str, Any] | None
    ) -> VisionLanguageModel:
        return build_model(config.llava, parts, dtype, ds_config, config.run.seed)

    def dataset(self, config: RunConfig, parts: Components, paths: list[str], *, training: bool) -> MicroBatches:
        data = config.data
        positions = getattr(parts.text_config, "max_position_embeddings", None)
        if positions and data.max_length > positions:
            raise UserError(
                f"data.max_length: {data.max_length} is more than the {positions} tokens that the language model has "
                "positions for"
            )
        augment = Augment(**data.augment.model_dump())
        encoder = SampleEncoder(
            ConversationEncoder(parts.tokenizer, parts.chat_template, parts.image_tokens),
            ImageTransform(parts.processor.image_processor),
            data.max_length,
            shuffle=training and data.shuffle_turns,
            augment=augment if training and augment.active else None,
            slices=VolumeSlices(data.volume_slices, data.volume_window) if data.volume_slices else None,
            seed=config.run.seed,
        )
        form = partial(
            collate,
            pad_id=parts.tokenizer.pad_token_id,
            image_size=parts.image_size,
            padding_free=data.padding_free or (training and data.packing is not None),
        )
        return MicroBatches(open_shards(data, paths), encoder, form)

    def check_memory(self, config: RunConfig, parts: Components, data: MicroBatches, ds_config: dict[str, Any]) -> None:
        def look() -> tuple[tuple[int, int], int]:
            row = longest_row(config, data)
            return row, bound(config, parts, ds_config, distributed.world_size(), *row)

        check_memory(config, look)

    def passes(self, given: Pass, batches: Sequence[Any]) -> Outcome:
        torch.manual_seed(given.seed)
        losses = []
        for n, batch in enumerate(batches):
            with given.phase("forward"):
                loss = given.engine(**batch.inputs(given.device))
            given.backward(loss / given.targets)  # every supervised token of the global batch weighs the same
            losses.append(loss.detach())
            if n + 1 < given.accumulation:
                given.engine.step()
        summed = torch.stack(losses).double()
        return Outcome(summed.sum() / given.targets, summed.isfinite().tolist())

    @torch.no_grad()
    def validate(self, session: Any) -> dict[str, float]:
        """Mean loss per supervised token. May raise `boundary.Stop`."""
        engine, config = session.engine, session.config
        (rank, world), device = distributed.data_place(config.training.sequence_parallel), distributed.device()
        data = self.dataset(config, session.parts, config.data.validation, training=False)
        micro = config.training.micro_batch_size
        limit = (config.training.evaluation_batches or len(data.reader)) * micro * world
        numbers = list(range(len(data.reader)))[:limit]
        batches = range(0, len(numbers), micro * world)  # the same number on every rank
        work: Iterator[list[tuple[int, int | None]]]
        work = (
            [(i, None) for i in micro_batches(numbers[b : b + micro * world], rank, world, micro, 1)[0]]
            for b in batches
        )
        loader = load_batches(data, work, 0)
        engine.eval()
        total, count = 0.0, 0
        try:
            for number in batches:
                watch.enter(f"evaluation, from sample {number}", session.step)
                found, trouble = read(loader, 1)
                sum_and_agree([], trouble)
                total += float(engine(**found[0].inputs(device)))
                count += found[0].targets
        finally:
            engine.train()
        total, supervised = sum_and_agree([total, count / config.training.sequence_parallel], None)
        if not supervised:
            raise UserError(f"data.validation: no supervised tokens in {config.data.validation}")
        return {"eval_loss": total / supervised}

    def unit(self, model: nn.Module, part: str, module: nn.Module, rows: Tensor) -> str:
        if part in self.image_parts:
            return "images"
        return "targets" if module in set(model.language_model.get_output_embeddings().modules()) else "tokens"  # type: ignore[operator, union-attr]

    def save_processor(self, parts: Components, folder: Path) -> None:
        parts.processor.save_pretrained(folder)


LLAVA = LlavaFamily()
