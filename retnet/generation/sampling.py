"""How the next token is chosen: penalty, temperature, top k, top p, then one draw per row.

The same choices as transformers' processors and warpers (the tests compare them), at a cost that
does not grow with the text.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from retnet.errors import UserError

MAX_SEED = 2**63 - 1
LOWEST_TEMPERATURE = 1e-37  # that float32 can divide by; logits that differ are then infinitely far
SHIFT_BELOW = 1e-3  # the temperature below which logits are shifted before they are divided by it
ATTEMPTS = 3  # to draw a token of the top p without a sort
DRAWN_AT_ONCE = 256  # tokens of a row for which there are uniform numbers
BLOCK = 128  # tokens of a vocabulary that are summed at once


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


def keep_top_p(probabilities: Tensor, top_p: float) -> Tensor:
    """Keep each row's smallest set of tokens that has probability ``top_p``; the others get 0.

    Tokens as likely as the last one kept are kept too.

    Args:
        probabilities: [B, vocab], rows that sum to 1.
        top_p: Above 0, below 1.
    """
    if probabilities.device.type == "cpu":  # only values are sorted, which numpy does fastest
        values = probabilities.numpy()
        lowest = [row[_reached(row, 1 - top_p)] for row in np.sort(values, axis=-1)]
        return torch.from_numpy(values * (values >= np.array(lowest)[:, None]))
    sorted_values = probabilities.sort(dim=-1).values
    number = (sorted_values.cumsum(dim=-1) <= 1 - top_p).sum(dim=-1, keepdim=True)
    threshold = sorted_values.gather(1, number.clamp_(max=probabilities.shape[1] - 1))
    return probabilities.masked_fill(probabilities < threshold, 0)


def draw(probabilities: Tensor, top_p: float, uniform: Tensor) -> Tensor:
    """Draw a token of each row, among those that ``keep_top_p`` keeps.

    A token drawn among all is one of them exactly if those more likely than it have less than
    probability ``top_p`` together: what is drawn otherwise is thrown away. Only where all attempts
    were, the kept ones have to be found, by a sort that takes longer than all the rest. The same
    numbers give the same tokens on every device, and none waits for another.

    Args:
        probabilities: [B, vocab], rows that sum to 1.
        top_p: Above 0, up to 1.
        uniform: float64 [B, ATTEMPTS + 1] on the CPU, from 0 to below 1.

    Returns:
        int64 [B].
    """
    if probabilities.device.type == "cpu":
        rows = zip(probabilities.numpy(), uniform.tolist(), strict=True)
        return torch.tensor([_draw_row(row, top_p, shares) for row, shares in rows])
    return _draw_rows(probabilities, top_p, uniform.to(probabilities.device))


def _draw_row(values: np.ndarray, top_p: float, shares: list[float]) -> int:
    """``draw`` for one row [vocab]."""
    for share in shares[:ATTEMPTS]:
        token = _reached(values, share)
        if top_p == 1 or (values * (values > values[token])).sum() < top_p:
            return token
    (kept,) = keep_top_p(torch.from_numpy(values[None]), top_p).numpy()
    return _reached(kept, shares[ATTEMPTS])


def _draw_rows(probabilities: Tensor, top_p: float, uniform: Tensor) -> Tensor:
    """``draw`` for all rows at once, on any device."""

    def reached(weights: Tensor, shares: Tensor) -> Tensor:
        running = weights.cumsum(dim=-1, dtype=torch.float64)
        return torch.searchsorted(running, shares * running[:, -1:], right=True)

    drawn = reached(probabilities, uniform[:, :ATTEMPTS])
    if top_p == 1:
        return drawn[:, 0]
    own = probabilities.gather(1, drawn)[..., None]
    every = probabilities[:, None]
    kept = torch.where(every > own, every, 0).sum(-1) < top_p  # [B, ATTEMPTS]
    token = reached(keep_top_p(probabilities, top_p), uniform[:, ATTEMPTS:])[:, 0]
    for attempt in reversed(range(ATTEMPTS)):
        token = torch.where(kept[:, attempt], drawn[:, attempt], token)
    return token


def _reached(weights: np.ndarray, share: float) -> int:
    """The first index at which the running sum of [vocab] weights exceeds a share of their sum.

    Sums of blocks find the block, and only that one is summed step by step: a running sum over all
    would take longer than the softmax.
    """
    sums = np.add.reduceat(weights, _block_starts(len(weights))).cumsum(dtype=np.float64)
    level = share * sums[-1]
    block = min(int(sums.searchsorted(level, side="right")), len(sums) - 1)
    start = block * BLOCK
    running = weights[start : start + BLOCK].cumsum(dtype=np.float64)
    if block > 0:
        level -= sums[block - 1]
    within = int(running.searchsorted(level, side="right"))
    if within == len(running):  # by rounding: the last one that adds something
        within = int(running.searchsorted(running[-1]))
    return start + within


@lru_cache
def _block_starts(vocab: int) -> np.ndarray:
    return np.arange(0, vocab, BLOCK)


class Sampler:
    """Draws the next token of every row of a batch.

    A draw inverts the distribution function at uniform numbers. The numbers come from generators,
    one per row, on the CPU, so the same seed gives the same text on every device that computes the
    same logits, and drawing never waits for a device.

    Args:
        sampling: What to apply.
        prompt_ids: The prompts, [B, T]: their tokens count as repeated.
    """

    def __init__(self, sampling: Sampling, prompt_ids: Tensor) -> None:
        self.sampling = sampling
        self.temperature = max(sampling.temperature, LOWEST_TEMPERATURE)
        self.prompt_ids = prompt_ids
        self.seen: Tensor | None = None  # bool [B, vocab], for the repetition penalty
        self.generators = [
            torch.Generator().manual_seed((sampling.seed + row) % MAX_SEED)
            for row in range(len(prompt_ids))
        ]
        self.uniform: Tensor | None = None  # [B, DRAWN_AT_ONCE, ATTEMPTS + 1]
        self.used = DRAWN_AT_ONCE

    @torch.inference_mode()
    def __call__(self, logits: Tensor) -> Tensor:
        """Choose one token per row.

        Args:
            logits: Of the last position, [B, vocab].

        Returns:
            Token ids, [B].
        """
        penalised = self.sampling.repetition_penalty != 1.0
        if penalised:
            logits = self._punish_repetition(logits)
        tokens = logits.argmax(dim=-1) if self.sampling.greedy else self._draw(logits)
        if penalised and self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)
        return tokens

    def _punish_repetition(self, logits: Tensor) -> Tensor:
        if self.seen is None:
            self.seen = torch.zeros_like(logits, dtype=torch.bool)
            self.seen.scatter_(1, self.prompt_ids, True)
        penalty = self.sampling.repetition_penalty
        return torch.where(
            self.seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits
        )

    def _draw(self, logits: Tensor) -> Tensor:
        device = logits.device
        if device.type == "mps":  # which has no float64
            logits = logits.cpu()
        if self.temperature < SHIFT_BELOW:  # inf - inf threatens
            logits = logits - logits.amax(dim=-1, keepdim=True)
        scores = logits / self.temperature
        top_k = self.sampling.top_k
        if top_k is not None and top_k < scores.shape[1]:
            scores = scores.masked_fill(scores < scores.topk(top_k).values[:, -1:], -math.inf)
        tokens = draw(scores.softmax(dim=-1), self.sampling.top_p, self._next_uniform())
        return tokens.to(device)

    def _next_uniform(self) -> Tensor:
        """The next numbers of each row, float64 [B, ATTEMPTS + 1]."""
        if self.uniform is None or self.used == DRAWN_AT_ONCE:
            shape = (DRAWN_AT_ONCE, ATTEMPTS + 1)
            draws = [
                torch.rand(shape, dtype=torch.float64, generator=own) for own in self.generators
            ]
            self.uniform, self.used = torch.stack(draws), 0
        self.used += 1
        return self.uniform[:, self.used - 1]
