"""What the entry points share: arguments, what is sent to a terminal, exit codes, torch's setup."""

import argparse
import atexit
import contextlib
import functools
import logging
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO, TypeVar, cast

from transformers.utils import logging as transformers_logging

from retnet.errors import UserError, is_out_of_memory
from retnet.machine import use_fast_products
from retnet.paths import expand

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # as shells report a program that Ctrl-C ended
BURST_S = 1.0  # Ctrl-C that comes again within this time is the same one
F = TypeVar("F", bound=Callable[..., int])
MOST = 2**63 - 1  # of a whole number, which tensors' sizes can hold
LONGEST = 4000  # characters of an error line
SHOWN = 40  # characters of a long value in a message

# What a terminal obeys instead of showing it (C0 but for tab and newline, DEL, C1), and what turns
# the order of the text around it.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def harmless(text: str) -> str:
    """The text with control characters as escapes: what a model or a file name says is shown."""
    return CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def shown(text: str, stream: TextIO) -> str:
    """The text as it may be sent to a stream: harmless on a terminal, as it is elsewhere."""
    return harmless(text) if stream.isatty() else text


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser whose own complaints are ``UserError`` like all others."""

    def error(self, message: str) -> NoReturn:
        lacking = re.match(r"argument (\S+/)?(--\S+): expected one argument$", message)
        if lacking:
            raise UserError(
                f"{message}; one that begins with a dash is joined to it: {lacking[2]}=-x"
            )
        raise UserError(f"{message} (see --help)")


def whole_number(text: str) -> int:
    """An argparse type: an integer that tensors' sizes can hold."""
    # int() reads other scripts' digits and underscores too, but no more than 4,300 of them
    value = int(text) if re.fullmatch(r"[+-]?[0-9]{1,400}", text) else None
    if value is None or abs(value) > MOST:
        raise argparse.ArgumentTypeError(
            f"{shortened(text)} must be a whole number of at most {MOST}"
        )
    return value


def positive_int(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    if not re.fullmatch(r"\+?[0-9]*[1-9][0-9]*", text):
        raise argparse.ArgumentTypeError(f"{shortened(text)} must be a whole number of at least 1")
    return whole_number(text)


def number(text: str) -> float:
    """An argparse type: a number."""
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{shortened(text)} must be a number") from error


def shortened(value: object) -> str:
    """A value for a message, as Python writes it; of a long one the beginning."""
    text = repr(value)
    return text if len(text) <= 2 * SHOWN else f"{text[:SHOWN]}... ({len(text):,} characters)"


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


def deliver(*outputs: Callable[[], object]) -> None:
    """Write several results, each although another can't be written.

    A ``UserError`` at the end names all that could not.
    """
    problems = []
    for write in outputs:
        try:
            write()
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("; ".join(problems))


class Messages:
    """Standard error that costs no result: once it can't be written, what is sent there is lost."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._give_up()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._give_up()

    def _give_up(self) -> None:
        with contextlib.suppress(OSError):  # not every stream has a descriptor
            discard(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def discard(stream: TextIO) -> None:
    """Drop what a stream has buffered: the interpreter would try to write it again at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


class _Handler(logging.Handler):
    """Log lines as plain text, to what is standard error at that time."""

    def emit(self, record: logging.LogRecord) -> None:
        print(shown(self.format(record), sys.stderr), file=sys.stderr)


def configure_logging() -> None:
    """Send the package's log lines to stderr as plain text, of several processes the first's."""
    logger = logging.getLogger("retnet")
    logger.handlers[:] = [_Handler()]
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
    messages: Any = Messages(sys.stderr)
    with contextlib.redirect_stderr(messages):
        configure_logging()
        use_fast_products()
        return _run(main, [*map(_as_utf8, sys.argv[1:])] if argv is None else argv)


def _has_current_folder() -> bool:
    try:
        return bool(os.getcwd())  # noqa: PTH109
    except OSError:
        return False


def _run(main: Callable[[Sequence[str]], int | None], argv: Sequence[str]) -> int:
    try:
        return main(argv) or 0
    except UserError as error:
        message = str(error)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).strip() or "an allocation failed"
        message = f"out of memory ({reason}): make the model, the batch or the text smaller"
    except OSError as error:
        if not _has_current_folder():
            message = "the current folder has been removed: go to another one (cd) and start again"
        elif error.filename is None:  # not of a file that the user could know
            raise
        else:
            message = f"{error.filename}: {error.strerror}"
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    line = " ".join(message.split())
    if len(line) > LONGEST:  # there is a long value in it
        line = f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"
    print(shown(f"error: {line}", sys.stderr), file=sys.stderr)
    return EXIT_USER_ERROR
