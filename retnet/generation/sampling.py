"""How the next token is chosen: transformers' filters (but one), then one draw per row."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from retnet.errors import UserError

MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Sampling:
    """The choice of the next token from the logits, in the order in which it is applied.

    Args:
        repetition_penalty: Above 1 makes tokens of the prompt and of the text so far less likely.
        temperature: Divides the logits; below 1 is bolder, above 1 more varied.
        top_k: Keep the k most likely tokens only; None keeps all.
        top_p: Keep the smallest set of tokens that has this probability; 1 keeps all.
        greedy: Take the most likely token instead of drawing one.
        seed: Row i of a batch draws from a generator seeded with ``seed + i``, so that a sample
            does not depend on its neighbours.

    Raises:
        UserError: A value is out of its range.
    """

    repetition_penalty: float = 1.0
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float = 0.95
    greedy: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise UserError(
                f"temperature ({self.temperature}) must be above 0: use --greedy for the most "
                "likely token"
            )
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k ({self.top_k}) must be at least 1: leave it out to keep all")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p ({self.top_p}) must be above 0 and at most 1: 1 keeps all")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise UserError(
                f"repetition_penalty ({self.repetition_penalty}) must be above 0: 1 changes nothing"
            )
        if not 0 <= self.seed <= MAX_SEED:
            raise UserError(f"seed ({self.seed}) must be a whole number from 0 to {MAX_SEED}")


def keep_top_p(scores: Tensor, top_p: float) -> Tensor:
    """Keep each row's smallest set of tokens that has probability ``top_p``; the others get -inf.

    What transformers' TopPLogitsWarper does (tokens as likely as the last one kept are kept too),
    by a threshold: only values are sorted, no indices, which numpy does ten times faster than torch
    on a CPU. The sort is most of what a token costs beside the model.

    Args:
        scores: [B, vocab].
        top_p: Above 0, below 1.
    """
    if scores.device.type == "cpu":
        ordered = torch.from_numpy(np.sort(scores.numpy(), axis=-1))
    else:
        ordered = scores.sort(dim=-1).values
    cumulative = ordered.softmax(dim=-1).cumsum(dim=-1)  # from the least likely on
    first_kept = (cumulative <= 1 - top_p).sum(dim=-1, keepdim=True).clamp_(max=scores.shape[1] - 1)
    return scores.masked_fill(scores < ordered.gather(1, first_kept), -math.inf)


class Sampler:
    """Draws the next token of every row of a batch.

    A draw inverts the distribution function at one uniform number per row. The numbers come from
    generators on the CPU, so the same seed gives the same text on every device that computes the
    same logits, and drawing never waits for a device.

    Args:
        sampling: What to apply.
        rows: The number of rows in the batch.
    """

    def __init__(self, sampling: Sampling, rows: int) -> None:
        self.greedy = sampling.greedy
        self.penalty: Callable | None = None
        if sampling.repetition_penalty != 1.0:
            self.penalty = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)
        # called one by one: a LogitsProcessorList inspects every signature at every token
        self.filters: list[Callable] = [TemperatureLogitsWarper(float(sampling.temperature))]
        if sampling.top_k is not None:
            self.filters.append(TopKLogitsWarper(sampling.top_k))
        self.top_p = sampling.top_p
        self.generators = [
            torch.Generator().manual_seed((sampling.seed + row) % MAX_SEED) for row in range(rows)
        ]

    @torch.inference_mode()
    def __call__(self, input_ids: Tensor, logits: Tensor) -> Tensor:
        """Choose one token per row.

        Args:
            input_ids: Everything so far, [B, T], for the repetition penalty.
            logits: Of the last position, [B, vocab].

        Returns:
            Token ids, [B].
        """
        scores = logits if self.penalty is None else self.penalty(input_ids, logits)
        if self.greedy:
            return scores.argmax(dim=-1)
        # Shifting by the maximum keeps tiny temperatures from overflowing to inf - inf.
        scores = scores - scores.amax(dim=-1, keepdim=True)
        for keep in self.filters:
            scores = keep(input_ids, scores)
        if self.top_p < 1.0:
            scores = keep_top_p(scores, self.top_p)
        cumulative = scores.softmax(dim=-1).double().cumsum(dim=-1)
        uniform = torch.stack(
            [torch.rand(1, dtype=torch.float64, generator=own) for own in self.generators]
        ).to(logits.device)
        drawn = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
        return drawn.squeeze(1).clamp_(max=logits.shape[-1] - 1)
