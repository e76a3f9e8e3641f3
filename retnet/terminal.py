"""What is sent to standard output and error: harmless on a terminal, and costing no result."""

import contextlib
import errno
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from retnet.errors import UserError

# What a terminal obeys instead of showing it (C0 but for tab and newline, DEL, C1), and what turns
# the order of the text around it.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

# What writing to a full disk, a lost terminal or a descriptor for reading only raises.
# And a pipe that is full, where whoever opened it has set it not to wait.
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF, errno.EAGAIN)
LINE_BREAKS = re.compile("[\n\x85\u2028\u2029]")  # a carriage return ends no line of a file


def in_one_line(text: str) -> str:
    """The text with line breaks as escapes: a file's name is no reason for a line of its own."""
    return LINE_BREAKS.sub(lambda found: ascii(found[0])[1:-1], text)


def harmless(text: str) -> str:
    """The text with control characters as escapes: what a model or a file name says is shown."""
    return CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def shown(text: str, stream: TextIO) -> str:
    """The text as it may be sent to a stream: harmless on a terminal, as it is elsewhere."""
    return harmless(text) if stream.isatty() else text


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


class PlainHandler(logging.Handler):
    """Log lines as plain text, one for each record, to what is standard error at that time."""

    def emit(self, record: logging.LogRecord) -> None:
        print(shown(in_one_line(self.format(record)), sys.stderr), file=sys.stderr)


@contextmanager
def text_output() -> Iterator[None]:
    """Let the block print any character; when the reader goes away, leave the block quietly.

    A terminal is shown what it would obey; files and pipes get the text as it is. A ``UserError``
    where standard output is closed or takes no more: its disk is full, for example.
    """
    if sys.stdout is None:
        raise UserError("standard output is closed: leave it open, or send it to a file")
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")  # a terminal's encoding may lack a character
    stream = sys.stdout
    try:
        if stream.isatty():
            with contextlib.redirect_stdout(_Terminal(stream)) as shown:
                yield
                shown.end()
        else:
            yield
        stream.flush()
    except (BrokenPipeError, ConnectionResetError):
        discard(stream)
    except OSError as error:
        if error.errno not in UNWRITABLE or error.filename is not None:
            raise
        discard(stream)
        raise UserError(
            f"standard output cannot be written ({error.strerror}): free space there, or send it "
            "elsewhere"
        ) from error


class _Terminal:
    """A terminal that obeys nothing in what is written to it but the ends of lines."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._waiting = ""  # a carriage return, which before a newline is part of it

    def write(self, text: str) -> int:
        whole = self._waiting + text
        self._waiting = "\r" if whole.endswith("\r") else ""
        whole = whole.removesuffix("\r").replace("\r\n", "\n")
        self._stream.write(harmless(whole))
        return len(text)

    def end(self) -> None:
        """Show what waits."""
        self._stream.write(harmless(self._waiting))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def write_out(text: str, end: str = "\n") -> None:
    """Print a result; a ``UserError`` where standard output takes no more (``text_output``)."""
    with text_output():
        print(text, end=end)
