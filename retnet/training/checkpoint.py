"""Checkpoints: the state after a completed optimizer step, in a folder that alone suffices.

    config.json, generation_config.json, model.safetensors    loadable by transformers
    tokenizer.json, tokenizer_config.json
    data.json              how the validation data was made
    optimizer.safetensors  AdamW's moments, by parameter name (not in best/ and final/)
    training_state.json    step, best validation loss
    carried.safetensors    the states that the next windows begin with (train.carry_state only)
    manifest.json          sizes and checksums of the above

A folder is written under a temporary name, synced and renamed, so a folder with the final name is
complete. Nothing is pickled. States are gathered by ``torch.distributed.checkpoint``, which gives
the same names and whole tensors for a plain, a DDP and a sharded model.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from transformers import PreTrainedTokenizerBase

from retnet.errors import UserError
from retnet.generation import DATA_RECORD, MANIFEST, find_damage, write_manifest
from retnet.training.build import Model, check_same_model

CHECKPOINTS = "checkpoints"
BEST = "best"
FINAL = "final"
OPTIMIZER = "optimizer.safetensors"
CARRIED = "carried.safetensors"
TRAINING_STATE = "training_state.json"
ALWAYS_THERE = ("config.json", "model.safetensors", "tokenizer.json", DATA_RECORD, TRAINING_STATE)
TAKE_OVER = "take over the model section of its run's config.yaml"
_TEMPORARY = ".unfinished-"
_REPLACED = ".unfinished-old-"
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass
class Progress:
    """Where a run stands: everything besides weights and moments.

    Attributes:
        step: Completed optimizer steps.
        best_loss: Lowest validation loss so far, nats per token; None before the first evaluation.
        best_step: Where that was.
        seconds: Time spent in training so far.
        global_batch: Rows of an optimizer step, which must stay the same when the run goes on.
    """

    step: int = 0
    global_batch: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    seconds: float = 0.0

    def forget_best(self) -> None:
        """The weights of the best evaluation are no longer there to be found."""
        self.best_loss = self.best_step = None


@dataclass(frozen=True)
class Snapshot:
    """What is written with the weights, the same in every checkpoint of a run."""

    tokenizer: PreTrainedTokenizerBase
    data_record: dict[str, Any]


def step_folder(run: Path, step: int) -> Path:
    """The folder of the checkpoint after ``step`` steps."""
    return run / CHECKPOINTS / f"step_{step}"


def list_checkpoints(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first.

    Raises:
        UserError: Whether there are any can't be seen.
    """
    parent = run / CHECKPOINTS
    try:
        entries = list(parent.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(
            f"{parent} can't be read ({error.strerror or error}), and what is there decides where "
            "the run begins: make it readable, or set another train.out_dir"
        ) from error
    folders = [path for path in entries if re.fullmatch(r"step_[0-9]+", path.name)]
    return sorted(folders, key=lambda path: int(path.name[5:]))


def checkpoint_damage(folder: Path, *, resumable: bool) -> str | None:
    """What is wrong with a checkpoint, or None when it is as it was written.

    Args:
        folder: The checkpoint.
        resumable: Whether it must hold the optimizer's state.
    """
    damage = find_damage(folder)
    if damage is not None:
        return damage
    described = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    needed = (*ALWAYS_THERE, OPTIMIZER) if resumable else ALWAYS_THERE
    lacking = [name for name in needed if name not in described]
    return f"{MANIFEST} says nothing of {', '.join(lacking)}" if lacking else None


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    bare_model: Model,
    optimizer: torch.optim.Optimizer | None,
    progress: Progress,
    snapshot: Snapshot,
    *,
    carried: dict[str, Tensor] | None = None,
    main_process: bool = True,
) -> None:
    """Write a checkpoint; every process must call this, the main one writes.

    Args:
        folder: Its final name; an existing folder there is replaced.
        model: The model that is trained, perhaps wrapped.
        bare_model: The transformers model inside.
        optimizer: None leaves out the optimizer's state: enough to generate, not to go on.
        progress: Saved with it.
        snapshot: Tokenizer and data record.
        carried: States carried from window to window, where there are any.
        main_process: Whether this process writes.

    Raises:
        OSError: It can't be written; nothing has changed then.
    """
    weights = get_model_state_dict(model, options=_WHOLE)
    moments = None
    if optimizer is not None:
        moments = get_optimizer_state_dict(model, optimizer, options=_WHOLE)
    if not main_process:
        return
    with _replacing(folder) as new:
        bare_model.save_pretrained(new, state_dict=weights)
        snapshot.tokenizer.save_pretrained(new)
        _write_json(new / DATA_RECORD, snapshot.data_record)
        _write_json(new / TRAINING_STATE, asdict(progress))
        if moments is not None:
            save_file(_flatten_moments(moments), new / OPTIMIZER)
            if carried is not None:
                save_file(carried, new / CARRIED)


