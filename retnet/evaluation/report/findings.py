"""All that a report says of models beside their comparison."""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retnet.checkpoints import Checkpoint
from retnet.checkpoints.format import METRICS
from retnet.errors import memory_errors
from retnet.evaluation.comparison import Comparison
from retnet.evaluation.costs import Costs, measure_costs
from retnet.evaluation.profile import Profile, profile
from retnet.evaluation.scoring import score_documents

logger = logging.getLogger(__name__)

PAPER_CONTEXTS = (512, 1024, 2048)
BEYOND = (2, 4, 8, 16)  # times the trained length
COST_CONTEXTS = (128, 512, 2048, 8192, 32768)
BATCHES = (1, 4, 16)
LENGTHS = (128, 512, 2048, 8192)
MOST_STEPS = 2**53  # which a float holds exactly
MOST = 1e12  # of losses and seconds: beyond it there is nothing to draw
LIMIT_S = 20.0  # of one prefill or training step: a model that would take longer is stopped


@dataclass(frozen=True)
class Reach:
    """How far the costs are measured: see ``measure_costs``."""

    contexts: Sequence[int] = COST_CONTEXTS
    batches: Sequence[int] = BATCHES
    lengths: Sequence[int] = LENGTHS
    limit_s: float = LIMIT_S
    peaks: bool = True


@dataclass(frozen=True)
class History:
    """A run's losses while it trained; ``seconds`` is None for runs that did not write them."""

    steps: list[int]
    seconds: list[float] | None
    training: list[float]
    validation: dict[int, float]  # by step


@dataclass(frozen=True)
class Findings:
    """Of each model in the comparison's order.

    Attributes:
        profiles: None where the models' tokens differ, so that positions and kinds do too.
        carried: Bits per byte with a state carried through each document; None where it grows.
        histories: None where the run folder is not there.
        trained: Tokens of the windows that it was trained on.
        windows: 1 / (1 - decay) of each head in tokens; empty where decays are not fixed.
    """

    comparison: Comparison
    profiles: list[Profile] | None
    carried: list[float | None]
    costs: list[Costs]
    histories: list[History | None]
    trained: list[int]
    windows: list[list[float]]


def find_out(
    checkpoints: Sequence[Checkpoint], comparison: Comparison, reach: Reach | None
) -> Findings:
    """Measure what a report shows; the checkpoints are those of the comparison.

    Costs are measured as far as ``reach`` says, not at all when None.
    """
    histories = [history(one.path) for one in checkpoints]  # first: it may fail, and takes no time
    names = [model.name for model in comparison.models]
    documents, context = comparison.text.documents, comparison.context
    configs = [one.model.config for one in checkpoints]
    trained = [config.max_position_embeddings for config in configs]
    profiles = None
    if comparison.same_tokenizers:
        profiles = [
            profile(
                one.model, one.tokenizer, documents, context=context,
                contexts=lengths_of(trained[0]), progress=f"profile of {name}",
            )
            for name, one in zip(names, checkpoints, strict=True)
        ]  # fmt: skip
        logger.info("losses by position, context and kind of target are known")
    carried = [
        _carried(one, documents, context, f"state of {name} carried")
        for name, one in zip(names, checkpoints, strict=True)
    ]
    costs = [Costs([], [], [])] * len(checkpoints)
    if reach is not None:
        costs = measure_costs(
            checkpoints, contexts=reach.contexts, batches=reach.batches, lengths=reach.lengths,
            limit_s=reach.limit_s, peaks=reach.peaks, progress="measuring costs",
        )  # fmt: skip
        logger.info("costs by context, batch and length are known")
    return Findings(
        comparison,
        profiles,
        carried,
        costs,
        histories,
        trained,
        [config.mixer_class.windows(config) for config in configs],
    )


def lengths_of(trained: int) -> list[int]:
    """The contexts by which losses are told: the paper's, or parts, and multiples beyond."""
    within = [context for context in PAPER_CONTEXTS if context < trained]
    within = within or [trained // 4, trained // 2]
    return sorted({*(context for context in within if context >= 2), trained,
                   *(times * trained for times in BEYOND)})  # fmt: skip


def _carried(
    checkpoint: Checkpoint, documents: Sequence[str], context: int, progress: str
) -> float | None:
    model = checkpoint.model
    if model.grows or model.config.longest is not None:
        return None
    scores = score_documents(
        model, checkpoint.tokenizer, documents, context=context, carry_state=True, progress=progress
    )
    return scores.bits_per_byte


def history(checkpoint: Path) -> History | None:
    """What the run that a checkpoint lies in wrote while it trained; None where that is gone.

    A ``UserError`` where memory does not take the file.
    """
    for folder in (checkpoint.parent, checkpoint.parent.parent):  # final/, checkpoints/step_9/
        file = folder / METRICS
        if file.is_file():
            break
    else:
        return None
    with memory_errors(file):
        text = file.read_text(encoding="utf-8", errors="replace")
    lines = [entry for entry in map(_entry, text.splitlines()) if entry is not None]
    if not lines:
        return None
    timed = all(_is_number(entry.get("perf/seconds")) for entry in lines)
    return History(
        [entry["step"] for entry in lines],
        [entry["perf/seconds"] for entry in lines] if timed else None,
        [entry["train/loss"] for entry in lines],
        {e["step"]: e["val/loss"] for e in lines if _is_number(e.get("val/loss"))},
    )


def _entry(line: str) -> dict[str, Any] | None:
    """What a line says; None where an interruption cut it off, or a hand changed it."""
    try:
        entry = json.loads(line)
        step, loss = entry["step"], entry["train/loss"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    usable = type(step) is int and 1 <= step < MOST_STEPS and _is_number(loss)
    return dict(entry) if usable else None


def _is_number(value: Any) -> bool:
    """Whether it is one that can be drawn."""
    return type(value) in (int, float) and math.isfinite(value) and abs(value) < MOST
