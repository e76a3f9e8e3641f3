"""What the entry points share: arguments, what is sent to a terminal, exit codes, torch's setup."""

import argparse
import contextlib
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

from transformers.utils import logging as transformers_logging

from retnet.errors import UserError, is_out_of_memory
from retnet.machine import use_fast_products

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # as shells report a program that Ctrl-C ended
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
    return Path(text)


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
        return _run(main, sys.argv[1:] if argv is None else argv)


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
        if error.filename is None:  # not of a file that the user could know
            raise
        message = f"{error.filename}: {error.strerror}"
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    line = " ".join(message.split())
    if len(line) > LONGEST:  # there is a long value in it
        line = f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"
    print(shown(f"error: {line}", sys.stderr), file=sys.stderr)
    return EXIT_USER_ERROR
