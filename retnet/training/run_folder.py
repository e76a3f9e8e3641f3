"""The folder of a run: what is there already, and whether it may be used."""

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from retnet.errors import UserError
from retnet.generation import find_damage
from retnet.training.checkpoint import (
    BEST,
    CHECKPOINTS,
    FINAL,
    TRAINING_STATE,
    list_checkpoints,
    remove_unfinished,
    replace_text,
)
from retnet.training.config import RESUMABLE_KEYS, Config, flatten, load_config, to_yaml
from retnet.training.health import DIVERGED

logger = logging.getLogger(__name__)

CONFIG = "config.yaml"
LOCK = ".lock"
SET_ASIDE = "set-aside-"


@dataclass(frozen=True)
class Start:
    """How a run begins: from a checkpoint, anew (None), or not at all."""

    checkpoint: Path | None = None
    finished: bool = False


def plan_start(config: Config) -> Start:
    """Decide from the run folder and ``train.resume``; writes nothing.

    Raises:
        UserError: The folder belongs to another configuration, or is not to be gone on with.
    """
    run = Path(str(config.train.out_dir))
    if run.exists() and not run.is_dir():
        raise UserError(f"train.out_dir ({run}) is a file: name a folder")
    check_writable(config)
    resume = config.train.resume
    if resume not in ("auto", "never"):
        return _named_start(Path(resume), run)
    if resume == "never":
        if _holds_run(run):
            raise UserError(
                f"train.out_dir ({run}) already holds a run and train.resume is never: remove it, "
                "or set another train.out_dir"
            )
        return Start()
    if (run / CONFIG).is_file():
        _check_same_configuration(config, run)
    if _step_of(run / FINAL) >= config.train.max_steps:
        return Start(finished=True)
    return Start(_newest_whole(run))


def run_lock(config: Config) -> FileLock:
    """The lock of a run folder, not held yet; it can be taken several times."""
    return FileLock(Path(str(config.train.out_dir)) / LOCK)


def check_writable(config: Config) -> None:
    """Raise a ``UserError`` when the run folder can't be made; nothing is left of the attempt."""
    run = Path(str(config.train.out_dir))
    missing = [folder for folder in (run, *run.parents) if not folder.exists()]
    try:
        run.mkdir(parents=True, exist_ok=True)
        for folder in missing:
            folder.rmdir()
    except OSError as error:
        raise _not_writable(run, error) from error


def lock_run_folder(lock: FileLock) -> None:
    """Keep others out of a run folder if it exists; it is free again when the process ends.

    Raises:
        UserError: Another process trains there, or the folder can't be written.
    """
    run = Path(lock.lock_file).parent
    if not run.is_dir():
        return
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(
            f"train.out_dir ({run}) is in use by another run: wait for it, or set another folder"
        ) from error
    except OSError as error:
        raise _not_writable(run, error) from error


def open_run_folder(config: Config, start: Start, lock: FileLock) -> bool:
    """Create the folder where there is none, tidy it up, and write the configuration.

    Checkpoints that are newer than the start, because they are damaged or of a course that is not
    followed, are set aside under another name; so are the end and the best of such a course.

    Args:
        config: The run.
        start: Where it begins.
        lock: Of the folder.

    Returns:
        Whether the folder holds the best weights so far.

    Raises:
        UserError: Another process trains there, or the folder can't be written.
    """
    run = Path(str(config.train.out_dir))
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock_run_folder(lock)
        remove_unfinished(run)
        (run / DIVERGED).unlink(missing_ok=True)
        if start.checkpoint is not None:
            _set_aside_newer(run, start.checkpoint, named=config.train.resume != "auto")
        replace_text(run / CONFIG, to_yaml(config))
        return (run / BEST).is_dir()
    except OSError as error:
        raise _not_writable(run, error) from error


def _set_aside_newer(run: Path, start: Path, *, named: bool) -> None:
    """Rename what is newer than the checkpoint to go on from.

    Under auto, final/ and best/ are of the same course: the run comes to them again.
    """
    step = _step_of(start)
    newer = [folder for folder in list_checkpoints(run) if int(folder.name[5:]) > step]
    if named:
        newer += [folder for folder in (run / BEST, run / FINAL) if _step_of(folder) > step]
    for folder in newer:
        aside = folder.with_name(SET_ASIDE + folder.name)
        if aside.exists():
            shutil.rmtree(aside)
        folder.rename(aside)
        logger.warning("%s is not gone on from: it is kept as %s", folder, aside.name)


def _holds_run(run: Path) -> bool:
    """Whether something of a run is there; one that died before its first save has only best/."""
    return bool(list_checkpoints(run)) or (run / FINAL).exists() or (run / BEST).exists()


def _named_start(checkpoint: Path, run: Path) -> Start:
    """From the checkpoint that ``train.resume`` names."""
    if not checkpoint.is_dir():
        raise UserError(
            f"train.resume ({checkpoint}) must be auto, never, or a checkpoint folder that exists"
        )
    damage = find_damage(checkpoint)
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
    return Start(checkpoint)


def _newest_whole(run: Path) -> Path | None:
    """The newest checkpoint that is as it was written; None in a folder without any."""
    checkpoints = list_checkpoints(run)
    damages: list[str] = []
    for folder in reversed(checkpoints):
        damage = find_damage(folder)
        if damage is None:
            for line in damages:
                logger.warning("%s: going back to %s", line, folder.name)
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
        return int(json.loads((folder / TRAINING_STATE).read_text())["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _not_writable(run: Path, error: OSError) -> UserError:
    return UserError(
        f"train.out_dir ({run}) can't be written ({error.strerror or error}): set another folder, "
        "or make it writable"
    )


def _check_same_configuration(config: Config, run: Path) -> None:
    before, now = flatten(load_config(run / CONFIG)), flatten(config)
    changes = [
        f"{key} ({before[key]} -> {now[key]})"
        for key in now
        if key not in RESUMABLE_KEYS and now[key] != before[key]
    ]
    if changes:
        raise UserError(
            f"train.out_dir ({run}) holds a run of another configuration, it differs in "
            f"{', '.join(changes)}: set another train.out_dir, or remove the folder"
        )
