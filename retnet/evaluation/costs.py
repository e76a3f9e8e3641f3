"""What models cost by batch and by length of the rows that they train on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

from retnet.checkpoints import Checkpoint
from retnet.evaluation.foreign import runs_own_code
from retnet.evaluation.memory import training_peaks, training_step
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
    by_batch: list[DecodeSpeed]
    training: list[TrainingCost]


def measure_costs(
    checkpoints: Sequence[Checkpoint],
    *,
    by_context: Sequence[list[DecodeSpeed]],
    batches: Sequence[int],
    lengths: Sequence[int],
    limit_s: float,
    peaks: bool = True,
    progress: str | None = None,
) -> list[Costs]:
    """Measure the models side by side; a model that would take longer than ``limit_s`` is stopped.

    Args:
        by_context: What is known of decoding one row; after the first of these contexts batches
            are measured.
        batches, lengths: Ascending.
        limit_s: Seconds of one prefill, or of one training step.
        peaks: Whether to measure the memory of training, in a process for each model.
        progress: Title of a progress bar on a terminal.
    """
    models = [checkpoint.model for checkpoint in checkpoints]
    by_batch: list[list[DecodeSpeed]] = [[] for _ in models]
    context = [by_context[0][0].context]
    for rows in tqdm(batches, desc=progress, leave=False, disable=None if progress else True):
        found = decode_speed(models, context, rows=rows, rounds=ROUNDS, limit_s=limit_s)
        for own, (one,) in zip(by_batch, found, strict=True):
            own.append(one)
    training = training_costs(models, lengths, limit_s)
    if peaks:
        training = [
            _with_peaks(checkpoint, own)
            for checkpoint, own in zip(checkpoints, training, strict=True)
        ]
    return [Costs(*own) for own in zip(by_context, by_batch, training, strict=True)]


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


def _with_peaks(checkpoint: Checkpoint, costs: Sequence[TrainingCost]) -> list[TrainingCost]:
    measured = [one.length for one in costs if one.tokens_per_second is not None]
    model = checkpoint.model
    trusted = runs_own_code(model)
    place = checkpoint.base or checkpoint.path  # merged, a model takes what its base takes
    found = training_peaks(place, measured, model.device, model.dtype, trusted) if measured else []
    peaks = dict(zip(measured, found, strict=True)) if found else {}
    return [
        TrainingCost(
            one.length, one.rows, one.tokens_per_second, peaks.get(one.length), one.stopped
        )
        for one in costs
    ]
