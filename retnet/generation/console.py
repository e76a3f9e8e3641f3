"""Standard output as the place where text goes."""

import errno
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from retnet.errors import UserError

# What writing to a full disk, a lost terminal or a descriptor for reading only raises.
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)


@contextmanager
def text_output() -> Iterator[None]:
    """Let the block print any character; when the reader goes away, leave the block quietly.

    A ``UserError`` where standard output is closed or takes no more: its disk is full, for example.
    """
    if sys.stdout is None:
        raise UserError("standard output is closed: leave it open, or send it to a file")
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")  # a terminal's encoding may lack a character
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_output()
    except OSError as error:
        if error.errno not in UNWRITABLE or error.filename is not None:
            raise
        _discard_output()
        raise UserError(
            f"standard output cannot be written ({error.strerror}): free space there, or send it "
            "elsewhere"
        ) from error


def _discard_output() -> None:
    """Drop what is buffered: the interpreter would try to write it again at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def print_samples(prompt: str, pieces: Iterable[Sequence[str]], num_samples: int) -> None:
    """Print prompt and continuation, the first sample as ``stream_text`` makes it, then the others.

    Of several samples each has a line with its number above it.
    """
    title = f"----- sample {{}} of {num_samples} -----\n" if num_samples > 1 else ""
    print(title.format(1) + prompt, end="", flush=True)
    last = prompt  # the first sample is not kept: it may be endless
    others: list[list[str]] = [[prompt] for _ in range(num_samples - 1)]
    for first, *rest in pieces:
        print(first, end="", flush=True)
        last = first or last
        for parts, piece in zip(others, rest, strict=True):
            parts.append(piece)
    print(end="" if last.endswith("\n") else "\n", flush=True)
    for number, parts in enumerate(others, start=2):
        text = "".join(parts)
        print(title.format(number) + text, end="" if text.endswith("\n") else "\n", flush=True)
