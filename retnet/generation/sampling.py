"""How the next token is chosen: penalty, temperature, top k, top p, then one draw per row.

The same choices as transformers' processors and warpers (the tests compare them), at a cost that
does not grow with the text.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from retnet.errors import UserError

MAX_SEED = 2**63 - 1
MOST_PENALTY = 1e6  # with which no logit becomes infinite
LOWEST_TEMPERATURE = 1e-37  # that float32 can divide by; logits that differ are then infinitely far
SHIFT_BELOW = 1e-3  # the temperature below which logits are shifted before they are divided by it
ATTEMPTS = 3  # to draw a token of the top p without a sort
DRAWN_AT_ONCE = 256  # tokens of a row for which there are uniform numbers
FloatArray = npt.NDArray[np.floating[Any]]
# of a row: its generator, and the numbers in float64, which are there twice while they are made
NUMBERS_BYTES = 2560 + 16 * DRAWN_AT_ONCE * (ATTEMPTS + 1)


@dataclass(frozen=True)
class Sampling:
    """The choice of the next token from the logits, in the order in which it is applied.

    A ``UserError`` where a value is out of its range.
    """

    repetition_penalty: float = 1.0  # above 1: tokens of prompt and text so far are less likely
    temperature: float = 0.8  # divides the logits; below 1 is more cautious, above more varied
    top_k: int | None = None  # keep the k most likely tokens only; None keeps all
    top_p: float = 0.95  # keep the smallest set of tokens with this probability; 1 keeps all
    greedy: bool = False  # take the most likely token instead of drawing one
    seed: int = 0  # row i draws with seed + i, so a sample does not depend on its neighbours

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
        if not 1 / MOST_PENALTY <= self.repetition_penalty <= MOST_PENALTY:
            raise UserError(
                f"repetition_penalty ({self.repetition_penalty}) must be from "
                f"{1 / MOST_PENALTY} to {MOST_PENALTY}: 1 changes nothing"
            )
        if not 0 <= self.seed <= MAX_SEED:
            raise UserError(f"seed ({self.seed}) must be a whole number from 0 to {MAX_SEED}")


def keep_top_p(probabilities: Tensor, top_p: float) -> Tensor:
    """Keep each row's smallest set of tokens that has probability ``top_p``; the others get 0.

    Tokens as likely as the last one kept are kept too. The rows of [B, vocab] sum to 1, top_p is
    above 0 and below 1.
    """
    if probabilities.device.type == "cpu":  # ten times faster than torch, which sorts indices too
        sorted_values = torch.from_numpy(np.sort(probabilities.numpy(), axis=-1))
    else:
        sorted_values = probabilities.sort(dim=-1).values
    number = (sorted_values.cumsum(dim=-1) <= 1 - top_p).sum(dim=-1, keepdim=True)
    threshold = sorted_values.gather(1, number.clamp_(max=probabilities.shape[1] - 1))
    return probabilities.masked_fill(probabilities < threshold, 0)


def draw(probabilities: Tensor, top_p: float, uniform: Tensor) -> Tensor:
    """Draw a token of each row, among those that ``keep_top_p`` keeps.

    A token drawn among all is one of them exactly if those more likely than it have less than
    probability ``top_p`` together: what is drawn otherwise is thrown away. Only where all attempts
    were, the kept ones have to be found, by a sort that takes longer than all the rest. The same
    numbers give the same tokens on every device, and none waits for another. A row of nan gives an
    id that no token has, the size of the vocabulary.

    The rows of [B, vocab] sum to 1, top_p is above 0 and up to 1, ``uniform`` is float64
    [B, ATTEMPTS + 1] from 0 to below 1; returns int64 [B].
    """
    on_cpu = probabilities.device.type == "cpu"
    return (_drawn_in_turn if on_cpu else _drawn_at_once)(probabilities, top_p, uniform)


def _inverted(weights: Tensor, shares: Tensor) -> Tensor:
    """Where the running sums of [B, vocab] weights exceed [B, n] shares of the whole sums."""
    running = weights.cumsum(dim=-1, dtype=torch.float64)
    whole = running.narrow(1, weights.shape[1] - 1, 1)
    return torch.searchsorted(running, shares * whole, right=True)


def _drawn_in_turn(probabilities: Tensor, top_p: float, uniform: Tensor) -> Tensor:
    """``draw`` row by row, by numpy, whose operators start in less time; no draw without need."""
    running = probabilities.cumsum(dim=-1, dtype=torch.float64).numpy()
    rows = zip(probabilities.numpy(), running, uniform.numpy(), strict=True)
    return torch.tensor([_drawn(*row, top_p) for row in rows])


def _drawn(values: FloatArray, running: FloatArray, shares: FloatArray, top_p: float) -> int:
    """Of one row the first token drawn that is kept, or one by a last draw."""
    whole = running[-1]
    for share in shares[:ATTEMPTS]:
        token = int(running.searchsorted(share * whole, side="right"))
        # token == len(values): sums of nan
        if top_p == 1 or token == len(values) or values @ (values > values[token]) < top_p:
            return token
    kept = keep_top_p(torch.from_numpy(values[None]), top_p)
    return int(_inverted(kept, torch.from_numpy(shares[None, ATTEMPTS:])).item())


def _drawn_at_once(probabilities: Tensor, top_p: float, uniform: Tensor) -> Tensor:
    """``draw`` without a look at a value, which a device would have to wait for."""
    drawn = _inverted(probabilities, uniform[:, :ATTEMPTS])
    if top_p == 1:
        return drawn[:, 0]
    most = probabilities.shape[1] - 1
    every, own = probabilities[:, None], probabilities.gather(1, drawn.clamp(max=most))[..., None]
    kept = torch.where(every > own, every, 0).sum(-1) < top_p  # [B, ATTEMPTS]
    tokens = _inverted(keep_top_p(probabilities, top_p), uniform[:, ATTEMPTS:])[:, 0]
    for attempt in reversed(range(ATTEMPTS)):
        tokens = torch.where(kept[:, attempt], drawn[:, attempt], tokens)
    return tokens


class Sampler:
    """Draws the next token of every row of a batch.

    A draw inverts the distribution function at uniform numbers. The numbers come from generators,
    one per row, on the CPU, so the same seed gives the same text on every device that computes the
    same logits, and drawing never waits for a device. The tokens of the prompts [B, T] count as
    repeated.
    """

    def __init__(self, sampling: Sampling, prompt_ids: Tensor) -> None:
        self.sampling = sampling
        self.temperature = max(sampling.temperature, LOWEST_TEMPERATURE)
        self.prompt_ids = prompt_ids
        self.seen: Tensor | None = None  # bool [B, vocab], for the repetition penalty
        self.uniform = _uniform(sampling.seed, len(prompt_ids))

    def __call__(self, logits: Tensor) -> Tensor:
        """Choose one token per row, [B], given the logits of the last position, [B, vocab].

        Where they are no numbers (nan, an infinity in place of the largest) the choice is an id
        that no token has, the size of the vocabulary.
        """
        logits = logits.detach()
        penalty = self.sampling.repetition_penalty
        if penalty != 1.0:
            if self.seen is None:
                self.seen = torch.zeros_like(logits, dtype=torch.bool)
                self.seen.scatter_(1, self.prompt_ids, True)
            punished = torch.where(logits < 0, logits * penalty, logits / penalty)
            logits = torch.where(self.seen, punished, logits)
        tokens = self._most_likely(logits) if self.sampling.greedy else self._draw(logits)
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None].clamp(max=logits.shape[1] - 1), True)
        return tokens

    @staticmethod
    def _most_likely(logits: Tensor) -> Tensor:
        tokens = logits.argmax(dim=-1)  # nan counts as the largest
        largest = logits.gather(1, tokens[:, None])[:, 0]
        return torch.where(largest.isfinite(), tokens, logits.shape[1])

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
        uniform = next(self.uniform).to(scores.device)
        return draw(scores.softmax(dim=-1), self.sampling.top_p, uniform).to(device)


def _uniform(seed: int, rows: int) -> Iterator[Tensor]:
    """The numbers of each row for token after token, float64 [B, ATTEMPTS + 1]."""
    generators = [torch.Generator().manual_seed((seed + row) % MAX_SEED) for row in range(rows)]
    shape = (DRAWN_AT_ONCE, ATTEMPTS + 1)
    while True:
        draws = [torch.rand(shape, dtype=torch.float64, generator=own) for own in generators]
        yield from torch.stack(draws, dim=1)
