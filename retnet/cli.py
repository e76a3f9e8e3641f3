"""What the entry points share: argument errors, logging, exit codes, how torch is set up."""

import argparse
import atexit
import functools
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar, cast

from transformers.utils import logging as transformers_logging

from retnet.errors import UserError, is_out_of_memory
from retnet.machine import use_fast_products
from retnet.paths import expand

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # as shells report a program that Ctrl-C ended
BURST_S = 1.0  # Ctrl-C that comes again within this time is the same one
F = TypeVar("F", bound=Callable[..., int])


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser whose own complaints are ``UserError`` like all others."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def positive_int(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    value = int(text) if text.lstrip("+-").isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return value


def file_path(text: str) -> Path:
    """An argparse type: a path; an empty one would mean the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("'' must be the path of a file")
    try:
        return expand(text, "the path")
    except UserError as error:  # a ValueError, of which argparse would not say more
        raise argparse.ArgumentTypeError(str(error)) from error


def _as_utf8(argument: str) -> str:
    """An argument as the UTF-8 it is, also where the locale's encoding is another.

    Bytes that are no UTF-8, as a file's name may have, stay escaped.
    """
    try:
        return os.fsencode(argument).decode("utf-8")
    except UnicodeError:
        return argument


def configure_logging() -> None:
    """Send the package's log lines to stderr as plain text, of several processes the first's."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("retnet")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.CRITICAL)
    logger.propagate = False
    transformers_logging.disable_progress_bar()  # of weights being written and loaded


class _Interrupt:
    """SIGINT's handler: one KeyboardInterrupt of a burst, so that nothing interrupts its answer.

    When all has ``ended`` but the interpreter, the signal ends that too, without a traceback.
    """

    def __init__(self) -> None:
        self._last, self.ended = -math.inf, False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._last < BURST_S:
            return
        self._last = now
        if self.ended:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        raise KeyboardInterrupt


def _interrupted_once(run: F) -> F:
    """Have ``run`` see one KeyboardInterrupt of many Ctrl-C, and a process none after it."""

    @functools.wraps(run)
    def guarded(main: Any, argv: Sequence[str] | None = None) -> int:
        usual = signal.default_int_handler
        main_thread = threading.current_thread() is threading.main_thread()
        if not main_thread or signal.getsignal(signal.SIGINT) != usual:
            return run(main, argv)
        interrupt = _Interrupt()
        signal.signal(signal.SIGINT, interrupt)
        try:
            return run(main, argv)
        finally:
            interrupt.ended = True
            if argv is not None:  # this is not the end of the process
                signal.signal(signal.SIGINT, usual)
            else:  # the interpreter takes handlers away before it is gone
                atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)

    return cast(F, guarded)


@_interrupted_once
def run(main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Set torch up, call an entry point's body, turn what the user did wrong into exit code 2.

    ``argv`` are the arguments without the program's name; those of the process when None.
    """
    if sys.stderr is None:  # closed; print and logging would take standard output instead
        sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115
    configure_logging()
    use_fast_products()
    try:
        return main([*map(_as_utf8, sys.argv[1:])] if argv is None else argv) or 0
    except UserError as error:
        message = str(error)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).strip() or "an allocation failed"
        message = f"out of memory ({reason}): make the model, the batch or the text smaller"
    except OSError as error:
        if error.filename is None:  # not of a file that the user could know
            raise
        message = f"{error.filename}: {error.strerror}"
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return EXIT_USER_ERROR
