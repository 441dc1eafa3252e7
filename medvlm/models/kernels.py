"""Which attention and which fused kernels the language model gets on this machine, and why nothing better."""

import importlib.util
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from medvlm.errors import UserError
from medvlm.models.attention import VARLEN
from medvlm.models.backbones import CONVOLUTIONAL
from medvlm.objectives.language_modeling import linear_cross_entropy_sum

PACKAGES = {
    "flash_attention_2": "flash-attn",
    "flash_attention_3": "flash-attn-3",
    "flash_attention_4": "flash-attn-4",
    "varlen": "torch.nn.attention.varlen",
    "liger": "liger-kernel",
}
FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
LIGER_MODELS = ("llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3", "gemma", "gemma2")
ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu"}  # of Liger's gated layers


@dataclass(frozen=True)
class Machine:
    """What the choice depends on: ``packages`` are keys of PACKAGES that can be imported, ``capability`` of CUDA."""

    cuda: bool = False
    capability: tuple[int, int] = (0, 0)
    bf16: bool = False
    packages: frozenset[str] = frozenset()

    @staticmethod
    def here(dtype: torch.dtype) -> "Machine":
        """This process's device, and a run in ``dtype``."""
        found = {
            "flash_attention_2": transformers.utils.is_flash_attn_2_available(),
            "flash_attention_3": transformers.utils.is_flash_attn_3_available(),
            "flash_attention_4": transformers.utils.is_flash_attn_4_available(),
            "varlen": importlib.util.find_spec("torch.nn.attention.varlen") is not None,
            "liger": importlib.util.find_spec("liger_kernel") is not None,
        }
        cuda = torch.cuda.is_available()
        capability = torch.cuda.get_device_capability() if cuda else (0, 0)
        return Machine(cuda, capability, dtype == torch.bfloat16, frozenset(k for k, v in found.items() if v))


@dataclass(frozen=True)
class Choice:
    """``name`` as in the configuration; ``reasons`` say, best first, why each better one was not taken."""

    name: str
    reasons: tuple[str, ...] = ()

    def line(self, what: str) -> str:
        return f"{what}: {self.name}" + (f" ({'; '.join(self.reasons)})" if self.reasons else "")


def tower_lines(towers: Mapping[str, Any]) -> list[str]:
    """The attention of image and text towers, by part, which transformers chooses; a ResNet has none."""
    lines = []
    for part, tower in towers.items():
        if tower.config.model_type != CONVOLUTIONAL:
            name = tower.config._attn_implementation
            lines.append(f"{part} attention: {name}" + f" ({type(tower).__name__} has no other)" * (name == "eager"))
    return lines


def choose_attention(requested: str, machine: Machine, text: Any) -> Choice:
    """``requested`` is ``model.attention``, ``text`` the language model's configuration.

    Raises UserError where the attention asked for cannot compute this model here, exactly and with gradients.
    """
    if requested != "auto":
        reason = attention_obstacle(requested, machine, text)
        if reason:
            raise UserError(f"model.attention: {requested}: {reason}; `auto` takes the best that works")
        return Choice(requested)
    return _first(attention_preference(machine), lambda name: attention_obstacle(name, machine, text))


def attention_preference(machine: Machine) -> tuple[str, ...]:
    """Best first. FA3 is written for Hopper (9.0), FA4 for Blackwell (10.0) and Hopper; eager runs everything."""
    if not machine.cuda:
        return ("varlen", "sdpa", "eager")
    flash: tuple[str, ...] = ("flash_attention_2",)
    if machine.capability >= (9, 0):
        newest = ("flash_attention_3", "flash_attention_4")
        flash = ((newest[1],) if machine.capability >= (10, 0) else newest) + flash
    return (*flash, "varlen", "sdpa", "flex_attention", "eager")


