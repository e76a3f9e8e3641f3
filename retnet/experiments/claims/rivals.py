"""Who is compared after training, with the perplexities that the paper has for them, in order.

Tables 5 and 6 of arXiv 2307.08621: 200 million parameters, 10,000 steps, in-domain, single runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from retnet.experiments.contenders import Contender
from retnet.training import load_config

RETENTION, TRANSFORMER = "retention", "attention"
SMALLER_HEADS = 4  # times as many heads: the paper has a width of 64 in place of 256


@dataclass(frozen=True)
class Rival:
    """A contender, and its perplexity in the paper."""

    contender: Contender
    published: float

    @property
    def name(self) -> str:
        return self.contender.name


def _mixer(name: str, mixer: str, *keys: str) -> Contender:
    return Contender(name, (f"model.mixer={mixer}", *keys))


OURS = Rival(_mixer(RETENTION, "retention"), 26.05)
ATTENTION = _mixer(TRANSFORMER, "attention")
RELATIVES = (
    Rival(_mixer("rwkv-time-mix", "rwkv", "model.ffn=gelu"), 30.92),
    Rival(_mixer("linear", "linear"), 40.24),
)


def ablations(recipe: str, overrides: Sequence[str]) -> list[Rival]:
    """RetNets that lack something, for a recipe whose heads the last of them divides."""
    heads = SMALLER_HEADS * load_config(recipe, overrides).model.num_heads
    return [
        Rival(_mixer("one-decay", "retention", f"model.decay={127 / 128}"), 27.02),
        Rival(_mixer("no-head-norm", "retention", "model.head_norm=none"), 27.54),
        Rival(_mixer("small-heads", "retention", f"model.num_heads={heads}"), 27.68),
        Rival(_mixer("no-gate", "retention", "model.gate=false"), 27.84),
        Rival(_mixer("no-decay", "retention", "model.decay=1"), 27.86),
    ]
