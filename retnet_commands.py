"""How train.py, generate.py and compare.py start, and retnet-train and its like where installed.

Outside of the package, whose import takes seconds: Ctrl-C meanwhile ends them in one line too.
"""

import importlib
import signal
import sys
from functools import partial
from typing import NoReturn


def start(command: str) -> NoReturn:
    """Run a module of ``retnet.commands`` as this process, by its name."""
    try:
        main = importlib.import_module(f"retnet.commands.{command}").main
        from retnet.cli import run
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it may come again while this ends
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(run(main))


train, generate, compare = (partial(start, name) for name in ("train", "generate", "compare"))
