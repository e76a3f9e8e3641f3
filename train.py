"""Train a RetNet or the same-size Transformer: python train.py configs/tiny.yaml [key=value ...]"""

import argparse
import signal
import sys
from collections.abc import Sequence

try:  # the imports take seconds
    from retnet.cli import ArgumentParser, run
    from retnet.errors import UserError
    from retnet.terminal import write_out
    from retnet.training import describe_keys, key_of, load_config, to_yaml, train
except KeyboardInterrupt:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it may come again while this ends
    print("interrupted", file=sys.stderr)
    sys.exit(130)


def main(argv: Sequence[str]) -> int:
    """Parse the arguments, then train."""
    parser = ArgumentParser(
        prog="train.py",
        description="Train a RetNet, or with model.mixer=attention the Transformer of its size.",
        epilog="keys (default < YAML file < key=value):\n" + "\n".join(describe_keys()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="YAML file, as configs/tiny.yaml")
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


if __name__ == "__main__":
    sys.exit(run(main))
