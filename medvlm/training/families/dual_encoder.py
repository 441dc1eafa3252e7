"""Image and text encoders, aligned by contrast over the global batch, with gradient caching."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medvlm.config.model import DualEncoder
from medvlm.config.objective import Objective
from medvlm.config.schema import RunConfig
from medvlm.data.augment import Augment
from medvlm.data.images import ImageTransform
from medvlm.data.labeler import LABELS, label_report
from medvlm.data.loader import MicroBatches, load_batches
from medvlm.data.order import micro_batches
from medvlm.data.pairs import PairBatch, PairEncoder, collate_pairs
from medvlm.data.wordnet import WordNet
from medvlm.errors import UserError
from medvlm.measures import embedding_space, retrieval
from medvlm.models.build_dual_encoder import DualComponents, build_components, build_model
from medvlm.objectives.gather import gather_rows
from medvlm.objectives.info_nce import info_nce
from medvlm.objectives.semantic_matching import semantic_matching
from medvlm.objectives.sigmoid import sigmoid
from medvlm.training import distributed, watch
from medvlm.training.boundary import sum_and_agree
from medvlm.training.families.base import Family, Outcome, Pass
from medvlm.training.flops import Unit
from medvlm.training.memory import check_memory, pair_bound
from medvlm.training.reading import open_shards, read

ROWS = ("image", "text")  # of a model's output; the rest are numbers that do not depend on the batch
DIAGNOSED = 2048  # pairs of the validation data whose embeddings are looked at


class DualEncoderFamily(Family):
    targets = "pairs"
    counted = ("texts", "masked_tokens", "truncated", "left_out")
    image_parts = ("vision_tower", "vision_head")

    def components(self, config: RunConfig) -> DualComponents:
        model, objective = sections(config)
        return build_components(model, objective)

    def build(self, config: RunConfig, parts: DualComponents, dtype: torch.dtype, ds_config: Any) -> nn.Module:
        return build_model(sections(config)[0], parts, dtype, ds_config, config.run.seed)

    def dataset(self, config: RunConfig, parts: DualComponents, paths: list[str], *, training: bool) -> MicroBatches:
        data, (model, objective) = config.data, sections(config)
        if data.max_length > parts.text_limit:
            raise UserError(
                f"data.max_length: {data.max_length} is more than the {parts.text_limit} tokens that the text tower "
                "has positions for"
            )
        augment, masking = Augment(**data.augment.model_dump()), objective.masked_language_modeling
        paired = objective.kind != "semantic_matching"
        altered = data.pairs.alter_words if training else 0.0
        encoder = PairEncoder(
            parts.tokenizer,
            ImageTransform(parts.image_processor),
            data.max_length,
            sections=data.pairs.sections,
            text=data.pairs.text,
            min_words=data.pairs.min_words,
            shuffle_sentences=training and data.pairs.shuffle_sentences,
            alter_words=altered,
            synonyms=WordNet(data.pairs.synonyms).synonyms if altered and data.pairs.synonyms else None,
            views=data.pairs.views,
            augment=augment if training and augment.active else None,
            masking=masking.probability if masking and training else None,
            labels=[] if paired else data.pairs.labels or list(LABELS),
            labeler=label_report,
            prior=model.vision_head.prior_image is not None,
            paired=paired,
            seed=config.run.seed,
        )
        form = partial(
            collate_pairs,
            pad_id=parts.tokenizer.pad_token_id,
            image_size=parts.image_size,
            max_length=data.max_length,
            labels=len(encoder.labels),
            prior=encoder.prior,
            masking=masking is not None and training,
            paired=paired,
        )
        return MicroBatches(open_shards(data, paths), encoder, form)

    def check_memory(
        self, config: RunConfig, parts: DualComponents, data: MicroBatches, ds_config: dict[str, Any]
    ) -> None:
        images = 1 + (sections(config)[0].vision_head.prior_image is not None)
        most = pair_bound(config, parts, ds_config, distributed.world_size(), images)
        check_memory(config, lambda: ((config.data.max_length, images), most))

    def repeated(self, config: RunConfig, accumulation: int, unit: Unit) -> float:
        """Embeddings, not the loss of masked tokens."""
        if accumulation == 1 or unit == "masked_tokens":
            return 0.0
        return 1 / self.text_passes(config) if unit == "tokens" or isinstance(unit, tuple) else 1.0

    def text_passes(self, config: RunConfig) -> int:
        """As they are, and masked."""
        return 2 if sections(config)[1].masked_language_modeling else 1

    def passes(self, given: Pass, batches: Sequence[PairBatch]) -> Outcome:
        """With one micro-batch, one forward pass. With several, gradient caching (Gao et al., arXiv 2101.06983): their
        embeddings without graphs, the loss of these and its gradient, then each micro-batch again, with its graph."""
        objective = given.config.objective
        assert objective is not None
        if len(batches) == 1:
            out = _forward(given, batches, 0)
            share, masked = loss_share(objective, [out], batches), _masked_share(given, out)
            given.backward(share + masked)
            return _outcome([out], share.detach(), masked.detach())
        outs = []
        for n in range(len(batches)):
            with torch.no_grad():
                outs.append(_forward(given, batches, n, embeddings_only=True))
        leaves = [{k: v.detach().requires_grad_() for k, v in out.items()} for out in outs]
        for n in range(1, len(leaves)):  # the same numbers for all: once in the graph
            leaves[n] |= {k: leaves[0][k] for k in leaves[0] if k not in ROWS}
        share = loss_share(objective, leaves, batches)
        with given.phase("backward"):
            share.backward()
        total = share.new_zeros(())
        for n in range(len(batches)):
            out = _forward(given, batches, n)
            names = [k for k in leaves[n] if k in ROWS or n == 0]
            surrogate = torch.stack([(out[k] * _gradient(leaves[n][k])).sum() for k in names]).sum()
            unused = sum((0.0 * out[k].sum() for k in leaves[n] if k not in names), surrogate.new_zeros(()))
            masked = _masked_share(given, out)
            given.backward(surrogate + unused + masked)
            total += masked.detach()
            outs[n] = {k: v.detach() for k, v in out.items()}
            if n + 1 < given.accumulation:
                given.engine.step()
        return _outcome(outs, share.detach(), total)

    @torch.no_grad()
    def validate(self, session: Any) -> dict[str, float]:
        """The loss over full global batches as in training, the same for any number of ranks, and what the embeddings
        of some of the pairs look like. May raise `boundary.Stop`.
        """
        engine, config = session.engine, session.config
        objective = config.objective
        rank, world, device = distributed.rank(), distributed.world_size(), distributed.device()
        data = self.dataset(config, session.parts, config.data.validation, training=False)
        micro, accumulation = config.training.micro_batch_size, session.accumulation
        size = micro * world * accumulation
        known = len(data.reader)
        whole = known // size * size or known  # a batch that is not full has a lower loss: only if no other is there
        numbers = list(range(min(whole, (config.training.evaluation_batches or known) * size)))
        starts = range(0, len(numbers), size)
        work: Iterator[list[tuple[int, int | None]]]
        work = (
            [(i, None) for i in share]
            for start in starts
            for share in micro_batches(numbers[start : start + size], rank, world, micro, accumulation)
        )
        loader = load_batches(data, work, 0)
        kept: dict[str, list[Tensor]] = {"image": [], "text": [], "ids": []}
        engine.eval()
        total = pairs = seen = 0.0
        try:
            for start in starts:
                watch.enter(f"evaluation, from sample {start}", session.step)
                batches, trouble = read(loader, accumulation)
                count = sum_and_agree([sum(b.targets for b in batches)], trouble)[0]
                outs = [_real(engine(**b.inputs(device)), b) for b in batches]
                if not count:
                    continue
                share = loss_share(objective, outs, batches)
                total, pairs = total + count * distributed.sum_over_ranks([float(share)])[0], pairs + count
                if seen < DIAGNOSED:
                    _keep(kept, outs, batches)
                    seen += count
        finally:
            engine.train()
        if not pairs:
            raise UserError(f"data.validation: no pairs in {config.data.validation}")
        return {"eval_loss": total / pairs, **_diagnose(kept, paired=objective.kind != "semantic_matching")}

    def unit(self, model: nn.Module, part: str, module: nn.Module, rows: Tensor) -> str:
        if part in self.image_parts:
            return "images"
        if model.masked_head is not None and module in set(model.masked_head.modules()):  # type: ignore[union-attr, operator]
            return "masked_tokens"
        return "texts" if rows.dim() == 2 else "tokens"

    def save_processor(self, parts: DualComponents, folder: Path) -> None:
        parts.image_processor.save_pretrained(folder)
        parts.tokenizer.save_pretrained(folder)


def sections(config: RunConfig) -> tuple[DualEncoder, Objective]:
    assert isinstance(config.model, DualEncoder) and config.objective is not None  # the schema sees to it
    return config.model, config.objective


def _forward(given: Pass, batches: Sequence[PairBatch], n: int, embeddings_only: bool = False) -> dict[str, Tensor]:
    """The embeddings of a micro-batch's real rows, and the loss of masked tokens, which come after them, if there are
    any. Dropout is drawn from the same seed whenever it is asked again."""
    torch.manual_seed((given.seed * 1009 + n) % 2**63)
    inputs = batches[n].inputs(given.device)
    if embeddings_only:
        inputs = {name: value for name, value in inputs.items() if not name.startswith("masked_")}
    with given.phase("forward"):
        return _real(given.engine(**inputs), batches[n])


def _real(out: dict[str, Tensor], batch: PairBatch) -> dict[str, Tensor]:
    return out | {"image": out["image"][: batch.images], "text": out["text"][: batch.texts]}


def loss_share(objective: Objective, outs: Sequence[dict[str, Tensor]], batches: Sequence[PairBatch]) -> Tensor:
    """This rank's share of the contrastive loss over the global batch, of the embeddings of its micro-batches."""
    image, text = (_precise(torch.cat([out[name] for out in outs])) for name in ROWS)
    scale = _precise(outs[0]["scale"])
    if objective.kind == "info_nce":
        return info_nce(image, text, scale, objective.image_weight)
    if objective.kind == "sigmoid":
        return sigmoid(image, text, scale, _precise(outs[0]["bias"]))
    image_labels = torch.cat([b.image_labels[: b.images] for b in batches if b.image_labels is not None])
    text_labels = torch.cat([b.text_labels[: b.texts] for b in batches if b.text_labels is not None])
    labels = image_labels.to(image.device), text_labels.to(text.device)
    return semantic_matching(image, text, *labels, scale, objective.label_similarity)


