"""What models cost by batch, by length of the rows that they train on, and in memory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

from retnet.checkpoints import Checkpoint
from retnet.evaluation.foreign import runs_own_code
from retnet.evaluation.memory import measured_peaks, training_step
from retnet.evaluation.speed import DecodeSpeed, decode_speed, interleaved
from retnet.generation import evaluation_mode
from retnet.model.causal_lm import DecoderForCausalLM

STEP_TOKENS = 2048  # of a training step; more where a row is longer
ROUNDS = 3


@dataclass(frozen=True)
class TrainingCost:
    """A forward and backward pass on rows of one length; None where it is not defined."""

    length: int
    rows: int
    tokens_per_second: float | None = None
    row_bytes: int | None = None  # peak of the step of one row; None where it was not measured
    stopped: bool = False  # whether it would have taken too long


@dataclass(frozen=True)
class Costs:
    """Of one model."""

    by_context: list[DecodeSpeed]  # one row
    by_batch: list[DecodeSpeed]  # context by context
    training: list[TrainingCost]


def measure_costs(
    checkpoints: Sequence[Checkpoint],
    *,
    by_context: Sequence[list[DecodeSpeed]],
    batches: Sequence[int],
    lengths: Sequence[int],
    limit_s: float,
    everywhere: bool = True,
    peaks: bool = True,
    progress: str | None = None,
) -> list[Costs]:
    """Measure the models side by side; a model that would take longer than ``limit_s`` is stopped.

    Args:
        by_context: What is known of decoding one row.
        batches, lengths: Ascending.
        limit_s: Seconds of one prefill, or of one training step.
        everywhere: Whether batches are measured after each of the contexts, or the first alone.
        peaks: Whether to measure the memory of generating and of training, each in a process for
            each model.
        progress: Title of a progress bar on a terminal.
    """
    models = [checkpoint.model for checkpoint in checkpoints]
    by_batch: list[list[DecodeSpeed]] = [[] for _ in models]
    alone = [own if everywhere else own[:1] for own in by_context]
    contexts = [one.context for one in alone[0]]
    for rows in tqdm(batches, desc=progress, leave=False, disable=None if progress else True):
        found = alone
        if rows > 1:
            found = decode_speed(
                models, contexts, rows=rows, rounds=ROUNDS, limit_s=limit_s, of_one_row=alone
            )
        for own, after in zip(by_batch, found, strict=True):
            own += after
    for own in by_batch:
        own.sort(key=lambda one: (one.context, one.rows))
    training = training_costs(models, lengths, limit_s)
    costs = [Costs(*own) for own in zip(by_context, by_batch, training, strict=True)]
    if peaks:
        costs = [_with_peaks(*own) for own in zip(checkpoints, costs, strict=True)]
    return costs


def training_costs(
    models: Sequence[DecoderForCausalLM], lengths: Sequence[int], limit_s: float
) -> list[list[TrainingCost]]:
    """Tokens per second of forward and backward passes, the models in turn, medians of rounds."""
    results: list[list[TrainingCost]] = [[] for _ in models]
    for length in lengths:
        rows, measured = max(1, STEP_TOKENS // length), []
        for i, model in enumerate(models):
            longest = model.config.longest
            defined = longest is None or length <= longest
            stopped = defined and _too_long(results[i], length * rows, limit_s)
            measured += [i] if defined and not stopped else []
            results[i].append(TrainingCost(length, rows, stopped=stopped))
        steps = [prepared_step(models[i], rows, length) for i in measured]
        for i, timing in zip(
            measured, interleaved(steps, models[0].device, rounds=ROUNDS), strict=True
        ):
            results[i][-1] = TrainingCost(length, rows, rows * length / timing.median)
    return results


def prepared_step(
    model: DecoderForCausalLM, rows: int, length: int, mode: str | None = None
) -> Callable[[], Callable[[], object]]:
    """For ``interleaved``: a training step on random tokens, without dropout."""
    step = training_step(model, rows, length, mode)

    def work() -> None:
        with evaluation_mode(model), torch.enable_grad():  # no dropout: it is not compared
            step()

    return lambda: work


def _too_long(before: Sequence[TrainingCost], tokens: int, limit_s: float) -> bool:
    """Whether it was stopped before, or a step would take longer if time grew with the square."""
    if not before or before[-1].stopped:
        return bool(before)
    last = before[-1]
    if last.tokens_per_second is None:
        return False
    done = last.length * last.rows
    return (tokens / done) ** 2 * done / last.tokens_per_second > limit_s


def _with_peaks(checkpoint: Checkpoint, costs: Costs) -> Costs:
    """With the memory of what was measured; without where its process fails."""
    model = checkpoint.model
    place = checkpoint.base or checkpoint.path  # merged, a model takes what its base takes

    def found(work: str, lengths: Sequence[int]) -> dict[int, int]:
        options = (model.device, model.dtype, runs_own_code(model))
        peaks = measured_peaks(work, place, lengths, *options) if lengths else []
        return dict(zip(lengths, peaks, strict=True)) if peaks else {}

    read = {one.context for one in costs.by_context if one.ms_per_token is not None}
    trained = {one.length for one in costs.training if one.tokens_per_second is not None}
    generating, training = found("generating", sorted(read)), found("training", sorted(trained))
    return Costs(
        [replace(one, peak_bytes=generating.get(one.context)) for one in costs.by_context],
        costs.by_batch,
        [replace(one, row_bytes=training.get(one.length)) for one in costs.training],
    )
