"""What differs between families of models; loop, engine, loader and checkpoints know no more of a model than this.

A new family is a section in ``medvlm/config/model.py``, a model, a module here, and an export adapter.
"""

from medvlm.config.model import Model
from medvlm.training.families.base import Family, Outcome, Pass
from medvlm.training.families.dual_encoder import DUAL_ENCODER
from medvlm.training.families.llava import LLAVA

__all__ = ["FAMILIES", "Family", "Outcome", "Pass", "family_of"]

FAMILIES: dict[str, Family] = {"llava": LLAVA, "dual_encoder": DUAL_ENCODER}


def family_of(config: Model) -> Family:
    return FAMILIES[config.family]
