"""Checkpoints: what they consist of (``format``), saved, found, verified, loaded, gone on from."""

from retnet.checkpoints.find import find_checkpoint
from retnet.checkpoints.format import Progress
from retnet.checkpoints.load import Checkpoint, load_checkpoint
from retnet.checkpoints.save import Snapshot, load_checkpoint_state, save_checkpoint
from retnet.checkpoints.verify import check_weights_unchanged, write_manifest
