"""Writing the checkpoints of a run, and putting their state back into it.

States are gathered by ``torch.distributed.checkpoint``, which gives the same names and whole
tensors for a plain, a DDP and a sharded model.
"""

import logging
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as states
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from retnet.checkpoints.code import ModelCode
from retnet.checkpoints.format import (
    CARD,
    CARRIED,
    CHECKPOINTS,
    COPY_AGAIN,
    DATA_RECORD,
    LORA,
    OPTIMIZER,
    SET_ASIDE,
    TRAINING_STATE,
    WEIGHTS,
    Progress,
    list_checkpoints,
    read_progress,
)
from retnet.checkpoints.lora import check_base, factors, merged, whole
from retnet.checkpoints.match import TAKE_OVER, check_finite, check_same_model
from retnet.checkpoints.verify import edited_card, write_manifest
from retnet.checkpoints.weights import read_file, read_weights
from retnet.errors import UserError
from retnet.files import remove_folder, replacing, tidy, write_json, write_text

logger = logging.getLogger(__name__)

NOT_SIGNED = "/step", "/exp_avg_sq"  # AdamW's numbers that can't be below 0
WHOLE = states.StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass(frozen=True)
class Snapshot:
    """What is written with the weights, the same in every checkpoint of a run."""

    tokenizer: PreTrainedTokenizerBase
    data_record: dict[str, Any]


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    bare_model: PreTrainedModel,
    optimizer: torch.optim.Optimizer | None,
    progress: Progress,
    snapshot: Snapshot,
    *,
    carried: dict[str, Tensor] | None = None,
    code: ModelCode | None = None,
    card: str | None = None,
    main_process: bool = True,
) -> None:
    """Write a checkpoint; every process must call this, the main one writes.

    An ``OSError`` where it can't be written; nothing has changed then.

    Args:
        folder: Its final name; an existing folder there is replaced.
        model: The model that is trained, perhaps wrapped; ``bare_model`` is the one inside.
        optimizer: None leaves out the optimizer's state: enough to generate, not to go on.
        carried: States carried from window to window, where there are any.
        code: Of the model, to be loaded without this package.
        card: The model card; one in the folder that somebody has edited stays instead.
    """
    weights: Any = states.get_model_state_dict(model, options=WHOLE)
    moments = None
    if optimizer is not None:
        moments = states.get_optimizer_state_dict(model, optimizer, options=WHOLE)
    if not main_process:
        return
    if folder.parent.name == CHECKPOINTS:  # a run folder that was removed stays removed
        folder.parent.mkdir(exist_ok=True)
    with replacing(folder) as new, _failed_writes():
        lora = factors(weights)
        plain = merged(bare_model, weights) if lora else weights
        bare_model.save_pretrained(new, state_dict=plain)
        if code is not None:
            code.write(new)
        snapshot.tokenizer.save_pretrained(new)
        write_json(new / DATA_RECORD, snapshot.data_record)
        write_json(new / TRAINING_STATE, asdict(progress))
        if moments is not None:
            save_file(_flatten_moments(moments), new / OPTIMIZER)
            if carried is not None:
                save_file(carried, new / CARRIED)
            if lora:
                save_file(lora, new / LORA)
        if card is not None:
            write_text(new / CARD, card)
        write_manifest(new)
        if card is not None:
            _keep_edited_card(folder, new)
        ordinary = stat.S_IMODE((new / DATA_RECORD).stat().st_mode)
        for file in new.iterdir():
            file.chmod(ordinary)  # safetensors writes files that only their owner can read


def _keep_edited_card(folder: Path, new: Path) -> None:
    """Take over the model card of the checkpoint that is replaced, if somebody has edited it."""
    for before in (folder, folder.with_name(SET_ASIDE + folder.name)):
        if (card := edited_card(before)) is not None:
            shutil.copyfile(card, new / CARD)
            logger.info(f"{card} was edited and is kept: its figures may be of the steps before")
            return


