"""Make another project's checkpoint a folder of ours.

    python -m retnet.checkpoints.convert from-rwkv SOURCE TARGET [--tokenizer NAME_OR_FOLDER]

SOURCE is a folder or a file of weights, TARGET a folder that is not there yet. To generate from it
TARGET needs a tokenizer: that of --tokenizer, else that of a SOURCE folder.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from retnet.checkpoints.convert.rwkv import from_rwkv
from retnet.checkpoints.convert.target import check_target, find_tokenizer, write_checkpoint
from retnet.cli import ArgumentParser, file_path, run
from retnet.terminal import shown, write_out

FORMATS: dict[str, tuple[Callable[[Path], tuple[Any, dict[str, Tensor]]], str]] = {
    "from-rwkv": (from_rwkv, "an RWKV-4 of RWKV-LM or transformers"),
}


def main(argv: Sequence[str]) -> None:
    """Parse and convert."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = ArgumentParser(
        prog="python -m retnet.checkpoints.convert", description=__doc__, formatter_class=raw
    )
    commands = parser.add_subparsers(dest="format", required=True, metavar="FORMAT")
    for name, (_, text) in FORMATS.items():
        command = commands.add_parser(name, help=text, description=f"Convert {text}.")
        command.add_argument("source", type=file_path, help="a folder or file of weights")
        command.add_argument("target", type=file_path, help="to write; must not be there yet")
        command.add_argument(
            "--tokenizer", metavar="NAME_OR_FOLDER", help="bytes, a folder, or a Hub name"
        )
    arguments = parser.parse_args(argv)
    source, target = arguments.source, arguments.target
    check_target(target)
    config, weights = FORMATS[arguments.format][0](source)
    tokenizer = find_tokenizer(source, arguments.tokenizer, config.vocab_size)
    write_checkpoint(target, config, weights, tokenizer)
    write_out(f"{source} converted: {target}")
    if tokenizer is None:
        print(
            shown(
                f"{target} has no tokenizer, which generate.py needs: convert again with "
                "--tokenizer NAME_OR_FOLDER",
                sys.stderr,
            ),
            file=sys.stderr,
        )


if __name__ == "__main__":
    sys.exit(run(main))
