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
from retnet.evaluation.foreign import ForeignModel
from retnet.evaluation.profile import LONG_WINDOWS, Profile, profile
from retnet.evaluation.scoring import score_documents
from retnet.evaluation.token_weights import TokenWeights, token_weights

logger = logging.getLogger(__name__)

PAPER_CONTEXTS = (512, 1024, 2048)
BEYOND = (2, 4, 8, 16)  # times the trained length
COST_CONTEXTS = (128, 512, 2048, 8192, 32768)
BATCHES = (1, 4, 16)
LENGTHS = (128, 512, 2048, 8192)
QUICK_CONTEXTS = (128, 1024, 4096)
MOST_STEPS = 2**53  # which a float holds exactly
MOST = 1e12  # of losses and seconds: beyond it there is nothing to draw
LIMIT_S = 20.0  # of one prefill or training step: a model that would take longer is stopped


@dataclass(frozen=True)
class Reach:
    """How far is measured what the comparison has not: see ``measure_costs``.

    Attributes:
        windows: How many windows of each length tell losses by context.
        beyond: Times the trained length, how far those go.
        carried: Whether models with a state of constant size also carry it through documents.
    """

    batches: Sequence[int] = BATCHES
    lengths: Sequence[int] = LENGTHS
    limit_s: float = LIMIT_S
    everywhere: bool = True
    peaks: bool = True
    windows: int = LONG_WINDOWS
    beyond: Sequence[int] = BEYOND
    carried: bool = True


THOROUGH = Reach()
QUICK = Reach(
    batches=(1, 16), lengths=(256, 1024), everywhere=False, peaks=False, beyond=(2, 4),
    carried=False,
)  # fmt: skip


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
        carried: Bits per byte with a state carried through each document; None where it grows, or
            was not asked for.
        histories: None where the run folder is not there.
        trained: Tokens of the windows that it was trained on; None where that is not told.
        windows: 1 / (1 - decay) of each head in tokens; empty where decays are not fixed.
        weights: What one head takes of a short text's tokens; None where a model has no such.
    """

    comparison: Comparison
    profiles: list[Profile] | None
    carried: list[float | None]
    costs: list[Costs]
    histories: list[History | None]
    trained: list[int | None]
    windows: list[list[float]]
    weights: list[TokenWeights | None]


def find_out(
    checkpoints: Sequence[Checkpoint], comparison: Comparison, reach: Reach = THOROUGH
) -> Findings:
    """Measure what a report shows; the checkpoints are those of the comparison.

    Costs are measured as far as ``reach`` says where the comparison has some.
    """
    # first: it may fail, and takes no time; what lies around an adapter is no run of its own
    histories = [None if one.base else history(one.path) for one in checkpoints]
    names = [model.name for model in comparison.models]
    documents, context = comparison.text.documents, comparison.context
    configs = [one.model.config for one in checkpoints]
    trained: list[int | None] = [config.max_position_embeddings for config in configs]
    profiles = None
    if comparison.same_tokenizers:
        profiles = [
            profile(
                one.model, one.tokenizer, documents, context=context,
                contexts=lengths_of(trained[0] or context, reach.beyond), at_most=reach.windows,
                eos=comparison.eos, scores=model.scores, progress=f"profile of {name}",
            )
            for name, one, model in zip(names, checkpoints, comparison.models, strict=True)
        ]  # fmt: skip
        logger.info("losses by position, context and kind of target are known")
    carried = [
        _carried(one, documents, context, comparison.eos, f"state of {name} carried")
        if reach.carried
        else None
        for name, one in zip(names, checkpoints, strict=True)
    ]
    costs = [Costs([], [], [])] * len(checkpoints)
    by_context = [model.speed for model in comparison.models]
    if by_context[0]:
        costs = measure_costs(
            checkpoints, by_context=by_context, batches=reach.batches, lengths=reach.lengths,
            limit_s=reach.limit_s, everywhere=reach.everywhere, peaks=reach.peaks,
            progress="measuring costs",
        )  # fmt: skip
        logger.info("costs by batch and length are known")
    return Findings(
        comparison,
        profiles,
        carried,
        costs,
        histories,
        trained,
        [config.mixer_class.windows(config) for config in configs],
        [_weights(one, documents) for one in checkpoints],
    )


def lengths_of(trained: int, beyond: Sequence[int] = BEYOND) -> list[int]:
    """The contexts by which losses are told: the paper's, or parts, and multiples beyond."""
    within = [context for context in PAPER_CONTEXTS if context < trained]
    within = within or [trained // 4, trained // 2]
    return sorted({*(context for context in within if context >= 2), trained,
                   *(times * trained for times in beyond)})  # fmt: skip


def _carried(
    checkpoint: Checkpoint, documents: Sequence[str], context: int, eos: bool, progress: str
) -> float | None:
    model = checkpoint.model
    if isinstance(model, ForeignModel) or model.grows or model.config.longest is not None:
        return None
    scores = score_documents(
        model, checkpoint.tokenizer, documents, context=context, carry_state=True, eos=eos,
        progress=progress,
    )  # fmt: skip
    return scores.bits_per_byte


def _weights(checkpoint: Checkpoint, documents: Sequence[str]) -> TokenWeights | None:
    if isinstance(checkpoint.model, ForeignModel):
        return None
    return token_weights(checkpoint.model, checkpoint.tokenizer, documents)


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
