"""medvlm: large-scale training of medical vision-language models on DeepSpeed."""

__version__ = "0.1.0"
