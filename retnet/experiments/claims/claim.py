"""A claim: what is said, by whom, what is measured of it here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from retnet.experiments.claims.verdict import Finding
from retnet.experiments.contenders import Contender

PAPER = "RetNet, arXiv 2307.08621"


@dataclass(frozen=True)
class Claim:
    """One row of docs/claims.md.

    Attributes:
        name: For the command line.
        says: The claim, a sentence.
        source: Paper, section or figure.
        here: What is measured here, and what is not tested by it.
        measure: The findings; the limits among them are the rule. It gets a ``Setup``, or the
            ``Trials`` of a claim that needs training.
        seconds: About what it takes on two cores at the default size.
        of: What it is said of, where that is a certain size or machine: others do not test it.
        who: Of a claim that needs trained models: whom, given the ``Trials``.
    """

    name: str
    says: str
    source: str
    here: str
    measure: Callable[[Any], list[Finding]]
    seconds: int
    of: str = ""
    who: Callable[[Any], list[Contender]] | None = None

    @property
    def trains(self) -> bool:
        return self.who is not None
