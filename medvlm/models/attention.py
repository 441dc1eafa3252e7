"""Attention over rows of segments: cost grows with the sum of the segments' squared lengths, not the row's square.

Registered with ``transformers`` as ``medvlm_varlen`` for causal language models. On CUDA it is
``torch.nn.attention.varlen``, PyTorch's own flash attention, for GPUs without the flash-attn packages; elsewhere one
SDPA call per segment. Segments come as ``cu_seq_lens_q``, the keyword that flash attention takes too.
"""

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

VARLEN = "medvlm_varlen"
KNOWN = frozenset(inspect.signature(varlen_attn).parameters)  # to this torch


def varlen_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """query [B, H, T, D], key and value [B, K, T, D] -> [B, T, H, D]. Rows with a mask (padding) go to SDPA.

    Without a mask the edges of the segments must be given: raises ValueError rather than let segments see each other.
    """
    unsupported = [name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None]
    if unsupported:
        raise ValueError(f"variable-length attention does not know {unsupported[0]} of {type(module).__name__}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if attention_mask is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scale)
    if cu_seq_lens_q is None or max_length_q is None:
        raise ValueError(f"{type(module).__name__} got neither a mask nor the edges of its segments (cu_seq_lens_q)")
    rows, heads, tokens, width = query.shape
    q, k, v = (t.transpose(1, 2).reshape(rows * tokens, -1, width) for t in (query, key, value))
    if query.is_cuda:
        out = flash_segments(q, k, v, cu_seq_lens_q, max_length_q, scale, sliding_window)
    else:
        out = sdpa_segments(q, k, v, cu_seq_lens_q, scale, sliding_window, dropout)
    return out.view(rows, tokens, heads, width), None


@torch.compiler.disable  # the number of segments is one of the data
def sdpa_segments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    window: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Causal attention inside each segment: [T, H, D], two [T, K, D] and int32 [segments + 1] -> [T, H, D]."""
    lengths = cu_seqlens.diff().tolist()
    pieces = zip(*(t.transpose(0, 1).split(lengths, dim=1) for t in (query, key, value)), strict=True)
    outputs = []
    for length, (q, k, v) in zip(lengths, pieces, strict=True):
        band = sliding_band(length, window, query.device) if window is not None and window < length else None
        outputs.append(
            scaled_dot_product_attention(
                q[None],
                k[None],
                v[None],
                attn_mask=band,
                is_causal=band is None,
                scale=scale,
                dropout_p=dropout,
                enable_gqa=query.shape[1] != key.shape[1],
            )[0]
        )
    return torch.cat(outputs, dim=1).transpose(0, 1)


def sliding_band(length: int, window: int, device: torch.device) -> Tensor:
    """bool [length, length]: a token sees itself and the ``window`` - 1 before it, as transformers counts."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (distance >= 0) & (distance < window)


def flash_segments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """As :func:`sdpa_segments`, in one call of PyTorch's flash attention (CUDA, fp16 or bf16)."""
    grouped = query.shape[1] != key.shape[1]
    options = varlen_options(KNOWN, scale, window, grouped)
    if grouped and "enable_gqa" not in options:
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    out: Any = varlen_attn(query, key, value, cu_seqlens, cu_seqlens, longest, longest, **options)
    return out


def varlen_options(known: Any, scale: float, window: int | None, grouped: bool) -> dict[str, Any]:
    """Keywords of ``varlen_attn`` as this torch has them. Raises NotImplementedError where it lacks one.

    Its first version had ``is_causal``; later ones say causal with ``window_size`` (-1, 0) and have ``scale`` and
    ``enable_gqa``. A window counts the tokens before the current one.
    """
    options: dict[str, Any] = {}
    if "window_size" in known:
        options["window_size"] = (-1 if window is None else window - 1, 0)
    elif window is None and "is_causal" in known:
        options["is_causal"] = True
    else:
        raise NotImplementedError("this torch's varlen_attn has no window_size, which a sliding window needs")
    if "scale" not in known:
        raise NotImplementedError("this torch's varlen_attn has no scale")
    options["scale"] = scale
    if grouped and "enable_gqa" in known:
        options["enable_gqa"] = True
    return options


def varlen_mask(*, attention_mask: Tensor | None = None, **options: Any) -> Tensor | None:
    """What ``transformers`` hands to :func:`varlen_attention`: SDPA's mask of a padded batch, else none."""
    if attention_mask is None:
        return None
    return sdpa_mask(attention_mask=attention_mask, **{**options, "allow_is_causal_skip": False})


AttentionInterface.register(VARLEN, varlen_attention)
AttentionMaskInterface.register(VARLEN, varlen_mask)
