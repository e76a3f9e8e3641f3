"""The folder of a run: locked, made, tidied up."""

import logging
import shutil
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from retnet.checkpoints.format import (
    BEST,
    COPY_AGAIN,
    FINAL,
    TRAINING_STATE,
    list_checkpoints,
    step_number,
)
from retnet.checkpoints.save import remove_unfinished
from retnet.errors import UserError, os_errors
from retnet.files import read_json, write_text
from retnet.training.config import to_yaml
from retnet.training.health import DIVERGED
from retnet.training.spec import Config

logger = logging.getLogger(__name__)

CONFIG = "config.yaml"
LOCK = ".lock"
SET_ASIDE = "set-aside-"


@dataclass(frozen=True)
class Start:
    """How a run begins: from a checkpoint, anew (None), or not at all."""

    checkpoint: Path | None = None
    finished: int = 0  # the steps of a run that has come to its end; 0: there is something to do
    damaged_end: bool = False  # final/ is there and not to be used


def lock_run_folder(lock: FileLock) -> None:
    """Keep others out of a run folder if it exists; it is free again when the process ends.

    A ``UserError`` where another process trains there, or the folder can't be written.
    """
    run = Path(lock.lock_file).parent
    if not run.is_dir():
        return
    with writing(run):
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError(
                f"train.out_dir ({run}) is in use by another run: wait for it, or set another "
                "folder"
            ) from error


def open_run_folder(config: Config, start: Start, lock: FileLock) -> bool:
    """Create the folder where there is none, tidy it up, and write the configuration.

    Checkpoints that are newer than the start, because they are damaged or of a course that is not
    followed, are set aside under another name; so are the end and the best of such a course.

    Returns whether the folder holds the best weights so far; a ``UserError`` where another process
    trains there, or the folder can't be written.
    """
    run = config.train.run_folder
    with writing(run):
        run.mkdir(parents=True, exist_ok=True)
        lock_run_folder(lock)
        remove_unfinished(run)
        (run / DIVERGED).unlink(missing_ok=True)
        if start.checkpoint is not None:
            newer = _newer(run, step_of(start.checkpoint), start, config.train.resume != "auto")
            for folder in newer:
                aside = folder.with_name(SET_ASIDE + folder.name)
                if aside.exists():
                    shutil.rmtree(aside)
                folder.rename(aside)
                logger.warning(f"{folder} is not gone on from: it is kept as {aside.name}")
        write_text(run / CONFIG, to_yaml(config))
        return (run / BEST).is_dir()


def _newer(run: Path, step: int, start: Start, named: bool) -> list[Path]:
    """What is newer than the checkpoint of ``step`` to go on from, and an end that is damaged.

    Under auto, final/ and best/ are of the same course: the run comes to them again.
    """
    newer = [folder for folder in list_checkpoints(run) if step_number(folder) > step]
    if named:
        return newer + [folder for folder in (run / BEST, run / FINAL) if step_of(folder) > step]
    return [*newer, run / FINAL] if start.damaged_end else newer


def step_of(folder: Path) -> int:
    """The steps after which a checkpoint was written; 0 when it is not there."""
    try:
        return int(read_json(folder / TRAINING_STATE, COPY_AGAIN)["step"])
    except (ValueError, KeyError, TypeError):  # UserError is a ValueError
        return 0


def writing(run: Path) -> AbstractContextManager[None]:
    fix = "set another folder, or make it writable"
    return os_errors(f"train.out_dir ({run}) can't be written", fix)
