"""The folder of a run: what is there already, and whether it may be used."""

from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from retnet.errors import UserError
from retnet.training.checkpoint import FINAL, TRAINING_STATE, list_checkpoints, remove_unfinished
from retnet.training.config import RESUMABLE_KEYS, Config, flatten, load_config, to_yaml

CONFIG = "config.yaml"
LOCK = ".lock"


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
    resume = config.train.resume
    if resume not in ("auto", "never"):
        folder = Path(resume)
        if not folder.is_dir():
            raise UserError(
                f"train.resume ({resume}) must be auto, never, or a checkpoint folder that exists"
            )
        return Start(folder)
    checkpoints = list_checkpoints(run)
    if resume == "never":
        if checkpoints or (run / FINAL).exists():
            raise UserError(
                f"train.out_dir ({run}) already holds a run and train.resume is never: remove it, "
                "or set another train.out_dir"
            )
        return Start()
    if (run / CONFIG).is_file():
        _check_same_configuration(config, run)
    steps = [int(folder.name.removeprefix("step_")) for folder in checkpoints]
    if (run / FINAL / TRAINING_STATE).is_file() and steps and steps[-1] >= config.train.max_steps:
        return Start(finished=True)
    return Start(checkpoints[-1] if checkpoints else None)


def open_run_folder(config: Config) -> FileLock:
    """Create the folder, keep others out of it, and write the configuration.

    Returns:
        The held lock; released when the process ends.

    Raises:
        UserError: Another process trains there, or the folder can't be written.
    """
    run = Path(str(config.train.out_dir))
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = FileLock(run / LOCK)
        lock.acquire(timeout=0)
        remove_unfinished(run)
        (run / CONFIG).write_text(to_yaml(config))
    except Timeout as error:
        raise UserError(
            f"train.out_dir ({run}) is in use by another run: wait for it, or set another folder"
        ) from error
    except OSError as error:
        raise UserError(
            f"train.out_dir ({run}) can't be written ({error.strerror}): set another folder"
        ) from error
    return lock


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
