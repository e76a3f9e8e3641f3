"""Going on from a checkpoint: whether it fits the run as it is set up now, then its state."""

import logging
from pathlib import Path
from typing import Any

from retnet.checkpoints import load_checkpoint_state
from retnet.checkpoints.format import DATA_RECORD
from retnet.checkpoints.match import TAKE_OVER, check_same_meaning
from retnet.errors import UserError
from retnet.files import read_json
from retnet.training.loop import Trainer

logger = logging.getLogger(__name__)

TEXT_HASHES = ("train_sha256", "validation_sha256")


def go_on(trainer: Trainer, checkpoint: Path) -> None:
    """Put a checkpoint's state into a fresh trainer.

    Raises:
        UserError: The checkpoint is of another model, tokenizer or size of a step; or of another
            text, unless ``train.resume`` names it.
    """
    _check_data(trainer, checkpoint)
    progress = load_checkpoint_state(checkpoint, trainer.model, trainer.optimizer.optimizer)
    check_same_meaning(trainer.bare_model, checkpoint, f"checkpoint ({checkpoint})", TAKE_OVER)
    if progress.global_batch != trainer.batches.global_batch:
        raise UserError(
            f"train.batch_size x train.gradient_accumulation_steps x processes "
            f"({trainer.batches.global_batch}) must stay {progress.global_batch}, the rows of a "
            f"step in {checkpoint}"
        )
    trainer.progress = progress
    if trainer.carried is not None:
        trainer.carried.load(checkpoint, trainer.accelerator)
    logger.info("going on from %s (step %d)", checkpoint, progress.step)


def _check_data(trainer: Trainer, checkpoint: Path) -> None:
    """Compare tokenizer and text with those that the checkpoint was trained on."""
    before, now = _read_record(checkpoint), trainer.data.record
    spec = trainer.config
    if before.get("tokenizer_sha256") != now["tokenizer_sha256"]:
        raise UserError(
            f"data.tokenizer ({spec.data.tokenizer}) is not the tokenizer that checkpoint "
            f"({checkpoint}) was trained with: restore the text it was made from, or set "
            f"data.tokenizer={checkpoint} train.resume={checkpoint} and another train.out_dir"
        )
    if all(before.get(key) == now[key] for key in TEXT_HASHES):
        return
    changed = (
        f"data.source ({spec.data.source}) does not give the text that checkpoint ({checkpoint}) "
        "was trained on"
    )
    if spec.train.carry_state:
        raise UserError(
            f"{changed}, and with train.carry_state (true) its states belong to that text: restore "
            f"it, or take the weights alone into another train.out_dir (model.init_from)"
        )
    if spec.train.resume == "auto":
        raise UserError(
            f"{changed}: restore it, or go on with the new text by train.resume={checkpoint}"
        )
    logger.warning("%s: going on with the new text, as train.resume names the checkpoint", changed)


def _read_record(checkpoint: Path) -> dict[str, Any]:
    fix = "go on from another one, or use its weights alone with model.init_from"
    try:
        return read_json(checkpoint / DATA_RECORD, fix)
    except UserError as error:
        raise UserError(
            f"checkpoint ({checkpoint}) has no {DATA_RECORD} that can be read: {fix}"
        ) from error
