"""Differences between settings that were trained with several seeds, with their intervals."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from retnet.checkpoints import Checkpoint, load_checkpoint
from retnet.data.tokenizer import tokenizer_hash
from retnet.errors import UserError
from retnet.evaluation import paired_bootstrap, score_documents, t_interval, validation_text
from retnet.evaluation.bootstrap import CONFIDENCE, FEW_SEEDS, to_bits
from retnet.evaluation.report import format_interval, format_table
from retnet.evaluation.scoring import DocumentScores

Setting = tuple[str, Sequence[Path]]  # name, run folders of its seeds


def differences(settings: Sequence[Setting]) -> list[str]:
    """A table of how much worse each setting's final checkpoints are than the first one's.

    Nats per token where all have one tokenizer, else bits per byte. Intervals: seeds and documents
    resampled, documents weighted by their tokens (or bytes); with few seeds also Student's over the
    means of the seeds. The seeds of all settings stand in the same order, and are paired.
    """
    first = load_checkpoint(settings[0][1][0])
    try:
        found = [[_score(first, run) for run in runs] for _, runs in settings]
    except UserError as error:  # they may have held back other text, and rightly so
        return [f"no differences: {error}"]
    alike = len({tokenizer for runs in found for tokenizer, _ in runs}) == 1
    nll = [np.stack([scores.nll for _, scores in runs]) for runs in found]
    scores = found[0][0][1]
    return _table([name for name, _ in settings], nll, scores, alike)


def _score(first: Checkpoint, run: Path) -> tuple[str, DocumentScores]:
    """The hash of a run's tokenizer, and its scores on the documents that ``first`` held back."""
    own = load_checkpoint(run)
    context = own.model.config.max_position_embeddings
    documents = validation_text([first, own]).documents
    scores = score_documents(
        own.model, own.tokenizer, documents, context=context, progress=f"scoring {run.name}"
    )
    return tokenizer_hash(own.tokenizer), scores


def _table(
    names: Sequence[str], nll: Sequence[NDArray[np.float64]], first: DocumentScores, alike: bool
) -> list[str]:
    """``nll``: nats of each setting, [seeds, documents]; ``first``: sizes of the documents."""
    seeds, documents = nll[0].shape
    weights = first.targets if alike else first.bytes
    over = ["seeds"] * (seeds > 1) + ["documents"] * (documents > 1)
    head = [f"minus {names[0]}", "nats/token" if alike else "bits/byte"]
    head.append(f"{CONFIDENCE:.0%} over {' and '.join(over)}" if over else "no interval")
    few = 1 < seeds < FEW_SEEDS
    rows = [[*head, f"over {seeds} seeds (t)"] if few else head]
    for name, own in zip(names[1:], nll[1:], strict=True):
        found = [paired_bootstrap(nll[0], own, weights)]
        if few:
            found.append(t_interval(((own - nll[0]).sum(axis=1) / weights.sum()).tolist()))
        found = found if alike else [to_bits(one) for one in found]
        rows.append([name, f"{found[0].value:+.4f}", *map(format_interval, found)])
    return format_table(rows)
