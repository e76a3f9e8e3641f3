"""Checkpoints: what they consist of (``format``), saved, found, verified, loaded, gone on from."""

from retnet.checkpoints.find import find_checkpoint
from retnet.checkpoints.format import Progress
from retnet.checkpoints.load import Checkpoint, load_checkpoint
from retnet.checkpoints.save import Snapshot, load_checkpoint_state, save_checkpoint
from retnet.checkpoints.verify import check_weights_unchanged, find_damage, write_manifest

__all__ = [
    "Checkpoint",
    "Progress",
    "Snapshot",
    "check_weights_unchanged",
    "find_checkpoint",
    "find_damage",
    "load_checkpoint",
    "load_checkpoint_state",
    "save_checkpoint",
    "write_manifest",
]
