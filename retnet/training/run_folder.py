"""The folder of a run: what is there already, and whether it may be used."""

import logging
import shutil
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from retnet.checkpoints.format import (
    BEST,
    CHECKPOINTS,
    COPY_AGAIN,
    FINAL,
    TRAINING_STATE,
    list_checkpoints,
    step_number,
)
from retnet.checkpoints.save import remove_unfinished
from retnet.checkpoints.verify import checkpoint_damage
from retnet.errors import UserError, os_errors
from retnet.files import missing_folders, read_json, write_text
from retnet.training.config import load_config, to_yaml
from retnet.training.health import DIVERGED
from retnet.training.spec import RESUMABLE_KEYS, Config, flatten

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


def plan_start(config: Config) -> Start:
    """Decide from the run folder and ``train.resume``; writes nothing.

    Raises:
        UserError: The folder belongs to another configuration, or is not to be gone on with.
    """
    run, resume = config.train.run_folder, config.train.resume
    if run.exists() and not run.is_dir():
        raise UserError(f"train.out_dir ({run}) is a file: name a folder")
    missing = missing_folders(run)
    with _writing(run):  # whether it can be made
        run.mkdir(parents=True, exist_ok=True)
        for folder in missing:
            folder.rmdir()
    if resume == "auto":
        return _automatic_start(config, run)
    if resume != "never":
        return _named_start(Path(resume), run, config.train.max_steps)
    if _holds_run(run):
        raise UserError(
            f"train.out_dir ({run}) already holds a run and train.resume is never: remove it, "
            "or set another train.out_dir"
        )
    return Start()


def lock_run_folder(lock: FileLock) -> None:
    """Keep others out of a run folder if it exists; it is free again when the process ends.

    Raises:
        UserError: Another process trains there, or the folder can't be written.
    """
    run = Path(lock.lock_file).parent
    if not run.is_dir():
        return
    with _writing(run):
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

    Returns:
        Whether the folder holds the best weights so far.

    Raises:
        UserError: Another process trains there, or the folder can't be written.
    """
    run = config.train.run_folder
    with _writing(run):
        run.mkdir(parents=True, exist_ok=True)
        lock_run_folder(lock)
        remove_unfinished(run)
        (run / DIVERGED).unlink(missing_ok=True)
        if start.checkpoint is not None:
            newer = _newer(run, _step_of(start.checkpoint), start, config.train.resume != "auto")
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
        return newer + [folder for folder in (run / BEST, run / FINAL) if _step_of(folder) > step]
    return [*newer, run / FINAL] if start.damaged_end else newer


def _holds_run(run: Path) -> bool:
    """Whether something of a run is there; one that died before its first save has only best/."""
    return bool(list_checkpoints(run)) or (run / FINAL).exists() or (run / BEST).exists()


def _automatic_start(config: Config, run: Path) -> Start:
    """From the newest whole checkpoint of the run folder."""
    _check_same_configuration(config, run)
    final, damage = run / FINAL, None
    if final.exists():
        damage = checkpoint_damage(final, resumable=False)
        done = _step_of(final)
        if damage is None and done >= config.train.max_steps:
            return Start(finished=done)
    checkpoint = _newest_whole(run)
    if checkpoint is not None:
        _check_length(checkpoint, config.train.max_steps)
    elif final.exists():  # it was written after the last checkpoint
        raise UserError(
            f"train.out_dir ({run}) has {FINAL}/ and no checkpoint in {CHECKPOINTS}/ to go on "
            "from: put one back, or set another train.out_dir (model.init_from takes the weights)"
        )
    if damage is not None:
        logger.warning(f"checkpoint ({final}) is damaged, {damage}: it is written again")
    return Start(checkpoint, damaged_end=damage is not None)


def _named_start(checkpoint: Path, run: Path, max_steps: int) -> Start:
    """From the checkpoint that ``train.resume`` names."""
    if not checkpoint.is_dir():
        raise UserError(
            f"train.resume ({checkpoint}) must be auto, never, or a checkpoint folder that exists"
        )
    damage = checkpoint_damage(checkpoint, resumable=checkpoint.parent.name == CHECKPOINTS)
    if damage is not None:
        raise UserError(
            f"train.resume ({checkpoint}) is no whole checkpoint, {damage}: name another one, or "
            "use auto, which takes the newest whole one"
        )
    own = checkpoint.resolve().parent == (run / CHECKPOINTS).resolve()
    if not own and _holds_run(run):
        raise UserError(
            f"train.out_dir ({run}) already holds a run, and train.resume ({checkpoint}) is of "
            "another: go on with the run there by train.resume=auto, or set another train.out_dir"
        )
    _check_length(checkpoint, max_steps)
    return Start(checkpoint)


def _check_length(checkpoint: Path, max_steps: int) -> None:
    step = _step_of(checkpoint)
    if step > max_steps:
        raise UserError(
            f"train.max_steps ({max_steps}) is less than the {step} steps of checkpoint "
            f"({checkpoint}): set at least {step}, or name an earlier checkpoint by train.resume"
        )


def _newest_whole(run: Path) -> Path | None:
    """The newest checkpoint that is as it was written; None in a folder without any."""
    damages: list[str] = []
    for folder in reversed(list_checkpoints(run)):
        damage = checkpoint_damage(folder, resumable=True)
        if damage is None:
            for line in damages:
                logger.warning(f"{line}: going back to {folder.name}")
            return folder
        damages.append(f"checkpoint ({folder}) is damaged, {damage}")
    if damages:
        raise UserError(
            f"{'; '.join(damages)}; and there is no whole one: restore one, or remove {run} to "
            "start again"
        )
    return None


def _step_of(folder: Path) -> int:
    """The steps after which a checkpoint was written; 0 when it is not there."""
    try:
        return int(read_json(folder / TRAINING_STATE, COPY_AGAIN)["step"])
    except (ValueError, KeyError, TypeError):  # UserError is a ValueError
        return 0


def _writing(run: Path) -> AbstractContextManager[None]:
    fix = "set another folder, or make it writable"
    return os_errors(f"train.out_dir ({run}) can't be written", fix)


def _check_same_configuration(config: Config, run: Path) -> None:
    """Compare with the configuration of the run that is in the folder, if there is one."""
    file = run / CONFIG
    if not file.is_file():
        checkpoints = list_checkpoints(run)
        if checkpoints or (run / FINAL).exists():
            named = f" go on by train.resume={checkpoints[-1]}," if checkpoints else ""
            raise UserError(
                f"train.out_dir ({run}) holds a run without its {CONFIG}, so that it can't be "
                f"compared with this configuration: restore it,{named} or set another train.out_dir"
            )
        return
    try:
        before, now = flatten(load_config(file)), flatten(config)
    except UserError as error:
        raise UserError(
            f"{file}, the configuration of the run in train.out_dir, is damaged: {error}; restore "
            "it, or go on by train.resume=CHECKPOINT, which writes it again"
        ) from error
    keys = [key for key in now if key not in RESUMABLE_KEYS and now[key] != before[key]]
    if keys:
        changes = ", ".join(f"{key} ({before[key]} -> {now[key]})" for key in keys)
        raise UserError(
            f"train.out_dir ({run}) holds a run of another configuration, it differs in {changes}: "
            "set another train.out_dir, or remove the folder"
        )
