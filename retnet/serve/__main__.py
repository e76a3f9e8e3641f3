"""A checkpoint behind OpenAI's HTTP API: ``python -m retnet.serve runs/tiny-retention``.

Clients of that API then find one model at http://127.0.0.1:8000/v1, for completions and, if it was
trained on chats, chats, streamed or whole. The server answers this machine only, asks for no key
and makes one text after the other. Ctrl-C ends it, with exit code 130. It needs the packages
fastapi, uvicorn and openai. docs/serving.md says what requests may ask for.
"""

import argparse
import errno
import importlib.util
import logging
import os
import socket
import sys
from collections.abc import Sequence
from typing import Any

from retnet.checkpoints import load_checkpoint
from retnet.cli import ArgumentParser, run, whole_number
from retnet.errors import UserError
from retnet.evaluation.comparison import short_names
from retnet.generation import add_loading_options, check_finite, loading_arguments

logger = logging.getLogger("retnet.serve")  # __name__ is __main__ in a command

HOST, PORT, MOST_PORT = "127.0.0.1", 8000, 65535
NEEDED = ("fastapi", "uvicorn", "openai")
LAST_ANSWERS_S = 2  # seconds that open answers have when the server ends
FIX = "name another one, or 0 for any that is free"


def build_parser() -> ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = ArgumentParser("python -m retnet.serve", description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("checkpoint", help="a checkpoint folder, or a run folder (its final, best or newest)")
    add("--port", type=port, default=PORT, help=f"0: any that is free ({PORT})")
    add("--host", default=HOST, help=f"address to listen at; 0.0.0.0: every network ({HOST})")
    add("--name", help="what requests call the model (the run's name)")
    add_loading_options(parser)
    return parser


def port(text: str) -> int:
    """An argparse type: a port's number."""
    number = whole_number(text)
    if not 0 <= number <= MOST_PORT:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number from 0 to {MOST_PORT}")
    return number


def check_packages() -> None:
    """Raise a ``UserError`` that names the packages that are missing."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"the server needs {', '.join(NEEDED)}, and there is no {' and no '.join(missing)}: "
            f"pip install {' '.join(missing)}"
        )


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket that has its address; a ``UserError`` where that can't be had."""
    what = f"--host ({host})"
    try:
        if not host:
            raise OSError("it is empty")
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{what} is no address of this machine ({reason}): try {HOST}") from error
    listening = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # elsewhere this would share a port that is in use
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen()  # till then another may have the same address
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"--port ({port}) is in use at {host}: {FIX}") from error
        if error.errno == errno.EACCES:
            raise UserError(f"--port ({port}) is the system's ({error.strerror}): {FIX}") from error
        raise UserError(
            f"{what} is no address of this machine ({error.strerror}): try {HOST}"
        ) from error
    return listening


def main(argv: Sequence[str]) -> None:
    arguments = build_parser().parse_args(argv)
    check_packages()
    if arguments.name == "":
        raise UserError("--name ('') is empty: give one, or leave it out")
    loading = loading_arguments(arguments)
    with bound_socket(arguments.host, arguments.port) as listening:
        checkpoint = load_checkpoint(arguments.checkpoint, **loading)
        check_finite(checkpoint)
        serve(checkpoint, arguments.name or short_names([checkpoint.path])[0], listening)


def serve(checkpoint: Any, name: str, listening: socket.socket) -> None:
    """Answer requests until Ctrl-C, which comes as a ``KeyboardInterrupt``."""
    import uvicorn

    from retnet.serve.answers import Answers
    from retnet.serve.app import build_app

    answers = Answers(checkpoint)
    config = uvicorn.Config(
        build_app(checkpoint, name, answers),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=LAST_ANSWERS_S,
    )
    say_where(name, *listening.getsockname()[:2])
    try:
        uvicorn.Server(config).run(sockets=[listening])
    finally:
        answers.stop()


def say_where(name: str, host: str, number: int) -> None:
    """The address to call, and a warning where others can."""
    where = f"[{host}]" if ":" in host else host
    logger.info(f"{name} answers at http://{where}:{number}/v1 (Ctrl-C ends)")
    if not host.startswith("127.") and host != "::1":
        logger.warning(f"whoever reaches {where}:{number} can use it: there are no keys")


if __name__ == "__main__":
    sys.exit(run(main))
