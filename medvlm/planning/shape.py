"""What the size of a batch is."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchShape:
    """Of one rank's micro-batch: ``rows`` of ``tokens`` tokens (image tokens included) with ``images`` images each.

    ``supervised`` of the tokens of a row are learnt; their logits are made. ``packed`` rows are laid end to end.
    """

    rows: int
    tokens: int
    images: int
    supervised: int
    packed: bool
