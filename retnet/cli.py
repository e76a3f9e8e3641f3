"""What the entry points share: arguments, logging, exit codes, how torch is set up."""

import argparse
import atexit
import contextlib
import gc
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers.utils import logging as transformers_logging

from retnet.errors import UserError, is_of_compiler, is_out_of_memory
from retnet.interrupts import interrupted_once
from retnet.machine import use_fast_products
from retnet.paths import expand
from retnet.terminal import Messages, PlainHandler, shown, write_out

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # as shells report a program that Ctrl-C ended
MOST = 2**63 - 1  # of a whole number, which tensors' sizes can hold
LONGEST = 4000  # characters of an error line
SHOWN = 40  # characters of a long value in a message


class _Once(argparse.Action):
    """An option that has one value: a second one would take its place without a word."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if option_string and isinstance(parser, ArgumentParser):
            if self.dest in parser.given:
                raise argparse.ArgumentError(self, "is given twice: leave one of them out")
            parser.given.add(self.dest)
        setattr(namespace, self.dest, values)


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser, for one parsing, whose own complaints are ``UserError`` like all others.

    An option is given once; what may be repeated says so (action="append").
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.given: set[str] = set()  # the options so far
        for name in (None, "store"):
            self.register("action", name, _Once)

    def print_help(self, file: Any = None) -> None:
        """As argparse's, which says nothing where standard output takes no more."""
        if file is None:
            write_out(self.format_help(), end="")
        else:
            super().print_help(file)

    def error(self, message: str) -> NoReturn:
        lacking = re.match(r"argument (\S+/)?(--\S+): expected one argument$", message)
        if lacking:
            raise UserError(
                f"{message}; one that begins with a dash is joined to it: {lacking[2]}=-x"
            )
        raise UserError(f"{message} (see --help)")


def program(script: str) -> str:
    """The name of a script for its --help: ``train.py``, or ``retnet-train`` where installed."""
    installed = f"retnet-{Path(script).stem}"
    return installed if Path(sys.argv[0]).stem == installed else script


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
    try:  # float() reads what whole_number does not too
        value = float(text) if text.isascii() and "_" not in text else None
    except ValueError:
        value = None
    if value is None:
        raise argparse.ArgumentTypeError(f"{shortened(text)} must be a number")
    return value


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


def configure_logging() -> None:
    """Send the package's log lines to stderr as plain text, of several processes the first's."""
    logger = logging.getLogger("retnet")
    logger.handlers[:] = [PlainHandler()]
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.CRITICAL)
    logger.propagate = False
    transformers_logging.disable_progress_bar()  # of weights being written and loaded


@interrupted_once
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
        if argv is None:  # the process is ours, and its modules stay until it ends
            gc.freeze()
            if "triton" in sys.modules and torch.__version__ >= "2.15":
                atexit.register(gc.unfreeze)  # else its triton lists hundreds of things as leaked
            argv = [*map(_as_utf8, sys.argv[1:])]
        return _run(main, argv)


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
        reason = str(error).strip() or "an allocation failed"
        message = f"out of memory ({reason}): make the model, the batch or the text smaller"
        if is_of_compiler(error):
            reason = reason.splitlines()[0]
            message = (
                f"torch.compile fails ({reason}): look at the C++ compiler, which CXX may name"
            )
            message += ", or leave --compile or train.compile out"
        elif not is_out_of_memory(error):
            raise
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
