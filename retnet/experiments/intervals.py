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
from retnet.evaluation.report import format_interval, format_table
from retnet.evaluation.scoring import DocumentScores

Setting = tuple[str, Sequence[Path]]  # name, run folders of its seeds


@dataclass(frozen=True)
class Scored:
    """The final checkpoints of one setting's seeds on the documents that were held back."""

    nll: NDArray[np.float64]  # nats of each document, [seeds, documents]
    sizes: DocumentScores  # of the first seed: how many targets and bytes each document has
    tokenizers: frozenset[str]  # their hashes
    parameters: int

    @property
    def losses(self) -> list[float]:
        """Nats per token of each seed."""
        found: list[float] = (self.nll.sum(axis=1) / self.sizes.targets.sum()).tolist()
        return found


def score_all(settings: Sequence[Sequence[Path]]) -> list[Scored]:
    """Score the runs of all settings, in windows of the trained length.

    Raises:
        UserError: They held back different text, or a run has no checkpoint.
    """
    first = load_checkpoint(settings[0][0])
    return [_score(first, runs) for runs in settings]


def _score(first: Checkpoint, runs: Sequence[Path]) -> Scored:
    """One setting on the documents that ``first`` held back."""
    scores, tokenizers, parameters = [], set(), 0
    for run in runs:
        own = load_checkpoint(run)
        context = own.model.config.max_position_embeddings
        documents = validation_text([first, own]).documents
        found = score_documents(
            own.model, own.tokenizer, documents, context=context, progress=f"scoring {run.name}"
        )
        scores.append(found)
        tokenizers.add(tokenizer_hash(own.tokenizer))
        parameters = own.model.num_parameters()
    nll = np.stack([one.nll for one in scores])
    return Scored(nll, scores[0], frozenset(tokenizers), parameters)


def intervals(
    first: Scored, other: Scored, weights: NDArray[np.int64] | None = None
) -> list[Difference]:
    """How much worse the other one is, in nats per token (or of ``weights``), with its intervals.

    Seeds and documents resampled, documents weighted by their tokens; with few seeds a second one,
    Student's over the means of the seeds. The seeds stand in the same order, and are paired.
    """
    weights = first.sizes.targets if weights is None else weights
    found = [paired_bootstrap(first.nll, other.nll, weights)]
    if 1 < len(first.nll) < FEW_SEEDS:
        gaps = (other.nll - first.nll).sum(axis=1) / weights.sum()
        found.append(t_interval(gaps.tolist()))
    return found


def titles(first: Scored) -> list[str]:
    """The titles of the columns that ``intervals`` fills."""
    seeds, documents = first.nll.shape
    over = ["seeds"] * (seeds > 1) + ["documents"] * (documents > 1)
    title = f"{CONFIDENCE:.0%} over {' and '.join(over)}" if over else "no interval"
    return [title, f"over {seeds} seeds (t)"] if 1 < seeds < FEW_SEEDS else [title]


def differences(settings: Sequence[Setting]) -> list[str]:
    """A table of how much worse each setting's final checkpoints are than the first one's.

    Nats per token where all have one tokenizer, else bits per byte.
    """
    try:
        found = score_all([runs for _, runs in settings])
    except UserError as error:  # they may have held back other text, and rightly so
        return [f"no differences: {error}"]
    alike = len(frozenset().union(*(one.tokenizers for one in found))) == 1
    first = found[0]
    head = [f"minus {settings[0][0]}", "nats/token" if alike else "bits/byte"]
    rows = [[*head, *titles(first)]]
    for (name, _), own in zip(settings[1:], found[1:], strict=True):
        gaps = intervals(first, own, None if alike else first.sizes.bytes)
        gaps = gaps if alike else [to_bits(one) for one in gaps]
        rows.append([name, f"{gaps[0].value:+.4f}", *map(format_interval, gaps)])
    return format_table(rows)
