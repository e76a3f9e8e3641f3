"""Standard output as the place where text goes."""

import contextlib
import errno
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from retnet.errors import UserError
from retnet.terminal import discard, harmless

# What writing to a full disk, a lost terminal or a descriptor for reading only raises.
# And a pipe that is full, where whoever opened it has set it not to wait.
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF, errno.EAGAIN)


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


def print_samples(prompt: str, pieces: Iterable[Sequence[str]], num_samples: int) -> None:
    """Print prompt and continuation, the first sample as ``stream_text`` makes it, then the others.

    Of several samples each has a line with its number above it. Where ``pieces`` ends with a
    ``UserError``, that is raised after what was made has been printed.
    """
    title = f"----- sample {{}} of {num_samples} -----\n" if num_samples > 1 else ""
    print(title.format(1) + prompt, end="", flush=True)
    last = prompt  # the first sample is not kept: it may be endless
    others: list[list[str]] = [[prompt] for _ in range(num_samples - 1)]
    problem = None
    try:
        for first, *rest in pieces:
            print(first, end="", flush=True)
            last = first or last
            for parts, piece in zip(others, rest, strict=True):
                parts.append(piece)
    except UserError as error:
        problem = error
    print(end="" if last.endswith("\n") else "\n", flush=True)
    for number, parts in enumerate(others, start=2):
        text = "".join(parts)
        print(title.format(number) + text, end="" if text.endswith("\n") else "\n", flush=True)
    if problem is not None:
        raise problem