@contextmanager
def _failed_writes() -> Iterator[None]:
    """``OSError`` also for what safetensors and tokenizers report in their own way."""
    try:
        yield
    except Exception as error:
        if "(os error " in str(error):
            raise OSError(str(error)) from error
        raise


def load_checkpoint_state(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Progress:
    """Put a checkpoint's weights and moments into model and optimizer.

    A ``UserError`` where the folder is no checkpoint to go on from.
    """
    own: Any = states.get_model_state_dict(model)
    lora = [LORA] if factors(own) else []
    for name in (WEIGHTS, OPTIMIZER, TRAINING_STATE, *lora):
        if not (folder / name).is_file():
            raise UserError(
                f"checkpoint ({folder}) has no {name}: go on from one in {CHECKPOINTS}/, or use "
                "its weights alone with model.init_from"
            )
    what, fix = f"checkpoint ({folder})", TAKE_OVER
    progress = read_progress(folder)
    with _readable(what):
        plain: dict[str, Any] = dict(read_weights(folder, tied=True))
        stored = read_file(folder / LORA) if lora else {}
    weights: Any = whole(own, plain, stored, folder / LORA) if lora else plain
    check_same_model(own, weights, what, fix)
    check_finite(weights, what)
    options = states.StateDictOptions(full_state_dict=True)
    states.set_model_state_dict(model, weights, options=options)
    if lora:
        check_base(getattr(model, "module", model), plain, folder)
    moments: Any = states.get_optimizer_state_dict(model, optimizer, options=options)
    with _readable(what):
        stored = read_file(folder / OPTIMIZER)
    own = _flatten_moments(moments)
    _check_same_optimizer(own, stored, folder / OPTIMIZER)
    if own.keys() == stored.keys():  # else another model, of tied weights for instance
        what, fix = f"{folder / OPTIMIZER}", COPY_AGAIN
    check_same_model(own, stored, what, fix)
    check_finite(stored, f"{folder / OPTIMIZER}")
    for name, tensor in stored.items():
        if name.endswith(NOT_SIGNED) and (tensor < 0).any():  # whose root would be no number
            raise UserError(f"{folder / OPTIMIZER}: {name} is below 0: {COPY_AGAIN}")
    for name, values in moments["state"].items():
        for key in values:
            values[key] = stored[f"{name}/{key}"]
    states.set_optimizer_state_dict(model, optimizer, moments, options=options)
    return progress


def _check_same_optimizer(
    own: Mapping[str, Tensor], stored: Mapping[str, Tensor], file: Path
) -> None:
    """Raise a ``UserError`` where a file has other kinds of moments than an optimizer keeps."""
    here, there = ({name.rpartition("/")[2] for name in moments} for moments in (own, stored))
    if here != there:
        raise UserError(
            f"{file} is of another optimizer, it has {', '.join(sorted(there))} and here are "
            f"{', '.join(sorted(here))}: take over train.optimizer of its run's config.yaml, or "
            "the weights alone by model.init_from"
        )


@contextmanager
def _readable(what: str) -> Iterator[None]:
    """A ``UserError`` for a file that is none of safetensors."""
    try:
        yield
    except SafetensorError as error:
        raise UserError(f"{what} can't be read: {error}; {COPY_AGAIN}") from error


def _flatten_moments(state: dict[str, Any]) -> dict[str, Tensor]:
    """An optimizer's state as it is stored: "name of the parameter/name of the moment"."""
    return {
        f"{name}/{key}": value.contiguous()
        for name, values in state["state"].items()
        for key, value in values.items()
    }


def prune_checkpoints(run: Path, keep: int) -> None:
    """Remove all but the ``keep`` newest checkpoints; one that is protected stays, with a line."""
    for folder in list_checkpoints(run)[:-keep]:
        try:
            if folder.is_dir():
                remove_folder(folder)
        except PermissionError as error:
            logger.warning("%s is older than train.keep and stays (%s)", folder, error.strerror)


def remove_unfinished(run: Path) -> None:
    """Tidy up after an interrupted write."""
    tidy(run)
    tidy(run / CHECKPOINTS)
