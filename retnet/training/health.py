"""Signs that a run goes wrong: a first loss far from chance, spikes, values that are not finite."""

import logging
import math
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from torch import nn

from retnet.data import CarriedBatches, TrainingBatches
from retnet.files import write_json

logger = logging.getLogger(__name__)

DIVERGED = "diverged.json"
FIRST_LOSS_MARGIN = 0.5
SPIKE_WINDOW = 100
SPIKE_AFTER = 20  # losses, before which nothing can be said of their spread
SPIKE_DEVIATIONS = 5.0
LEAST_DEVIATION = 0.01  # nats; a loss that hardly moves is no reason for alarm


class DivergedError(RuntimeError):
    """Loss or gradient are not finite; the weights are those of the last good step."""


class SpikeWatch:
    """Compares each loss with those of the last 100 steps."""

    def __init__(self, losses: Iterable[float] = ()) -> None:
        self._losses = deque(losses, maxlen=SPIKE_WINDOW)

    def check(self, step: int, loss: float) -> bool:
        """Log a warning when ``loss`` is over 5 standard deviations above the mean before it."""
        spike = False
        if len(self._losses) >= SPIKE_AFTER:
            mean = fmean(self._losses)
            limit = mean + SPIKE_DEVIATIONS * max(pstdev(self._losses), LEAST_DEVIATION)
            spike = loss > limit
            if spike:
                logger.warning(
                    "step %d: the loss jumped to %.3f, the mean of the %d steps before is %.3f; "
                    "if it does not come back, lower train.learning_rate or train.grad_clip",
                    step,
                    loss,
                    len(self._losses),
                    mean,
                )
        self._losses.append(loss)
        return spike


def check_first_loss(loss: float, vocab_size: int) -> None:
    """Log a warning when a fresh model's loss is not that of guessing, ln(vocabulary)."""
    expected = math.log(vocab_size)
    if abs(loss - expected) > FIRST_LOSS_MARGIN:
        logger.warning(
            "the first loss is %.3f, but ln(vocabulary) is %.3f: fresh weights should know "
            "nothing; look at the initialisation and the labels",
            loss,
            expected,
        )


def describe_divergence(
    model: nn.Module, batches: TrainingBatches | CarriedBatches, step: int, loss: float, norm: float
) -> dict[str, Any]:
    """What helps to find out why: the rows of the batch and the gradient's norm by parameter.

    Args:
        model: With the gradients of the step, not clipped.
        batches: Where the rows come from.
        step: Completed steps before it.
        loss: Of the step.
        norm: Of the whole gradient.
    """
    first = step * batches.global_batch
    return {
        "step": step + 1,
        "loss": loss,
        "grad_norm": norm,
        "epoch": batches.epoch(step),
        "rows": [first, first + batches.global_batch - 1],
        "window_starts": batches.window_starts(step),
        "grad_norms": {
            name: None if parameter.grad is None else parameter.grad.norm().item()
            for name, parameter in model.named_parameters()
        },
    }


def stop_diverged(run: Path, report: dict[str, Any], *, write: bool) -> DivergedError:
    """The error to raise, after one process has written the report into the run folder."""
    if write:
        write_json(run / DIVERGED, report, not_finite=str)
    return DivergedError(
        f"step {report['step']}: loss {report['loss']}, gradient norm {report['grad_norm']}; the "
        f"step was not taken, see {run / DIVERGED}. Go on from an older checkpoint "
        "(train.resume) with a lower train.learning_rate or train.grad_clip"
    )
