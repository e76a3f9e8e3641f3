"""What is sent to standard output and error: harmless on a terminal, and costing no result."""

import contextlib
import logging
import os
import re
import sys
from collections.abc import Callable
from typing import Any, TextIO

from retnet.errors import UserError

# What a terminal obeys instead of showing it (C0 but for tab and newline, DEL, C1), and what turns
# the order of the text around it.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


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
