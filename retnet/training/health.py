"""Signs that a run goes wrong: a first loss far from chance, spikes, values that are not finite."""

import logging
import math
from collections import deque
from collections.abc import Iterable
from statistics import fmean, pstdev

logger = logging.getLogger(__name__)

DIVERGED = "diverged.json"
FIRST_LOSS_MARGIN = 0.5
SPIKE_WINDOW = 100
SPIKE_AFTER = 20  # losses, before which nothing can be said of their spread
SPIKE_DEVIATIONS = 5.0
LEAST_DEVIATION = 0.01  # nats; a loss that hardly moves is no reason for alarm


class DivergedError(RuntimeError):
    """A loss or gradient is not finite; what is saved is of the last good step."""


class SpikeWatch:
    """Compares each loss with those of the last 100 steps."""

    def __init__(self, losses: Iterable[float] = ()) -> None:
        self._losses = deque(losses, maxlen=SPIKE_WINDOW)

    def check(self, step: int, loss: float) -> None:
        """Log a warning when ``loss`` is over 5 standard deviations above the mean before it."""
        if len(self._losses) >= SPIKE_AFTER:
            mean = fmean(self._losses)
            deviation = max(pstdev(self._losses), LEAST_DEVIATION)
            if loss > mean + SPIKE_DEVIATIONS * deviation:
                logger.warning(
                    f"step {step}: the loss jumped to {loss:.3f}, the mean of the "
                    f"{len(self._losses)} steps before is {mean:.3f}; if it does not come back, "
                    "lower train.learning_rate or train.grad_clip"
                )
        self._losses.append(loss)


def check_first_loss(loss: float, vocab_size: int) -> None:
    """Log a warning when a fresh model's loss is not that of guessing, ln(vocabulary)."""
    expected = math.log(vocab_size)
    if abs(loss - expected) > FIRST_LOSS_MARGIN:
        logger.warning(
            f"the first loss is {loss:.3f}, but ln(vocabulary) is {expected:.3f}: fresh weights "
            "should know nothing; look at the initialisation and the labels"
        )