def attention_obstacle(name: str, machine: Machine, text: Any) -> str | None:
    """Why an implementation cannot serve this model on this machine, or None."""
    model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(text)]
    kind, softcap = text.model_type, getattr(text, "attn_logit_softcapping", None)
    if name in FLASH:
        least = {"flash_attention_2": (8, 0), "flash_attention_3": (9, 0), "flash_attention_4": (9, 0)}[name]
        return (
            _needs_gpu(machine, least)
            or (None if name in machine.packages else f"{PACKAGES[name]} is not installed")
            or (None if model._supports_flash_attn else f"{kind} does not support flash attention")
            or ("its soft cap is untried" if softcap and name == "flash_attention_4" else None)
        )
    if name == "varlen":
        layers = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return (
            (None if model._supports_attention_backend else f"{kind} takes no registered attention")
            or (f"{kind} caps its attention scores" if softcap else None)
            or (f"{kind} has {min(layers)} layers" if layers else None)
            or (f"{kind} has attention sinks" if kind == "gpt_oss" else None)
            or (f"{kind} has keys and values of different widths" if hasattr(text, "qk_rope_head_dim") else None)
            or (_varlen_gpu_obstacle(machine, text, width) if machine.cuda else None)
        )
    if name == "sdpa":
        unsupported = softcap or not model._supports_sdpa
        return f"{kind} does not support SDPA" if unsupported else None
    if name == "flex_attention":
        if not machine.cuda:
            return "has no backward pass on a CPU"
        return None if model._supports_flex_attn else f"{kind} does not support flex attention"
    return None


def _needs_gpu(machine: Machine, least: tuple[int, int]) -> str | None:
    if not machine.cuda:
        return "needs a GPU"
    if machine.capability < least:
        have = "{}.{}".format(*machine.capability)
        return f"needs compute capability {'{}.{}'.format(*least)}, this GPU has {have}"
    return None if machine.bf16 else "needs a bf16 run"


def _varlen_gpu_obstacle(machine: Machine, text: Any, width: int) -> str | None:
    return (
        _needs_gpu(machine, (8, 0))
        or (None if "varlen" in machine.packages else f"this torch has no {PACKAGES['varlen']}")
        or (f"heads of {width} are not a multiple of 8 up to 256" if width % 8 or width > 256 else None)
        or ("has no dropout" if getattr(text, "attention_dropout", 0.0) else None)
    )


def choose_kernels(requested: str, machine: Machine, text: Any) -> Choice:
    """``requested`` is ``model.kernels``: ``liger`` fuses RMSNorm, RoPE, SwiGLU and the loss; ``torch`` is PyTorch."""
    reason = (
        (None if machine.cuda else "Liger needs a GPU")
        or (None if "liger" in machine.packages else f"{PACKAGES['liger']} is not installed")
        or (None if text.model_type in LIGER_MODELS else f"Liger has no kernels for {text.model_type}")
    )
    if requested == "liger" and reason:
        raise UserError(f"model.kernels: liger: {reason}; `auto` takes it where it works")
    if requested == "torch" or reason:
        return Choice("torch", (reason,) if requested == "auto" and reason else ())
    return Choice("liger")


def apply_liger(language_model: Any) -> None:
    """Put Liger's kernels into this model, which keeps its weights and their names. RoPE is replaced in its module."""
    from liger_kernel.transformers import monkey_patch

    text = language_model.config
    patch = monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN[text.model_type]
    known = inspect.signature(patch).parameters
    activation = getattr(text, "hidden_activation", None) or text.hidden_act
    gated = {name: ACTIVATIONS.get(activation) == name for name in ("swiglu", "geglu") if name in known}
    rotary = (getattr(text, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0) == 1.0
    # the loss is ours to call: liger_loss, inside the output layer
    patch(model=language_model, rope=rotary, rms_norm=True, fused_linear_cross_entropy=False, **gated)


def liger_loss(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
    """``linear_cross_entropy_sum`` by Liger's kernel, which makes gradients only if ``hidden`` wants one."""
    if not len(targets) or not (hidden.requires_grad and torch.is_grad_enabled()):
        return linear_cross_entropy_sum(hidden, weight, targets, bias)
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden, weight, targets, bias, reduction="sum", accum_dtype=torch.float32)


def attention_implementation(choice: Choice) -> str:
    """The name that ``transformers`` knows it by."""
    return VARLEN if choice.name == "varlen" else choice.name


def _first(names: Sequence[str], obstacle: Any) -> Choice:
    reasons: list[str] = []
    for name in names:
        reason = obstacle(name)
        if reason is None:
            return Choice(name, tuple(reasons))
        reasons.append(f"{name}: {reason}")
    raise AssertionError("eager attention has no obstacle")
