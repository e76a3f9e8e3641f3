"""Make another project's checkpoint a folder of ours, or one of ours theirs; say what one is.

    python -m retnet.checkpoints.convert from-fla SOURCE TARGET [--tokenizer NAME_OR_FOLDER]
    python -m retnet.checkpoints.convert inspect FOLDER

SOURCE is a folder, a file of weights (but for from-fla) or a name on the Hub, TARGET a folder that
is not there yet. To generate from it TARGET needs a tokenizer: that of --tokenizer, else that of a
SOURCE folder. docs/checkpoints.md has what is converted and what is refused.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from retnet.checkpoints.convert.fla import from_fla, to_fla
from retnet.checkpoints.convert.inspect import inspect
from retnet.checkpoints.convert.recognise import recognise
from retnet.checkpoints.convert.rwkv import from_rwkv
from retnet.checkpoints.convert.sources import find_source
from retnet.checkpoints.convert.target import (
    Converted,
    check_target,
    find_tokenizer,
    write_checkpoint,
)
from retnet.checkpoints.convert.torchscale import ACTIVATIONS, Told, from_torchscale
from retnet.checkpoints.format import is_run
from retnet.cli import ArgumentParser, file_path, number, positive_int, run
from retnet.errors import UserError
from retnet.terminal import shown, write_out

FORMATS: dict[str, tuple[Callable[[Path, Any], Converted], str]] = {
    "from-fla": (
        lambda source, _: from_fla(source),
        "a RetNet of flash-linear-attention (model_type retnet), with safetensors",
    ),
    "from-torchscale": (
        lambda source, arguments: from_torchscale(source, _told(arguments)),
        "a RetNet of torchscale, the official code, from September 2023 on, or of syncdoth/RetNet",
    ),
    "from-rwkv": (lambda source, _: from_rwkv(source), "an RWKV-4 of RWKV-LM or transformers"),
}


def build_parser() -> ArgumentParser:
    """A command for each format, and those that write theirs or look."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = ArgumentParser(
        prog="python -m retnet.checkpoints.convert", description=__doc__, formatter_class=raw
    )
    commands = parser.add_subparsers(dest="format", required=True, metavar="COMMAND")
    for name, (_, text) in FORMATS.items():
        command = commands.add_parser(name, help=text, description=f"Convert {text}.")
        command.add_argument("source", help="a folder, a file of weights, or a name on the Hub")
        command.add_argument("target", type=file_path, help="to write; must not be there yet")
        command.add_argument(
            "--tokenizer", metavar="NAME_OR_FOLDER", help="bytes, a folder, or a Hub name"
        )
        if name == "from-torchscale":
            _add_told(command)
    text = "one of ours for flash-linear-attention"
    command = commands.add_parser("to-fla", help=text, description=f"Convert {text}.")
    command.add_argument("source", help="a checkpoint or run folder of ours")
    command.add_argument("target", type=file_path, help="to write; must not be there yet")
    text = "say what a checkpoint is, and whether or by which converter it can be read"
    command = commands.add_parser("inspect", help=text, description=f"{text.capitalize()}.")
    command.add_argument("folder", type=file_path, help="a folder, or a file of weights")
    return parser


def _add_told(command: ArgumentParser) -> None:
    """What weights of torchscale's don't tell."""
    command.add_argument(
        "--config", type=file_path, help="JSON of its configuration (default: SOURCE's config.json)"
    )
    command.add_argument("--num-heads", type=positive_int, help="heads of retention")
    command.add_argument("--activation", choices=list(ACTIVATIONS), help="of the gated FFN")
    command.add_argument(
        "--scale-embedding", choices=["yes", "no"], help="whether embeddings are times sqrt(width)"
    )
    command.add_argument("--norm-eps", type=number, help="layernorm_eps of all norms")


def _told(arguments: Any) -> Told:
    scaled = arguments.scale_embedding
    return Told(
        arguments.config,
        arguments.num_heads,
        arguments.activation,
        None if scaled is None else scaled == "yes",
        arguments.norm_eps,
    )


def _check_format(source: Path, command: str) -> None:
    """Raise a ``UserError`` where it is seen that another command is for the source, or none."""
    if not source.is_dir():
        return
    found = recognise(source)
    if found is not None and found.converter != command:
        raise UserError(f"source ({source}) is {found.name}: {found.advice(source)}")
    if found is None and is_run(source):
        raise UserError(f"source ({source}) is a run of this package: it needs no conversion")


def convertible(command: str, source: Path) -> Any:
    """Our configuration of a source that the command's converter takes; else a ``UserError``."""
    arguments = build_parser().parse_args([command, str(source), "TARGET"])
    return FORMATS[command][0](source, arguments).config


def main(argv: Sequence[str]) -> None:
    """Parse and convert, or look."""
    arguments = build_parser().parse_args(argv)
    if arguments.format == "inspect":
        for line in inspect(arguments.folder, convertible):
            write_out(line)
        return
    target = arguments.target
    check_target(target)
    if arguments.format == "to-fla":
        source = to_fla(arguments.source, target)
        write_out(f"{source} converted for flash-linear-attention: {target}")
        return
    source = find_source(arguments.source)
    _check_format(source, arguments.format)
    converted = FORMATS[arguments.format][0](source, arguments)
    tokenizer = find_tokenizer(source, arguments.tokenizer, converted.config.vocab_size)
    write_checkpoint(target, converted, tokenizer)
    write_out(f"{source} converted: {target}")
    if tokenizer is None:
        print(
            shown(
                f"{target} has no tokenizer, which generate.py needs: copy its files there, or "
                "convert to another folder with --tokenizer NAME_OR_FOLDER",
                sys.stderr,
            ),
            file=sys.stderr,
        )


if __name__ == "__main__":
    sys.exit(run(main))
