"""Differences between settings that were trained with several seeds, with their intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from retnet.checkpoints import Checkpoint, load_checkpoint
from retnet.data.tokenizer import tokenizer_hash
from retnet.errors import UserError
from retnet.evaluation import (
    Difference,
    paired_bootstrap,
    score_documents,
    t_interval,
    validation_text,
)
from retnet.evaluation.bootstrap import CONFIDENCE, FEW_SEEDS, to_bits
from retnet.evaluation.metrics import to_bits as bits
from retnet.evaluation.report import format_interval, format_table
from retnet.evaluation.scoring import DocumentScores

Setting = tuple[str, Sequence[Path]]  # name, run folders of its seeds


@dataclass(frozen=True)
class Scored:
    """What the final checkpoints of several settings lose on the same documents.

    Attributes:
        nll: Nats of each setting by name, [seeds, documents].
        weights: Targets of each document, or its bytes where tokenizers differ, [documents].
        alike: Whether all have one tokenizer.
    """

    nll: dict[str, NDArray[np.float64]]
    weights: NDArray[np.int64]
    alike: bool

    @property
    def unit(self) -> str:
        return "nats/token" if self.alike else "bits/byte"

    def losses(self, name: str) -> list[float]:
        """Of each seed."""
        found = (self.nll[name].sum(axis=1) / self.weights.sum()).tolist()
        return found if self.alike else [*map(bits, found)]

    def minus(self, name: str, base: str) -> list[Difference]:
        """How much worse than ``base``: with the interval over seeds and documents, resampled; with
        few seeds also with Student's over the means of the seeds."""
        own, first = self.nll[name], self.nll[base]
        found = [paired_bootstrap(first, own, self.weights)]
        if 1 < len(own) < FEW_SEEDS:
            found.append(t_interval(((own - first).sum(axis=1) / self.weights.sum()).tolist()))
        return found if self.alike else [to_bits(one) for one in found]


def scored(settings: Sequence[Setting]) -> Scored:
    """Score all; a ``UserError`` where they did not hold back the same text.

    The seeds of all settings stand in the same order, and are paired.
    """
    first = load_checkpoint(settings[0][1][0])
    found = [[_score(first, run) for run in runs] for _, runs in settings]
    alike = len({tokenizer for runs in found for tokenizer, _ in runs}) == 1
    nll = {
        name: np.stack([scores.nll for _, scores in runs])
        for (name, _), runs in zip(settings, found, strict=True)
    }
    scores = found[0][0][1]
    return Scored(nll, scores.targets if alike else scores.bytes, alike)


def differences(settings: Sequence[Setting]) -> list[str]:
    """A table of how much worse each setting's final checkpoints are than the first one's.

    Nats per token where all have one tokenizer, else bits per byte. Intervals: seeds and documents
    resampled, documents weighted by their tokens (or bytes); with few seeds also Student's over the
    means of the seeds.
    """
    try:
        return _table(scored(settings))
    except UserError as error:  # they may have held back other text, and rightly so
        return [f"no differences: {error}"]


def _score(first: Checkpoint, run: Path) -> tuple[str, DocumentScores]:
    """The hash of a run's tokenizer, and its scores on the documents that ``first`` held back."""
    own = load_checkpoint(run)
    context = own.model.config.max_position_embeddings
    documents = validation_text([first, own]).documents
    scores = score_documents(
        own.model, own.tokenizer, documents, context=context, progress=f"scoring {run.name}"
    )
    return tokenizer_hash(own.tokenizer), scores


def _table(found: Scored) -> list[str]:
    base, *others = found.nll
    seeds, documents = found.nll[base].shape
    over = ["seeds"] * (seeds > 1) + ["documents"] * (documents > 1)
    head = [f"minus {base}", found.unit]
    head.append(f"{CONFIDENCE:.0%} over {' and '.join(over)}" if over else "no interval")
    few = 1 < seeds < FEW_SEEDS
    rows = [[*head, f"over {seeds} seeds (t)"] if few else head]
    for name in others:
        gaps = found.minus(name, base)
        rows.append([name, f"{gaps[0].value:+.4f}", *map(format_interval, gaps)])
    return format_table(rows)
