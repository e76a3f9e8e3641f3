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

from retnet.errors import UserError
from retnet.evaluation.foreign import check_fits, decodes, read_prompt
from retnet.generation import Step, make_step
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
        medians. Where one ran more often than the other, those rounds are the first.
        """
        pairs = zip(self.seconds, other.seconds, strict=False)
        return float(np.median([own / theirs for own, theirs in pairs]))


@dataclass(frozen=True)
class DecodeSpeed:
    """Decoding after a context of a given length; None where it is not defined, or was stopped."""

    context: int  # tokens in the cache of each row when the clock starts
    ms_per_token: float | None = None  # median over the rounds
    ms_low: float | None = None  # first quartile
    ms_high: float | None = None  # third quartile
    cache_bytes: int | None = None  # of the state, or of the used part of the key-value cache
    prefill_s: float | None = None  # seconds in which the context was read, once
    rows: int = 1
    peak_bytes: int | None = None  # of reading it and making tokens; None where not measured
    stopped: bool = False  # whether it would have taken too long, or not fit in memory

    @property
    def tokens_per_second(self) -> float | None:
        """Of all rows together."""
        return None if self.ms_per_token is None else 1000 * self.rows / self.ms_per_token

    @property
    def prefill_tokens_per_second(self) -> float | None:
        """Of all rows together."""
        return None if self.prefill_s is None else self.rows * self.context / self.prefill_s


def interleaved(
    prepares: Sequence[Callable[[], Callable[[], object]]],
    device: torch.device,
    *,
    rounds: int | Sequence[int] = ROUNDS,
    warmup: int = 1,
) -> list[Timing]:
    """Time several pieces of work in turn, ``rounds`` times after ``warmup`` rounds.

    No garbage is collected meanwhile. Each piece may have a number of rounds of its own, after
    which the others go on without it.

    Args:
        prepares: For each piece a function that returns the function to time; preparing is not
            timed.
        device: Its queue is emptied before the clock is read.
    """
    counts = [rounds] * len(prepares) if isinstance(rounds, int) else rounds
    seconds: list[list[float]] = [[] for _ in prepares]
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for number in range(warmup + max(counts, default=0)):
            for own, prepare, count in zip(seconds, prepares, counts, strict=True):
                if number >= warmup + count:
                    continue
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
    rows: int = 1,
    tokens: int = TOKENS_PER_ROUND,
    rounds: int = ROUNDS,
    limit_s: float | None = None,
    of_one_row: Sequence[Sequence[DecodeSpeed]] | None = None,
    progress: str | None = None,
) -> list[list[DecodeSpeed]]:
    """Milliseconds per token and bytes of memory after contexts of given lengths.

    The contexts are read by prefill into real caches. Every round starts from a copy of that
    cache and feeds ``tokens`` tokens, each the most likely one after the last. The models are on
    one device and in evaluation mode; ``progress`` is the title of a progress bar on a terminal.
    With ``limit_s`` a model is stopped at the first context that would take longer to read, if
    the time grew with its square, or whose memory the machine does not have. ``of_one_row``, the
    results of one row after the same contexts, tells instead how long several take to read.

    Returns:
        For each model its results in the order of ``contexts``.
    """
    results: list[list[DecodeSpeed]] = [[] for _ in models]
    for model in models if limit_s is not None else ():
        if _is_defined(model, min(contexts) + tokens, rows):
            read_context(model, min(contexts), rows, tokens)  # the first time is slower
    bar = tqdm(contexts, desc=progress, leave=False, disable=True if progress is None else None)
    for number, context in enumerate(bar):
        measured = []
        for i, model in enumerate(models):
            defined = _is_defined(model, context + tokens, rows)
            alone = of_one_row[i][number] if of_one_row else None
            stopped = defined and limit_s is not None and (
                _too_long(results[i], context, rows, limit_s, alone)
                or _too_large(model, context + tokens, rows)
            )  # fmt: skip
            measured += [i] if defined and not stopped else []
            results[i].append(DecodeSpeed(context, rows=rows, stopped=stopped))
        read = [read_context(models[i], context, rows, tokens) for i in measured]
        prepares = [
            decoding(models[i], cache, rows, tokens)
            for i, (cache, _) in zip(measured, read, strict=True)
        ]
        timings = interleaved(prepares, models[0].device, rounds=rounds)
        for i, (cache, seconds), timing in zip(measured, read, timings, strict=True):
            ms = 1000 / tokens
            spread = (ms * timing.median, ms * timing.low, ms * timing.high)
            results[i][-1] = DecodeSpeed(context, *spread, cache.num_bytes(), seconds, rows)
    return results


def _too_long(
    before: Sequence[DecodeSpeed],
    context: int,
    rows: int,
    limit_s: float,
    alone: DecodeSpeed | None,
) -> bool:
    """Whether it was stopped before, or as one row, or reading would take longer now."""
    if alone is not None and alone.stopped:
        return True
    if alone is not None and alone.prefill_s is not None:
        return rows * alone.prefill_s > limit_s
    if not before or before[-1].stopped:
        return bool(before)
    last = before[-1]
    return last.prefill_s is not None and (context / last.context) ** 2 * last.prefill_s > limit_s


def _too_large(model: DecoderForCausalLM, tokens: int, rows: int) -> bool:
    """Whether its memory would not fit, the copy of it included."""
    try:
        check_fits(model, 2 * tokens, rows, "")
    except UserError:
        return True
    return False


def _is_defined(model: DecoderForCausalLM, tokens: int, rows: int) -> bool:
    """Whether the model makes tokens one by one, of so many rows, in texts of that length."""
    longest = model.config.longest
    return (longest is None or tokens <= longest) and decodes(model, rows)


def read_context(
    model: DecoderForCausalLM, context: int, rows: int, tokens: int
) -> tuple[DecoderCache, float]:
    """A cache that has read so many random tokens, and the seconds that took."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (rows, context), generator=generator)
    ids = ids.to(model.device)
    cache = model.new_cache(max_length=context + tokens)
    synchronize(model.device)
    started = time.perf_counter()
    read_prompt(model, ids, cache)
    synchronize(model.device)
    return cache, time.perf_counter() - started


def decoding(
    model: DecoderForCausalLM, cache: DecoderCache, rows: int, tokens: int
) -> Callable[[], Callable[[], object]]:
    """For ``interleaved``: each time so many tokens, the likeliest ones, from a copy of a cache."""
    step = make_step(model)

    def prepare() -> Callable[[], object]:
        own = copy.deepcopy(cache)
        start = torch.zeros(rows, dtype=torch.int64, device=model.device)
        return lambda: _decode(step, own, start, tokens)

    return prepare


def generating(model: DecoderForCausalLM, context: int) -> Callable[[], object]:
    """For ``peak_of``: reading a prompt of one row, and making as many tokens as in a round."""
    step = make_step(model)

    def work() -> None:
        cache, _ = read_context(model, context, 1, TOKENS_PER_ROUND)
        start = torch.zeros(1, dtype=torch.int64, device=model.device)
        _decode(step, cache, start, TOKENS_PER_ROUND)

    return work


@torch.inference_mode()
def _decode(step: Step, cache: DecoderCache, token: Tensor, tokens: int) -> None:
    for _ in range(tokens):
        token = step(token, cache).argmax(dim=-1)
