"""Standard output as the place where text goes."""

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager


@contextmanager
def text_output() -> Iterator[None]:
    """Let the block print any character; when the reader goes away, leave the block quietly."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")  # a terminal's encoding may lack a character
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # What is buffered has nowhere to go; without this the interpreter tries again at its end.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def print_samples(prompt: str, pieces: Iterable[Sequence[str]], num_samples: int) -> None:
    """Print prompt and continuation, the first sample as it is made and then the others.

    Args:
        prompt: Begins every sample.
        pieces: From ``stream_text``.
        num_samples: Above 1, each sample has a line with its number above it.
    """
    title = f"----- sample {{}} of {num_samples} -----\n" if num_samples > 1 else ""
    texts = [prompt] * num_samples
    print(title.format(1) + prompt, end="", flush=True)
    for new in pieces:
        print(new[0], end="", flush=True)
        texts = [text + piece for text, piece in zip(texts, new, strict=True)]
    for number, text in enumerate(texts, start=1):
        rest = "" if number == 1 else title.format(number) + text
        print(rest, end="" if text.endswith("\n") else "\n", flush=True)
