"""Who is compared after training, with the perplexities that the paper has for them.

They are the contenders of ``retnet.experiments.ablations``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from retnet.experiments.ablation_table import FULL, PAPER
from retnet.experiments.ablations import ablated, time_mix
from retnet.experiments.contenders import Contender

TRANSFORMER = "attention"


@dataclass(frozen=True)
class Rival:
    """A contender, and its perplexity in the paper."""

    contender: Contender
    published: float

    @property
    def name(self) -> str:
        return self.contender.name


def _rival(name: str, mixer: str) -> Rival:
    return Rival(Contender(name, (f"model.mixer={mixer}",)), PAPER[name])


OURS = _rival(FULL, FULL)
ATTENTION = Contender(TRANSFORMER, (f"model.mixer={TRANSFORMER}",))


def relatives_of(recipe: str, overrides: Sequence[str]) -> list[Rival]:
    """Other mixers with the RetNet's feed-forward network, in the paper's order."""
    time_mixing = time_mix(recipe, overrides)
    return [Rival(time_mixing, PAPER[time_mixing.name]), _rival("linear", "linear")]


def ablations(recipe: str, overrides: Sequence[str]) -> list[Rival]:
    """RetNets of equal parameters that lack something, in the paper's order."""
    others = [one for one in ablated(recipe, overrides)
              if one.name not in (FULL, "no-gate-equal-width")]  # fmt: skip
    return sorted((Rival(one, PAPER[one.name]) for one in others), key=lambda one: one.published)