def load_checkpoint_state(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Progress:
    """Put a checkpoint's weights and moments into model and optimizer.

    Raises:
        UserError: The folder is no checkpoint to go on from.
    """
    for name in ("model.safetensors", OPTIMIZER, TRAINING_STATE):
        if not (folder / name).is_file():
            raise UserError(
                f"checkpoint ({folder}) has no {name}: go on from one in {CHECKPOINTS}/, or use "
                "its weights alone with model.init_from"
            )
    weights: dict[str, Any] = dict(load_file(folder / "model.safetensors"))
    if "lm_head.weight" not in weights:  # tied
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    what, fix = f"checkpoint ({folder})", TAKE_OVER
    own: Any = get_model_state_dict(model)
    check_same_model(own, weights, what, fix)
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, weights, options=options)
    moments: Any = get_optimizer_state_dict(model, optimizer, options=options)
    stored = load_file(folder / OPTIMIZER)
    check_same_model(_flatten_moments(moments), stored, what, fix)  # tied weights have one
    for name, values in moments["state"].items():
        for key in values:
            values[key] = stored[f"{name}/{key}"]
    set_optimizer_state_dict(model, optimizer, moments, options=options)
    return Progress(**json.loads((folder / TRAINING_STATE).read_text()))


def prune_checkpoints(run: Path, keep: int) -> None:
    """Remove all but the ``keep`` newest checkpoints."""
    for folder in list_checkpoints(run)[:-keep]:
        _remove(folder)


def remove_unfinished(run: Path) -> None:
    """Tidy up after an interrupted write: remove its parts, put back what it was replacing."""
    for parent in (run, run / CHECKPOINTS):
        for old in parent.glob(f"{_REPLACED}*"):
            folder = parent / old.name.removeprefix(_REPLACED)
            if not folder.exists():
                old.rename(folder)
        for rest in parent.glob(f"{_TEMPORARY}*"):
            if rest.is_dir():
                shutil.rmtree(rest, ignore_errors=True)
            else:
                rest.unlink()


def replace_text(path: Path, text: str) -> None:
    """Write a file as a whole: whoever reads it finds the old text or the new."""
    new = path.with_name(_TEMPORARY + path.name)
    new.write_text(text, encoding="utf-8")
    sync(new)
    new.replace(path)


def _flatten_moments(state: dict[str, Any]) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": value.contiguous()
        for name, values in state["state"].items()
        for key, value in values.items()
    }


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of ``folder`` when it is complete and on disk."""
    new = folder.parent / f"{_TEMPORARY}{folder.name}"
    try:
        if folder.parent.name == CHECKPOINTS:  # a run folder that was removed stays removed
            folder.parent.mkdir(exist_ok=True)
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        yield new
        write_manifest(new)
        for file in new.iterdir():
            file.chmod(0o644)  # safetensors writes files that only their owner can read
            sync(file)
        sync(new)
    except Exception as error:
        shutil.rmtree(new, ignore_errors=True)  # a full disk needs the space
        if "(os error " in str(error):  # how safetensors and tokenizers report a failed write
            raise OSError(str(error)) from error
        raise
    if folder.exists():
        old = folder.parent / f"{_REPLACED}{folder.name}"
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old)
    else:
        new.rename(folder)
    sync(folder.parent)


def _remove(folder: Path) -> None:
    """Remove a checkpoint; one half removed is never seen under its name."""
    rest = folder.parent / f"{_TEMPORARY}removed-{folder.name}"
    shutil.rmtree(rest, ignore_errors=True)
    folder.rename(rest)
    shutil.rmtree(rest)


def sync(path: Path) -> None:
    """Have a file or folder on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
