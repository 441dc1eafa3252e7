"""LLaVA on a convolutional image tower, for ``AutoModelForImageTextToText`` with ``trust_remote_code=True``.

``LlavaForConditionalGeneration`` would hand the tower's feature maps to a linear layer. Imports only PyTorch and
transformers.
"""

from typing import Any

from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration


class ConvolutionalLlavaConfig(LlavaConfig):
    model_type = "medvlm_convolutional_llava"


class ConvolutionalLlava(LlavaForConditionalGeneration):
    config_class = ConvolutionalLlavaConfig

    def __init__(self, config: Any):
        config.vision_config.hidden_size = config.vision_config.hidden_sizes[-1]  # which LLaVA's projector asks for
        super().__init__(config)
        self.model.vision_tower.register_forward_hook(maps_to_tokens)


def maps_to_tokens(tower: nn.Module, args: Any, output: Any) -> Any:
    """Hidden states [I, C, h, w] -> [I, h * w, C], row by row."""
    if output.hidden_states is not None:
        output.hidden_states = tuple(state.flatten(2).transpose(1, 2) for state in output.hidden_states)
    return output
