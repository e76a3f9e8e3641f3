"""Samples and answers on standard output, as they are made."""

import sys
from collections.abc import Iterable, Sequence

from retnet.errors import UserError
from retnet.generation.chat import Chat
from retnet.interrupts import ctrl_c_noticed


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


def converse(chat: Chat, messages: Iterable[str]) -> None:
    """Print the answer to each message as it is made; Ctrl-C ends an answer, not the rest."""
    for message in messages:
        written = ""
        with ctrl_c_noticed() as noticed:
            try:
                for piece in chat.answer(message, noticed):
                    print(piece, end="", flush=True)
                    written = piece or written
            except UserError:
                print(end="\n" if written else "", flush=True)
                raise
        print(end="" if written.endswith("\n") else "\n", flush=True)
        if chat.cut:
            print("(the answer ends at --max-new-tokens)", file=sys.stderr)
