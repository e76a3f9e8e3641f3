"""Train a RetNet or the same-size Transformer: python train.py configs/tiny.yaml [key=value ...]"""

import argparse
from collections.abc import Sequence

from retnet.cli import ArgumentParser, program
from retnet.errors import UserError
from retnet.terminal import write_out
from retnet.training import describe_keys, key_of, load_config, to_yaml, train


def main(argv: Sequence[str]) -> int:
    """Parse the arguments, then train."""
    parser = ArgumentParser(
        prog=program("train.py"),
        description="Train a RetNet, or with model.mixer=attention the Transformer of its size.",
        epilog="keys (default < YAML file < key=value):\n" + "\n".join(describe_keys()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "config", help="a YAML file, or the name of a recipe: configs/tiny.yaml, tiny"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as train.max_steps=100")
    parser.add_argument("--print-config", action="store_true", help="print the result and stop")
    arguments, unknown = parser.parse_known_args(argv)
    if arguments.config.find("=") > 0:
        raise UserError(f"configuration ({arguments.config}) comes first: a YAML file, then keys")
    overrides = [*arguments.overrides, *unknown]
    config = load_config(arguments.config, overrides)
    if arguments.print_config:
        write_out(to_yaml(config), end="")
        return 0
    return train(config, [*map(key_of, overrides)])
