"""Sequence parallelism: the ranks of a group share a micro-batch, and each holds a part of every row.

DeepSpeed-Ulysses (arXiv 2309.14509): everything in the language model works on T / N tokens, except that attention
exchanges parts of the sequence for parts of the heads, by DeepSpeed's own ``UlyssesSPAttentionHF``. The loss of a rank
is that of its part, so that the sum over all ranks is the loss, as in data parallelism, and ZeRO needs no change.
"""

import math
from typing import Any

import torch
from torch import Tensor

from medvlm.errors import UserError
from medvlm.models.attention import VARLEN
from medvlm.objectives.language_modeling import IGNORE

EXACT = ("sdpa", "flash_attention_2", "flash_attention_3")  # causal without a mask


class SequenceParallel:
    """The group of ``size`` ranks, consecutive, to which this rank belongs. All ranks make one."""

    def __init__(self, size: int):
        import torch.distributed as dist

        self.size = size
        for first in range(0, dist.get_world_size(), size):
            ranks = list(range(first, first + size))
            group = dist.new_group(ranks)
            if dist.get_rank() in ranks:
                self.group, self.rank = group, dist.get_rank() - first

    def attach(self, language_model: Any, wanted: str) -> str:
        """Let the attention of a language model see whole rows; returns a line that says how.

        ``wanted`` is `model.attention`: its ``auto`` becomes SDPA where it chose a kernel for segments, which there are
        none of here. Raises UserError for an attention that would not be exact.
        """
        from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
        from transformers import AttentionInterface

        config = language_model.config
        core = config._attn_implementation
        if wanted == "auto" and core == VARLEN:
            core = "sdpa"
        heads, key_heads = (
            config.num_attention_heads,
            getattr(config, "num_key_value_heads", config.num_attention_heads),
        )
        if core not in EXACT:
            raise UserError(f"model.attention: training.sequence_parallel works with {', '.join(EXACT)}, not {core}")
        if heads % self.size or (key_heads % self.size and self.size % key_heads):
            raise UserError(
                f"training.sequence_parallel: {self.size} does not divide the language model's {heads} heads and "
                f"{key_heads} key heads"
            )
        if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
            raise UserError("training.sequence_parallel: this language model's sliding window would be ignored")
        if rope := _length_dependent_rope(config):
            raise UserError(
                f"training.sequence_parallel: rope of type {rope} depends on a row's length, of which a rank has a part"
            )
        if others := set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
            raise UserError(
                f"training.sequence_parallel: layers of type {', '.join(sorted(others))} would see a part of a row"
            )
        ulysses = UlyssesSPAttentionHF(
            AttentionInterface()[core],
            batch_size=1,
            attn_head_count=heads,
            attn_head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
            kv_head_count=key_heads,
            num_hidden_layers=config.num_hidden_layers,
            process_group=self.group,
            seq_length_is_variable=True,
        )

        def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, **options: Any) -> Any:
            # rows are padded on the right: no token sees padding, and no mask is needed
            ulysses.batch_size = query.shape[0]
            for name in ("required_query_shape", "required_key_value_shape", "required_context_shape"):
                length, _, *rest = getattr(ulysses, name)
                setattr(ulysses, name, torch.Size([length, query.shape[0], *rest]))
            return ulysses(module, query, key, value, None, **options)

        AttentionInterface.register("ulysses", attention)
        config._attn_implementation = "ulysses"
        return f"sequence parallel: {self.size} ranks share each row, attention by Ulysses over {core}"

    def pad(self, tokens: Tensor, value: int) -> Tensor:
        """[B, T] -> [B, T'], T' the next multiple of the group's size."""
        return torch.nn.functional.pad(tokens, (0, -tokens.shape[1] % self.size), value=value)

    def part(self, sequence: Tensor) -> Tensor:
        """This rank's part of the second dimension, which is a multiple of the group's size."""
        return sequence.chunk(self.size, dim=1)[self.rank]

    def labels(self, labels: Tensor) -> Tensor:
        """[B, T] -> [B, T' / size + 1]: this rank's labels and the one that its last position predicts."""
        padded = torch.nn.functional.pad(self.pad(labels, IGNORE), (0, 1), value=IGNORE)
        length = (padded.shape[1] - 1) // self.size
        return padded[:, self.rank * length : (self.rank + 1) * length + 1]

    def images(self, pixel_values: Tensor) -> Tensor:
        """[I, ...] -> this rank's share of the images, filled up with blank ones to the same number on all ranks."""
        each = math.ceil(pixel_values.shape[0] / self.size)
        mine = pixel_values[self.rank * each : (self.rank + 1) * each]
        return torch.cat([mine, mine.new_zeros(each - mine.shape[0], *pixel_values.shape[1:])])

    def gather_images(self, features: Tensor, count: int) -> Tensor:
        """Features of all images [I, N, D] from the shares; gradients go back to the rank that made them."""
        return _Gather.apply(features, self)[:count]


def _length_dependent_rope(config: Any) -> str | None:
    """The type of a rotation whose frequencies follow from the longest position, if the model has one."""
    given = getattr(config, "rope_parameters", None) or {}
    kinds = [v.get("rope_type") for v in (given, *given.values()) if isinstance(v, dict)]
    return next((kind for kind in kinds if kind and ("dynamic" in kind or kind == "longrope")), None)


class _Gather(torch.autograd.Function):
    """Shares [n, ...] of all ranks of a group -> [N n, ...]. PyTorch's own fails on gloo in a part of the world."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, group: SequenceParallel) -> Tensor:
        ctx.group = group
        shares = [torch.empty_like(share) for _ in range(group.size)]
        torch.distributed.all_gather(shares, share.contiguous(), group=group.group)
        return torch.cat(shares)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        total = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=ctx.group.group)
        return total.chunk(ctx.group.size)[ctx.group.rank], None
