"""Runs train.py in forked children that are killed with SIGKILL; see test_kill.py.

Called as a program: the first argument is the Python expression of a list of attempts, each
``(name of a kill below or None, or seconds to live, arguments of train.py)``; prints the exit
status of each, while standard error is that of the attempts. The interpreter is started once, each
attempt is a fork of it.
"""

import ast
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from retnet import cli
from retnet.checkpoints import save
from retnet.commands import train
from retnet.data import prepare
from retnet.files import OURS, REPLACED, UNFINISHED
from retnet.training import loop, validation


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(owner: Any, name: str, number: int, *, after: bool = False) -> None:
    """Die when ``owner.name`` is called for the ``number``-th time (or when that call returns)."""
    real: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number and not after:
            die()
        result = real(*args, **kwargs)
        if calls == number:
            die()
        return result

    setattr(owner, name, counted)


def is_temporary(path: Path, prefix: str, name: str) -> bool:
    """Whether a path has a temporary name of ``retnet.files``."""
    found = OURS.fullmatch(path.name)
    return found is not None and path.name.startswith(prefix) and found["name"] == name


def renamed_to(prefix: str, name: str) -> None:
    """Die when ``name`` has been renamed to a temporary name of this kind."""
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        result = real(self, target)
        if is_temporary(Path(target), prefix, name):
            die()
        return result

    Path.rename = rename  # type: ignore[method-assign]


def described(name: str) -> None:
    """Die when the folder for that name has its manifest, before it is renamed to its place."""
    real = save.write_manifest

    def write(folder: Path) -> None:
        real(folder)
        if is_temporary(folder, UNFINISHED, name):
            die()

    save.write_manifest = write


KILLS: dict[str, Callable[[], None]] = {
    "data": lambda: at_call(prepare, "check_window", 1),
    "accumulation": lambda: at_call(loop.Trainer, "_seed", 4),
    "evaluation": lambda: at_call(validation, "evaluate_batches", 1, after=True),
    "writing": lambda: at_call(save, "save_file", 1),
    "before renaming": lambda: at_call(save, "write_manifest", 2, after=True),
    "configuration": lambda: at_call(Path, "replace", 1),  # it is written, but not in its place
    "metrics": lambda: at_call(Path, "replace", 2),
    "pruning": lambda: at_call(save, "remove_folder", 1),
    "saved": lambda: at_call(loop, "save_checkpoint", 2, after=True),
    "logged": lambda: at_call(loop.Trainer, "_log", 4, after=True),
    "replacing best": lambda: renamed_to(REPLACED, "best"),
    "final": lambda: described("final"),
}


def attempt(kill: str | float | None, arguments: list[str]) -> int:
    """Run train.py in a child; returns its exit code, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        if isinstance(kill, str):
            KILLS[kill]()
        os._exit(cli.run(train.main, arguments))
    timer = None
    if isinstance(kill, float):
        timer = threading.Timer(kill, os.kill, (child, signal.SIGKILL))
        timer.start()
    _, status = os.waitpid(child, 0)
    if timer is not None:
        timer.cancel()
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    for kill, arguments in ast.literal_eval(sys.argv[1]):
        print(attempt(kill, arguments), flush=True)