def _precise(values: Tensor) -> Tensor:
    """In fp32 at least: exponentials of scale x cosine are not to be rounded to bf16."""
    return values if values.dtype == torch.float64 else values.float()


def _masked_share(given: Pass, out: dict[str, Tensor]) -> Tensor:
    """This rank's share of the weighted mean over the masked tokens of the global batch."""
    objective = given.config.objective
    if "masked_loss" not in out or objective is None or objective.masked_language_modeling is None:
        return out["scale"].new_zeros(())
    return out["masked_loss"] * (objective.masked_language_modeling.weight / max(1, given.counts["masked_tokens"]))


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _outcome(outs: Sequence[dict[str, Tensor]], share: Tensor, masked: Tensor) -> Outcome:
    finite = [all(bool(out[name].isfinite().all()) for name in ROWS) for out in outs]
    components = {"contrastive": share, "masked_language_modeling": masked} if "masked_loss" in outs[0] else {}
    values: dict[str, float] = {name: float(outs[0][name].detach()) for name in ("scale", "bias") if name in outs[0]}
    return Outcome((share + masked).double(), finite, components, values)


def _keep(kept: dict[str, list[Tensor]], outs: Sequence[dict[str, Tensor]], batches: Sequence[PairBatch]) -> None:
    """Embeddings of all ranks, and a number for each text that equal texts share."""
    words = [ids[mask.bool()].tolist() for b in batches for ids, mask in _texts(b)]
    numbers = torch.tensor([hash(tuple(text)) for text in words], dtype=torch.int64, device=distributed.device())
    gather: Callable[[Tensor], Tensor] = lambda rows: gather_rows(rows)[0].cpu()  # noqa: E731
    kept["image"].append(gather(torch.cat([out["image"] for out in outs]).float()))
    kept["text"].append(gather(torch.cat([out["text"] for out in outs]).float()))
    kept["ids"].append(gather(numbers))


def _texts(batch: PairBatch) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(batch.input_ids[: batch.texts], batch.attention_mask[: batch.texts], strict=True)


def _diagnose(kept: dict[str, list[Tensor]], paired: bool) -> dict[str, float]:
    image, text, ids = (torch.cat(kept[name])[:DIAGNOSED] for name in ("image", "text", "ids"))
    if min(len(image), len(text)) < 2 or not (image.isfinite().all() and text.isfinite().all()):
        return {}
    found = {f"eval_{k}": v for k, v in embedding_space.diagnose(image, text, paired).items()}
    if not paired:
        return found
    similarity = embedding_space.directions(image) @ embedding_space.directions(text).T
    known = [k for k in (1, 5, 10) if k <= len(image)]
    scores = retrieval.retrieval_metrics(similarity, ids.tolist(), ids.tolist(), known)
    return found | {f"eval_{k}": v for k, v in scores.items() if "chance_mrr" not in k}


DUAL_ENCODER = DualEncoderFamily()
