"""The parity matrix: everything that must be equal, in every precision, and how equal it is.

    python -m benchmarks.parity [--kinds NAME ...] [--cases N] [--seed S] [--markdown] [--check]

Rows are the properties of ``benchmarks.properties``, columns are precisions. An entry is the worst
difference between two ways to the same numbers, found over N random cases: random variant of the
model, random text, padding, documents, splits and modes, the same ones in every column.
"""

import argparse
import copy
import datetime
import logging
import platform
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from tqdm import tqdm

from benchmarks.cases import KINDS, PRECISIONS, Case, make_model
from benchmarks.properties import PROPERTIES, TOKENS_PER_CASE, Property, largest
from retnet.cli import ArgumentParser, positive_int, run
from retnet.model import MIXERS
from retnet.model.causal_lm import DecoderForCausalLM
from retnet.model.models import model_class

logger = logging.getLogger(__name__)

CASES = 16
DTYPES = {"float64": torch.float64, "bfloat16 weights": torch.bfloat16}  # others are float32


@dataclass(frozen=True)
class Entry:
    """One property of one model in one precision.

    Attributes:
        row: The property.
        kind: Whose; of ``KINDS``.
        precision: In which.
        differences: One per case.
    """

    row: Property
    kind: str
    precision: str
    differences: list[float]

    @property
    def value(self) -> float:
        """The worst difference, or the number of differing tokens; NaN if any of them is."""
        if self.row.unit == "tokens":
            return sum(self.differences)
        return largest(self.differences)

    @property
    def failed(self) -> bool:
        """Whether it is above what float64 and float32 allow; bfloat16 has no limit here."""
        limits = dict(zip(("float64", "float32"), self.row.limits, strict=True))
        return self.precision in limits and not self.value <= limits[self.precision]

    def __str__(self) -> str:
        if self.row.unit == "tokens":
            return f"{self.value:.0f} of {len(self.differences) * TOKENS_PER_CASE}"
        return "0" if self.value == 0 else f"{self.value:.1e}"


def title(kind: str) -> str:
    """Of its table: "RetNet", "Transformer", "hybrid", ..."""
    name = model_class(kind).__name__ if kind in MIXERS else kind
    return name.removesuffix("ForCausalLM")


def measure(cases: int, seed: int, kinds: Sequence[str] = tuple(KINDS)) -> list[Entry]:
    """All entries of the matrix, row by row.

    Args:
        cases: Random models of each kind.
        seed: Of everything that is random.
        kinds: Of ``KINDS``.
    """
    entries = {
        (kind, row.name, precision): Entry(row, kind, precision, [])
        for kind in kinds
        for row in PROPERTIES
        for precision in PRECISIONS
        if row.applies(KINDS[kind])
    }
    bar = tqdm(total=cases * len(kinds), desc="parity", unit="model", disable=None)
    for number in range(cases):
        for kind in kinds:
            model = make_model(kind, random.Random(f"{seed} {number} {kind}"))
            wide = copy.deepcopy(model).double()
            for precision in PRECISIONS:
                narrow: Any = copy.deepcopy(model)
                narrow.to(DTYPES.get(precision, torch.float32))
                for row in PROPERTIES:
                    entry = entries.get((kind, row.name, precision))
                    if entry is not None and number % row.every == 0:
                        difference = _difference(row, wide, narrow, precision, seed, number)
                        entry.differences.append(difference)
            bar.update()
    bar.close()
    return list(entries.values())


def _difference(
    row: Property,
    wide: DecoderForCausalLM,
    narrow: DecoderForCausalLM,
    precision: str,
    seed: int,
    number: int,
) -> float:
    draw = random.Random(f"{seed} {number} {row.name}")
    return row.measure(Case(wide, narrow, precision, draw))


def table(entries: Sequence[Entry], kind: str, *, markdown: bool) -> str:
    """The rows of one model, aligned for people or in Markdown."""
    lines = [[title(kind), "unit", *PRECISIONS]]
    for row in PROPERTIES:
        own = [e for e in entries if e.kind == kind and e.row is row]
        if own:
            lines.append([row.name, row.unit, *map(str, own)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    if markdown:
        rule = ["---", "---", *["---:"] * len(PRECISIONS)]
        return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def heading(cases: int, seed: int) -> str:
    """What the numbers depend on."""
    return (
        f"Worst difference over {cases} random cases, seed {seed}; torch {torch.__version__}, "
        f"transformers {transformers.__version__}, Python {platform.python_version()}, "
        f"{platform.machine()} CPU, {datetime.date.today()}."
    )


def main(argv: Sequence[str]) -> int:
    """Measure and print; exit code 1 when ``--check`` finds an entry above its limit."""
    parser = ArgumentParser(
        prog="python -m benchmarks.parity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cases", type=positive_int, default=CASES, metavar="N",
                        help=f"random models of each kind (default {CASES})")  # fmt: skip
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[*KINDS], metavar="NAME",
                        help=f"mixers, or the hybrid (all: {', '.join(KINDS)})")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default 0)")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    parser.add_argument("--check", action="store_true",
                        help="exit with 1 when an entry is above its limit: 1e-10 in float64 "
                        "(1e-6 for the shift), 1e-4 in float32 (1e-3 for gradients), no differing "
                        "token")  # fmt: skip
    arguments = parser.parse_args(argv)
    logger.info("measuring %d random models of each kind", arguments.cases)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other
    try:
        entries = measure(arguments.cases, arguments.seed, arguments.kinds)
    finally:
        torch.set_num_threads(threads)
    print(heading(arguments.cases, arguments.seed))
    for kind in arguments.kinds:
        print(f"\n{table(entries, kind, markdown=arguments.markdown)}")
    failed = [entry for entry in entries if entry.failed] if arguments.check else []
    for entry in failed:
        name = f"{title(entry.kind)}, {entry.row.name}, {entry.precision}"
        print(f"above the limit: {name}: {entry}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run(main))
