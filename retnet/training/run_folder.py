"""The folder of a run: locked, made, tidied up."""

import logging
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from retnet.checkpoints.format import (
    BEST,
    CHECKPOINTS,
    FINAL,
    METRICS,
    PARTS_OF_A_RUN,
    SET_ASIDE,
    is_run,
    list_checkpoints,
    read_progress,
    step_number,
)
from retnet.checkpoints.format import CONFIG as CHECKPOINT_CONFIG
from retnet.checkpoints.save import remove_unfinished
from retnet.errors import UserError, os_errors
from retnet.files import missing_folders, remove, write_text
from retnet.paths import check_folder, kind_of
from retnet.training.config import RECORDED as CONFIG
from retnet.training.config import to_yaml
from retnet.training.health import DIVERGED
from retnet.training.spec import Config

logger = logging.getLogger(__name__)

LOCK = ".lock"
KINDS = {CONFIG: "file", LOCK: "file", METRICS: "file", DIVERGED: "file",
         CHECKPOINTS: "folder", BEST: "folder", FINAL: "folder",
         **dict.fromkeys(("retnet", "wandb", "trackio", "mlflow", ".aim"), "folder")}  # fmt: skip
ATTEMPTS = 100  # at a folder that others, who had nothing to write there, remove meanwhile


@dataclass(frozen=True)
class Start:
    """How a run begins: from a checkpoint, anew (None), or not at all."""

    checkpoint: Path | None = None
    finished: int = 0  # the steps of a run that has come to its end; 0: there is something to do
    damaged_end: bool = False  # final/ is there and not to be used
    warmup_steps: int | None = None  # of the run in the folder, where it keeps its own


class RunLock:
    """Keeps others out of a run folder, from before anything in it is looked at.

    The folder is made where there is none, and removed again where nothing was written there. It
    is free when the process ends, however it does.
    """

    def __init__(self, run: Path) -> None:
        self._run = run
        self._lock = FileLock(run / LOCK)
        self._made: list[Path] = []  # folders that were not there, the innermost first
        self._before: set[str] = set()  # names of what was in the folder

    def acquire(self) -> None:
        """Take the folder, or make it.

        A ``UserError`` where another process trains there, or the folder can't be written.
        """
        check_folder(self._run, "train.out_dir")
        _check_kinds(self._run)
        with writing(self._run):
            for left in reversed(range(ATTEMPTS)):
                try:
                    return self._try()
                except (FileNotFoundError, FileExistsError):  # it is gone again, or can't be there
                    if not left:
                        raise

    def _try(self) -> None:
        made = missing_folders(self._run)
        try:
            self._run.mkdir(parents=True, exist_ok=True)
            before = _names(self._run)
            self._lock.acquire(timeout=0)
        except Timeout as error:  # those who hold it have the folder
            raise UserError(
                f"train.out_dir ({self._run}) is in use by another run: wait for it, or set "
                "another folder"
            ) from error
        except OSError:
            _remove_empty(made)
            raise
        self._made, self._before = made, before

    def release(self) -> None:
        """Give the folder back; for a process that does not hold it this does nothing."""
        if self._lock.is_locked and LOCK not in self._before:
            # whoever waits for a file that is removed while it is held gets none, and tries again
            with suppress(OSError):
                if _names(self._run) == self._before | {LOCK}:
                    (self._run / LOCK).unlink()
                    _remove_empty(self._made)
        self._lock.release(force=True)


def _check_kinds(run: Path) -> None:
    """Raise a ``UserError`` where a folder holds what a run would replace or stumble over."""
    if kind_of(run / CHECKPOINT_CONFIG, "train.out_dir") and any(run.glob("*.safetensors")):
        raise UserError(
            f"train.out_dir ({run}) is a checkpoint: set another folder, or go on from this one by "
            f"train.resume={run}"
        )
    place = run.resolve()
    for folder in place.parents:
        if place.relative_to(folder).parts[0] in PARTS_OF_A_RUN and is_run(folder):
            raise UserError(  # which training there replaces and removes
                f"train.out_dir ({run}) lies among the checkpoints of the run in {folder}: set "
                f"another folder, or go on with that run by train.out_dir={folder}"
            )
    for name, kind in KINDS.items():
        found = kind_of(run / name, "train.out_dir")
        if kind == "file" and (run / name).is_symlink():  # what it leads to would be rewritten
            raise UserError(
                f"train.out_dir ({run}): {run / name} is a link, and a run writes there: remove "
                "the link, or set another train.out_dir"
            )
        if found is None and (run / name).is_symlink():
            raise UserError(
                f"train.out_dir ({run}): {run / name} is a link to nothing: restore what it leads "
                "to, remove the link, or set another train.out_dir"
            )
        if found not in (None, kind):
            raise UserError(
                f"train.out_dir ({run}): {run / name} is no {kind}, as a run has it there: move it "
                "away, or set another train.out_dir"
            )


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders, the innermost first, up to one that others use."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def open_run_folder(config: Config, start: Start) -> bool:
    """Tidy the run's folder up, and write the configuration.

    Checkpoints that are newer than the start, because they are damaged or of a course that is not
    followed, are set aside under another name; so are the end and the best of such a course.

    Returns whether the folder holds the best weights so far; a ``UserError`` where the folder
    can't be written.
    """
    run = config.train.run_folder
    with writing(run):
        remove_unfinished(run)
        (run / DIVERGED).unlink(missing_ok=True)
        if start.checkpoint is not None:
            newer = _newer(run, step_of(start.checkpoint), start, config.train.resume != "auto")
            for folder in newer:
                aside = folder.with_name(SET_ASIDE + folder.name)
                remove(aside)
                why = "is not gone on from"
                if folder == start.checkpoint:
                    why = f"is of step {step_of(folder)}, whatever its name"
                folder.rename(aside)
                logger.warning(f"{folder} {why}: it is kept as {aside.name}")
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
        return read_progress(folder).step
    except UserError:
        return 0


def writing(run: Path) -> AbstractContextManager[None]:
    fix = "set another folder, or make it writable"
    return os_errors(f"train.out_dir ({run}) can't be written", fix)
