"""The peer of `training.py` and `gpu.py`: transformers' Trainer over DeepSpeed with stock LLaVA, as users write it.

Run by a launcher: RECIPE OUT --steps N [--order plan|grouped] [--lora RANK]. Samples are decoded and tokenised by our
encoder, so that only batches, loop and model differ: padding to the longest of a micro-batch, as LLaVA's collator
does, and logits at every position. ``--order plan`` takes exactly our global batches and shares; ``grouped`` orders
samples as LLaVA's ``group_by_modality_length`` does: one modality per global batch, sorted by length.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import LlavaForConditionalGeneration, Trainer, TrainerCallback, TrainingArguments

from medvlm.config.load import load_recipe
from medvlm.export.llava import llava_config
from medvlm.models.build import build_components
from medvlm.training import distributed, feed
from medvlm.training.setup import deepspeed_config, precision


class Llava(LlavaForConditionalGeneration):
    """With LLaVA's way for a batch without images: a blank one goes through the tower, times zero."""

    def forward(self, input_ids=None, pixel_values=None, **rest):
        if pixel_values is not None:
            return super().forward(input_ids=input_ids, pixel_values=pixel_values, **rest)
        side = self.config.vision_config.image_size
        blank = torch.zeros(1, 3, side, side, dtype=self.dtype, device=input_ids.device)
        features = self.model.get_image_features(blank)
        features = getattr(features, "pooler_output", features)
        zero = sum(f.sum() for f in features) * 0.0
        return super().forward(inputs_embeds=self.get_input_embeddings()(input_ids) + zero, **rest)


class Samples(torch.utils.data.Dataset):
    def __init__(self, data, order):
        self.data, self.order = data, order

    def __len__(self):
        return len(self.order)

    def __getitem__(self, n):
        encoded = self.data.encoder(*self.data.reader.load(self.order[n]), None)
        return encoded.ids, encoded.labels, encoded.images


class Collator:
    def __init__(self, processor, dtype):
        image = processor.image_processor
        self.pad = processor.tokenizer.pad_token_id
        self.mean, self.std = (torch.tensor(v).view(1, 3, 1, 1) for v in (image.image_mean, image.image_std))
        self.dtype = dtype

    def __call__(self, samples):
        longest = max(len(ids) for ids, _, _ in samples)
        rows = [(ids + [self.pad] * (longest - len(ids)), labels + [-100] * (longest - len(ids)), len(ids))
                for ids, labels, _ in samples]  # fmt: skip
        batch = {
            "input_ids": torch.tensor([r[0] for r in rows]),
            "labels": torch.tensor([r[1] for r in rows]),
            "attention_mask": torch.stack([(torch.arange(longest) < r[2]).long() for r in rows]),
        }
        images = [i.expand(3, -1, -1) for _, _, images in samples for i in images]
        if images:
            batch["pixel_values"] = ((torch.stack(images).float() / 255 - self.mean) / self.std).to(self.dtype)
        return batch


class Clock(TrainerCallback):
    """From the end of a step to the end of the next: the Trainer loads a step's batches before ``on_step_begin``."""

    def __init__(self):
        self.seconds = []

    def on_train_begin(self, *_, **__):
        self.last = time.perf_counter()

    def on_step_end(self, *_, **__):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now


class InOrder(Trainer):
    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def planned(plan, steps, world, micro, accumulation):
    """Sample numbers such that accelerate's sharding (micro-batch b goes to rank b % world) gives our shares."""
    order = []
    for packs in plan.global_batches(0, steps):
        shares = [plan.share(packs, rank, world, micro, accumulation) for rank in range(world)]
        order += [number for part in zip(*shares, strict=True) for one in part for pack in one for number, _ in pack]
    return order


def grouped(lengths, steps, batch):
    rng = np.random.default_rng(0)
    groups = []
    for which in (lengths.images > 0, lengths.images == 0):
        numbers = rng.permutation(np.flatnonzero(which))
        for i in range(0, len(numbers) - batch + 1, batch):
            chunk = numbers[i : i + batch]
            groups.append(chunk[np.argsort(-lengths.tokens[chunk], kind="stable")])
    return [int(n) for g in rng.permutation(len(groups))[:steps] for n in groups[g]]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--order", choices=("plan", "grouped"), default="plan")
    parser.add_argument("--lora", type=int, default=0)
    options = parser.parse_args()
    config = load_recipe(options.recipe)
    distributed.start()
    rank, world = distributed.rank(), distributed.world_size()
    transformers.set_seed(0)
    parts = build_components(config.model)
    data = feed.training_data(config, parts)
    lengths = feed.count_lengths(config, data, progress=False)
    ds_config = deepspeed_config(config, world)
    micro, accumulation = config.training.micro_batch_size, ds_config["gradient_accumulation_steps"]
    batch = config.training.global_batch_size
    if options.order == "plan":
        # as `medvlm train` makes it: with lengths it would balance these batches for the Trainer and not for us
        plan = feed.make_plan(config, data, lengths if feed.needs_lengths(config.data) else None)
        order = planned(plan, options.steps, world, micro, accumulation)
    else:
        order = grouped(lengths, options.steps, batch)
    dtype, checkpointing = precision(config), config.model.language_model.gradient_checkpointing
    arguments = TrainingArguments(
        output_dir=str(options.out.with_suffix("")),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        max_steps=options.steps,
        learning_rate=1e-5,
        deepspeed={k: v for k, v in ds_config.items() if k != "steps_per_print"},
        bf16=dtype == torch.bfloat16,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=bool(checkpointing) and checkpointing != "none",
        gradient_checkpointing_kwargs={"use_reentrant": False},
        dataloader_num_workers=config.data.workers,
        save_strategy="no",
        report_to=[],
        logging_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    model = Llava._from_config(llava_config(parts, config), dtype=dtype)
    for name, part in (("vision_tower", config.model.vision_tower), ("language_model", config.model.language_model)):
        getattr(model.model, name).requires_grad_(part.train == "full")
    if options.lora:
        import peft

        targets = r".*language_model.*(q|k|v|o|gate|up|down)_proj"
        lora = peft.LoraConfig(r=options.lora, lora_alpha=2 * options.lora, target_modules=targets)
        model = peft.get_peft_model(model, lora, autocast_adapter_dtype=False)
        model.enable_input_require_grads()
    clock = Clock()
    collator = Collator(parts.processor, dtype)
    trainer = InOrder(model, arguments, train_dataset=Samples(data, order), data_collator=collator, callbacks=[clock])
    trainer.train()
    if rank == 0:
        steps = [order[i : i + batch] for i in range(0, len(order), batch)]
        rows = [
            {"seconds": s, "tokens": int(lengths.tokens[n].sum()), "samples": len(n)}
            for s, n in zip(clock.seconds, steps, strict=False)
        ]
        peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
        options.out.write_text(json.dumps({"rows": rows, "memory_gib": peak}))
    distributed.stop()


if __name__ == "__main__":
    main()
