"""Time and memory of decoding, models side by side.

All models are measured in one process in interleaved rounds (A B A B ...), so that a machine that
slows down slows down all of them; a round that is not counted warms up. The median of the rounds
is the result, the quartiles its spread.
"""

import copy
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from retnet.generation import Step, make_step, prefill
from retnet.generation.decode import synchronize
from retnet.model.cache import DecoderCache
from retnet.model.causal_lm import DecoderForCausalLM

CONTEXTS = (128, 4096)
ROUNDS = 7
TOKENS_PER_ROUND = 16


@dataclass(frozen=True)
class Timing:
    """Seconds of one call over the counted rounds."""

    median: float
    low: float  # first quartile
    high: float  # third quartile
    rounds: int
    seconds: tuple[float, ...] = ()  # of each round, in order

    def ratio(self, other: "Timing") -> float:
        """How often ``other`` fits into this, the median over the rounds they ran side by side.

        Both slow down together when the machine does, so this is steadier than the ratio of two
        medians.
        """
        pairs = zip(self.seconds, other.seconds, strict=True)
        return float(np.median([own / theirs for own, theirs in pairs]))


@dataclass(frozen=True)
class DecodeSpeed:
    """Decoding after a context of a given length, batch 1; None where it is not defined."""

    context: int  # tokens in the cache when the clock starts
    ms_per_token: float | None = None  # median over the rounds
    ms_low: float | None = None  # first quartile
    ms_high: float | None = None  # third quartile
    cache_bytes: int | None = None  # of the state, or of the used part of the key-value cache


def interleaved(
    prepares: Sequence[Callable[[], Callable[[], object]]],
    device: torch.device,
    *,
    rounds: int = ROUNDS,
    warmup: int = 1,
) -> list[Timing]:
    """Time several pieces of work in turn, ``rounds`` times after ``warmup`` rounds.

    No garbage is collected meanwhile.

    Args:
        prepares: For each piece a function that returns the function to time; preparing is not
            timed.
        device: Its queue is emptied before the clock is read.
    """
    seconds: list[list[float]] = [[] for _ in prepares]
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for number in range(warmup + rounds):
            for own, prepare in zip(seconds, prepares, strict=True):
                work = prepare()
                synchronize(device)
                started = time.perf_counter()
                work()
                synchronize(device)
                if number >= warmup:
                    own.append(time.perf_counter() - started)
    finally:
        if collecting:
            gc.enable()
    return [_timing(own) for own in seconds]


def _timing(seconds: list[float]) -> Timing:
    low, median, high = np.quantile(seconds, (0.25, 0.5, 0.75)).tolist()
    return Timing(median, low, high, len(seconds), tuple(seconds))


def decode_speed(
    models: Sequence[DecoderForCausalLM],
    contexts: Sequence[int] = CONTEXTS,
    *,
    tokens: int = TOKENS_PER_ROUND,
    rounds: int = ROUNDS,
    progress: str | None = None,
) -> list[list[DecodeSpeed]]:
    """Milliseconds per token and bytes of memory after contexts of given lengths.

    The contexts are read by prefill into real caches. Every round starts from a copy of that
    cache and feeds ``tokens`` tokens, each the most likely one after the last. The models are on
    one device and in evaluation mode; ``progress`` is the title of a progress bar on a terminal.

    Returns:
        For each model its results in the order of ``contexts``.
    """
    results: list[list[DecodeSpeed]] = [[] for _ in models]
    bar = tqdm(contexts, desc=progress, leave=False, disable=True if progress is None else None)
    for context in bar:
        measured = [i for i, model in enumerate(models) if _has_room(model, context + tokens)]
        caches = [_read_context(models[i], context, tokens) for i in measured]
        prepares = [
            _decoding(models[i], cache, tokens) for i, cache in zip(measured, caches, strict=True)
        ]
        timings = interleaved(prepares, models[0].device, rounds=rounds)
        for own in results:
            own.append(DecodeSpeed(context))
        for i, cache, timing in zip(measured, caches, timings, strict=True):
            ms = 1000 / tokens
            spread = (ms * timing.median, ms * timing.low, ms * timing.high)
            results[i][-1] = DecodeSpeed(context, *spread, cache_bytes=cache.num_bytes())
    return results


def _has_room(model: DecoderForCausalLM, tokens: int) -> bool:
    """Whether the model is defined for texts of so many tokens."""
    longest = model.config.longest
    return longest is None or tokens <= longest


def _read_context(model: DecoderForCausalLM, context: int, tokens: int) -> DecoderCache:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, context), generator=generator)
    cache = model.new_cache(max_length=context + tokens)
    prefill(model, ids.to(model.device), cache)
    return cache


def _decoding(
    model: DecoderForCausalLM, cache: DecoderCache, tokens: int
) -> Callable[[], Callable[[], object]]:
    step = make_step(model)

    def prepare() -> Callable[[], object]:
        own = copy.deepcopy(cache)
        start = torch.zeros(1, dtype=torch.int64, device=model.device)
        return lambda: _decode(step, own, start, tokens)

    return prepare


@torch.inference_mode()
def _decode(step: Step, cache: DecoderCache, token: Tensor, tokens: int) -> None:
    for _ in range(tokens):
        token = step(token, cache).argmax(dim=-1)
