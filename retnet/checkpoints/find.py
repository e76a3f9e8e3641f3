"""Finding the checkpoint that a user means."""

import difflib
from pathlib import Path

from retnet.checkpoints.convert.recognise import recognise
from retnet.checkpoints.format import (
    BEST,
    CHECKPOINTS,
    CONFIG,
    FINAL,
    in_order,
    is_adapter,
    only_an_adapter,
)
from retnet.errors import UserError
from retnet.paths import expand, kind_of

MAX_SUGGESTIONS = 5
# Where checkpoints lie below the folder of runs, a run, or the folder above the runs.
NEAR = ("*", "*/final", "*/best", "checkpoints/*", "*/checkpoints/*",
        "*/*/final", "*/*/best", "*/*/checkpoints/*")  # fmt: skip


def find_checkpoint(path: str | Path, *, adapters: bool = False) -> Path:
    """The folder itself, or of a run ``final``, else ``best``, else the newest of ``checkpoints``.

    A ``UserError`` where there is none, which lists those that are near, it cannot be reached, or
    the one of the run that is meant is not whole; or it is an adapter alone, without ``adapters``.
    """
    if not str(path):
        raise UserError("checkpoint () is empty: name a checkpoint folder or run folder")
    path = expand(path, "checkpoint")
    kind = kind_of(path, "checkpoint")
    if kind is None:
        raise UserError(f"checkpoint ({path}) does not exist: {_suggest(path)}")
    if kind != "folder":
        near = f"its folder ({path.parent})"
        if kind_of(path.parent / CONFIG, "checkpoint") != "file":
            near = f"a checkpoint or run folder; {_suggest(path)}"
        raise UserError(f"checkpoint ({path}) is a file: name {near}")
    steps = in_order((*path.glob(f"{CHECKPOINTS}/*"), *path.glob("*")))
    of_run = (path / FINAL, path / BEST, *reversed(steps))
    for folder in (path, *of_run):
        config = kind_of(folder / CONFIG, "checkpoint")
        if is_adapter(folder) and not adapters:  # some have their base's config.json
            raise UserError(only_an_adapter(folder))
        if config == "file" or is_adapter(folder):
            return folder
        if folder in of_run and kind_of(folder, "checkpoint") == "folder":
            path = folder  # it is what is meant, and another one has other weights
            break
    if (found := recognise(path)) is not None:
        raise UserError(f"checkpoint ({path}) is {found.name}: {found.advice(path)}")
    raise UserError(f"checkpoint ({path}) holds no {CONFIG}: {_suggest(path)}")


def _suggest(path: Path) -> str:
    """What to do instead: the checkpoints around a path, those of similar name first."""
    parent = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
    near = _checkpoints_near(parent)
    if not near and parent == path:
        near = _checkpoints_near(parent.parent)
    if not near:
        return "train a model with train.py, or name its run folder"
    names = [str(_relative(folder)) for folder in sorted(near)]
    wanted = str(_relative(path))
    names.sort(key=lambda name: -difflib.SequenceMatcher(None, wanted, name).ratio())
    more = f" and {len(names) - MAX_SUGGESTIONS} more" if len(names) > MAX_SUGGESTIONS else ""
    return f"checkpoints near it: {', '.join(names[:MAX_SUGGESTIONS])}{more}"


def _checkpoints_near(folder: Path) -> set[Path]:
    return {found.parent for pattern in NEAR for found in folder.glob(f"{pattern}/{CONFIG}")}


def _relative(path: Path) -> Path:
    absolute = path.absolute()
    return absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else path
