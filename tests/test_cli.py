"""What the entry points share: numbers, terminals, results that do not depend on each other."""

import io
import logging
import subprocess
import sys
from argparse import ArgumentTypeError
from pathlib import Path

import pytest

from retnet import cli, terminal
from retnet.commands import train
from retnet.errors import UserError
from retnet.experiments import tune
from retnet.experiments.claims import __main__ as claims


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


HOSTILE = "a\x1b[2J\x1b]0;title\x07b\rc\x08d\x7fe\x9b1mf\u202eg\u2066h\x00i"
SHOWN = r"a\x1b[2J\x1b]0;title\x07b\rc\x08d\x7fe\x9b1mf\u202eg\u2066h\x00i"


def test_nothing_is_left_that_a_terminal_obeys() -> None:
    assert terminal.harmless(HOSTILE) == SHOWN
    text = "naïve\t\u05e9\u05dc\u200f 漢字 🙂\n"
    assert terminal.harmless(text) == text


@pytest.mark.parametrize(("stream", "expected"), [(Terminal(), SHOWN), (io.StringIO(), HOSTILE)])
def test_messages_on_a_terminal_and_elsewhere(monkeypatch, stream, expected: str) -> None:
    """Error lines have their white space made one before, as everywhere."""
    monkeypatch.setattr("sys.stderr", stream)

    def main(argv) -> None:
        logging.getLogger("retnet.somewhere").warning("read %s", HOSTILE)
        raise UserError(HOSTILE.replace("\r", ""))

    assert cli.run(main, []) == 2
    assert stream.getvalue() == f"read {expected}\nerror: " + (
        expected.replace("\r", "").replace(r"\r", "") + "\n"
    )


def test_what_may_be_repeated_says_so() -> None:
    """Of anything else the last one counted, and the others were left out without a word."""
    parser = cli.ArgumentParser()
    parser.add_argument("place", nargs="*")
    parser.add_argument("--many", action="append")
    parser.add_argument("--some", nargs="+")
    parser.add_mutually_exclusive_group().add_argument("--one", default="x")
    given = parser.parse_intermixed_args(["--many", "a", "b", "--one", "x", "--many", "c", "d"])
    assert (given.many, given.place, given.one) == (["a", "c"], ["b", "d"], "x")
    for name in ("--one", "--some"):
        parser.given.clear()
        with pytest.raises(UserError, match=f"argument {name}: is given twice"):
            parser.parse_intermixed_args([name, "x", name, "y"])


@pytest.mark.parametrize("text", ["²", "-1", "0", "1.5", "", "many", "1_0", "٣", "--1", "1e3"])
def test_no_counts(text: str) -> None:
    with pytest.raises(ArgumentTypeError, match="must be a whole number of at least 1"):
        cli.positive_int(text)


@pytest.mark.parametrize("kind", [cli.positive_int, cli.whole_number])
@pytest.mark.parametrize("digits", [19, 400, 5000])
def test_numbers_of_many_digits(kind, digits: int) -> None:
    with pytest.raises(ArgumentTypeError) as caught:
        kind("9" * digits)
    assert str(caught.value).endswith("must be a whole number of at most 9223372036854775807")
    assert len(str(caught.value)) < 200


def test_numbers() -> None:
    assert cli.positive_int("+007") == cli.whole_number("7") == 7
    assert cli.whole_number("-3") == -3
    assert cli.number("1e-3") == 0.001
    for text in ("warm", "0.\uff15", "1_0", ""):
        with pytest.raises(ArgumentTypeError, match=f"'{text}' must be a number"):
            cli.number(text)


def test_a_value_that_begins_with_a_dash() -> None:
    parser = cli.ArgumentParser()
    parser.add_argument("-p", "--prompt")
    parser.add_argument("--pair", nargs=2)
    with pytest.raises(UserError, match=r"a dash is joined to it: --prompt=-x$"):
        parser.parse_args(["--prompt", "-x"])
    with pytest.raises(UserError, match="expected 2 arguments"):
        parser.parse_args(["--pair", "-x"])


def test_a_long_value_leaves_a_line_that_can_be_read(capsys) -> None:
    def main(argv) -> None:
        raise UserError(f"key ({'x' * 100_000}): the fix")

    assert cli.run(main, []) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: key (xxx") and error.endswith("xxx): the fix\n")
    assert len(error) < 5000


def test_results_do_not_depend_on_each_other() -> None:
    done = []

    def fails(what: str) -> None:
        raise UserError(f"{what} cannot be written")

    with pytest.raises(UserError, match=r"^one cannot be written; two cannot be written$"):
        terminal.deliver(lambda: fails("one"), lambda: done.append(1), lambda: fails("two"))
    assert done == [1]


def test_messages_that_cannot_be_written_cost_nothing(monkeypatch) -> None:
    def main(argv) -> int:
        print("a line", file=sys.stderr, flush=True)
        logging.getLogger("retnet.somewhere").warning("another")
        return 0

    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr("sys.stderr", full)
        assert cli.run(main, []) == 0


@pytest.mark.parametrize(
    ("main", "argv"),
    [
        (train.main, "--help"),
        (train.main, "configs/tiny.yaml --print-config"),
        (tune.main, "-h"),
        (claims.main, "--list"),
    ],
)
def test_a_disk_that_is_full(monkeypatch, capsys, main, argv: str) -> None:
    """argparse said nothing, and a table of hours ended in a traceback."""
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr("sys.stdout", full)
        assert cli.run(main, argv.split()) == 2
    assert capsys.readouterr().err == (
        "error: standard output cannot be written (No space left on device): free space there, or "
        "send it elsewhere\n"
    )


@pytest.mark.slow
def test_the_interpreters_end_costs_nothing_either() -> None:
    """It writes what is left in the buffer of standard error, and would say 120.

    Nor does it look at each object again: those of the imports are frozen.
    """
    program = (
        "import gc, sys; from retnet import cli; from retnet.errors import UserError\n"
        "def main(argv):\n    print(gc.isenabled(), gc.get_freeze_count() > 100_000)\n"
        "    raise UserError('wrong')\n"
        "sys.exit(cli.run(main))"
    )
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [sys.executable, "-c", program], stdout=-1, stderr=full, text=True, check=False
        )
    assert (result.returncode, result.stdout) == (2, "True True\n")


def test_a_log_line_is_one_line(capsys) -> None:
    """Or a file's name could say that all is lost."""
    cli.configure_logging()
    logging.getLogger("retnet.test").info("reading %s", "x\nerror: all is lost\u2028y")
    assert capsys.readouterr().err == "reading x\\nerror: all is lost\\u2028y\n"
