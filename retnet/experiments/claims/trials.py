"""Trained models for claims: one recipe, several seeds, finished runs only read."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from retnet.experiments.contenders import Contender, check_seeds, check_settings, planned
from retnet.experiments.intervals import Scored, score_all
from retnet.experiments.repeat import Row, repeat
from retnet.experiments.tune import tuned_for

RECIPE = "configs/tiny.yaml"
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Trials:
    """How contenders are trained; ``tuned``: the file of ``retnet.experiments.tune``."""

    recipe: str = RECIPE
    overrides: tuple[str, ...] = ()
    seeds: tuple[int, ...] = SEEDS
    tuned: Path | None = None
    out: Path = Path("runs")

    @cached_property
    def _arguments(self) -> argparse.Namespace:
        return argparse.Namespace(tuned=self.tuned, overrides=[*self.overrides], variant=[])

    def settings(self, who: Sequence[Contender]) -> dict[str, list[str]]:
        """The tuned ``key=value`` of each; a ``UserError`` where the file lacks one."""
        return tuned_for(who, self._arguments, {"train.seed": "--seeds"})

    def check(self, who: Sequence[Contender]) -> None:
        """Raise a ``UserError`` where an option is wrong, or makes no run of one of them."""
        check_settings(self._arguments, "--tuned", {}, {"train.seed": "--seeds"})
        check_seeds(self.seeds)
        tuned = self.settings(who)
        for contender in who:
            keys = [*self.overrides, *contender.keys, *tuned.get(contender.name, ())]
            planned(self.recipe, self.out / contender.name, keys)

    def trained(self, who: Sequence[Contender]) -> list[Row]:
        """A row for each contender, in order; trains what is not finished."""
        return repeat(
            self.recipe,
            who,
            seeds=self.seeds,
            variations={},
            overrides=self.overrides,
            tuned=self.settings(who),
            out=self.out,
        )

    def scored(self, who: Sequence[Contender]) -> dict[str, Scored]:
        """What each loses on the validation documents, by name."""
        found = score_all([row.runs for row in self.trained(who)])
        return dict(zip((contender.name for contender in who), found, strict=True))
