"""Checkpoints that any number of ranks and any ZeRO stage can go on from.

A checkpoint holds, per rank, flat fragments of the parameters that trained: their fp32 values and their optimizer
state. Frozen weights are stored once per run, or, where a pretrained folder gives them again, not at all. Random
numbers and the data's position need no state: both are functions of the step. `docs/resume.md` describes the files.
"""

from medvlm.training.checkpoint.files import Entry
from medvlm.training.checkpoint.folder import (
    checkpoints,
    clean,
    fingerprint,
    newest,
    read_manifest,
    refuse_changed,
    remove_after,
    step_folders,
    step_of,
    to_resume,
)
from medvlm.training.checkpoint.loading import load_weights, resume
from medvlm.training.checkpoint.pieces import Weights, consolidate
from medvlm.training.checkpoint.saving import Saver, identity, save
from medvlm.training.checkpoint.sharded import finish_folder, in_pieces, new_folder, write_sharded
from medvlm.training.checkpoint.stock import StockWeights

__all__ = [
    "Entry",
    "Saver",
    "StockWeights",
    "Weights",
    "checkpoints",
    "clean",
    "consolidate",
    "fingerprint",
    "finish_folder",
    "identity",
    "in_pieces",
    "load_weights",
    "new_folder",
    "newest",
    "read_manifest",
    "refuse_changed",
    "remove_after",
    "resume",
    "save",
    "step_folders",
    "step_of",
    "to_resume",
    "write_sharded",
]
