"""The one exception for what a user did wrong, and how others are told apart."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """A mistake in a configuration, a file or an argument.

    The message is one line that names the key or file, its value and the fix. The entry points
    print it as ``error: <message>`` and exit with code 2; anything else keeps its traceback.
    """


class TooLargeError(UserError):
    """A file that is read as a whole, and that memory does not take."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, in Python, numpy or torch, on whatever device."""
    words = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc",
             "unable to mmap")  # fmt: skip
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def is_of_compiler(error: Exception) -> bool:
    """Whether torch.compile's compiler failed, which is not ours and may be none at all."""
    return type(error).__module__ == "torch._inductor.exc"


@contextmanager
def os_errors(problem: str, fix: str) -> Iterator[None]:
    """Turn an ``OSError`` in the block into a ``UserError``: "problem (the reason): fix"."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{problem} ({error.strerror or error}): {fix}") from error


@contextmanager
def memory_errors(path: Path) -> Iterator[None]:
    """Name the file that is read as a whole in the block where memory does not take it."""
    try:
        yield
    except MemoryError as error:
        raise TooLargeError(
            f"{path} has {path.stat().st_size:,} bytes, and memory does not take what is in it: "
            "use a smaller file, or a machine with more"
        ) from error
