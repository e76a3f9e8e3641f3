"""The decode path as small verbs, and the one loop made of them.

``prefill`` reads a prompt in pieces, ``decode_one`` feeds one token per row and ``make_step`` does
so faster, a ``Sampler`` chooses the next one, ``generate`` is the loop for one prompt and for a
batch, whatever the mixer.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import EosTokenCriteria, StoppingCriteria, StoppingCriteriaList

from retnet.generation.sampling import Sampler, Sampling
from retnet.machine import set_up_compiler
from retnet.model.cache import DecoderCache
from retnet.model.decoder import DecoderForCausalLM
from retnet.model.fast_decode.graph import StepGraph
from retnet.model.fast_decode.step import make_decode_step

PREFILL_CHUNK = 1024  # tokens in one forward pass of a prompt; bounds the memory of long prompts
STOPPING_WINDOW = 64  # new tokens that stopping criteria see; more where a stop string is longer
ENDED = -1  # stands for the tokens of a row that has ended while others go on


@dataclass
class Usage:
    """What a generation took; filled in by ``generate``.

    Attributes:
        prompt_tokens: Tokens of one prompt.
        prefill_seconds: Time to read the prompts.
        steps: Tokens made one after the other.
        new_tokens: Tokens made, summed over the rows.
        decode_seconds: Time to make them, without the time their reader took.
        rows: Continuations made side by side.
        state_bytes: Size of the state (or of the used part of the key-value cache) at the end.
        path: Which step made the tokens, and why not the fast one.
    """

    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    steps: int = 0
    new_tokens: int = 0
    decode_seconds: float = 0.0
    rows: int = 0
    state_bytes: int = 0
    path: str = ""

    @property
    def prompt_tokens_per_second(self) -> float:
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def ms_per_token(self) -> float:
        return 1000 * self.decode_seconds / self.steps if self.steps else 0.0

    def summary(self) -> str:
        """One line for people."""
        together = f" ({self.rows} samples at once)" if self.rows > 1 else ""
        return (
            f"prompt: {self.prompt_tokens:,} tokens, {self.prompt_tokens_per_second:,.0f} tokens/s "
            f"| new: {self.new_tokens:,} tokens, {self.ms_per_token:.2f} ms/token{together} "
            f"| state: {self.state_bytes:,} bytes | {self.path}"
        )


def synchronize(device: torch.device) -> None:
    """Wait for the device's queued work, so that the clock measures it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def prefill(
    model: DecoderForCausalLM,
    input_ids: Tensor,
    cache: DecoderCache,
    *,
    chunk_size: int = PREFILL_CHUNK,
) -> Tensor:
    """Read tokens into the cache, ``chunk_size`` at a time.

    Args:
        model: A language model.
        input_ids: [B, T] with T >= 1.
        cache: Updated in place.
        chunk_size: Tokens per forward pass; the result does not depend on it.

    Returns:
        The logits of the last position, [B, vocab], at least float32.
    """
    for piece in input_ids.split(chunk_size, dim=1):
        logits = _last_logits(model, piece, cache)
    return logits


@torch.inference_mode()
def decode_one(model: DecoderForCausalLM, tokens: Tensor, cache: DecoderCache) -> Tensor:
    """Feed one token per row.

    Args:
        model: A language model.
        tokens: [B].
        cache: Updated in place.

    Returns:
        The logits that follow, [B, vocab], at least float32.
    """
    return _last_logits(model, tokens[:, None], cache)


class Step:
    """The fastest right way to feed one token per row: tokens [B] and the cache in, logits out.

    What ``decode_one`` does, without the model. Models with wrapped, hooked or adapted parts, and
    caches that need a mask, take the plain way.

    Attributes:
        path: Which way was taken last, and why if not the fast one.

    Args:
        model: A language model.
        compile: Compile the step, at its first call; the growing number of tokens seen compiles
            nothing anew. A step with a state of constant size becomes one CUDA graph on a GPU.
    """

    def __init__(self, model: DecoderForCausalLM, *, compile: bool) -> None:
        self.model: Any = model
        self.lean, reason = make_decode_step(model)
        self.fast: Callable[[Tensor, DecoderCache], Tensor] | None = self.lean
        compiled = ", compiled" if compile else ""
        if self.lean is None:
            self.model = torch.compile(model, dynamic=True, fullgraph=True) if compile else model
            self.path = f"plain step{compiled}: {reason}"
            return
        self.path = self.fast_path = f"fast step{compiled}"
        if compile:
            self.fast = self.lean.compile()
            if model.device.type == "cuda" and not self.lean.grows:
                self.fast = StepGraph(self.lean)

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, cache: DecoderCache) -> Tensor:
        if self.lean is None or self.fast is None:
            return decode_one(self.model, tokens, cache)
        if not self.lean.fits(cache):
            self.path = "plain step: the cache needs a mask, or is empty"
            return decode_one(self.model, tokens, cache)
        self.path = self.fast_path
        return _widened(self.fast(tokens, cache))


def make_step(model: DecoderForCausalLM, *, compile: bool = False) -> Step:
    """A ``Step`` of the model.

    Raises:
        UserError: There is no C++ compiler to compile it with.
    """
    if compile:
        set_up_compiler(model.device, "--compile")
    return Step(model, compile=compile)


def _last_logits(model: DecoderForCausalLM, input_ids: Tensor, cache: DecoderCache) -> Tensor:
    output = model(input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return _widened(output.logits[:, -1])


def _widened(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


@torch.inference_mode()
def generate(
    model: DecoderForCausalLM,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    num_samples: int = 1,
    stopping: Sequence[StoppingCriteria] = (),
    usage: Usage | None = None,
    compile: bool = False,
) -> Iterator[list[int]]:
    """Continue prompts of equal length, one token of every row at a time.

    The prompts are read once; with several samples their state is then repeated.

    Args:
        model: A language model in evaluation mode.
        input_ids: The prompts, [P, T] with T >= 1.
        max_new_tokens: The most tokens of a row.
        sampling: How to choose; the defaults of ``Sampling`` when None.
        num_samples: Continuations of each prompt; those of one prompt are neighbours, B = P * n.
        stopping: A row ends with the token at which one of them says so. They see new tokens only,
            and of these the last ``STOPPING_WINDOW``, [B, n].
        usage: Filled in while the loop runs.
        compile: Compile the decode step (``torch.compile``, some 20 s on a CPU): pays for thousands
            of tokens.

    Yields:
        The new token of each row, B of them, ``ENDED`` for a row that has ended.
    """
    usage = Usage() if usage is None else usage
    device, length = input_ids.device, input_ids.shape[1]
    started = time.perf_counter()
    cache = model.new_cache(max_length=length + max_new_tokens)
    step = make_step(model, compile=compile)
    logits = prefill(model, input_ids, cache)
    synchronize(device)
    usage.prompt_tokens, usage.prefill_seconds = length, time.perf_counter() - started
    if num_samples > 1:
        cache.batch_repeat_interleave(num_samples)
        logits = logits.repeat_interleave(num_samples, dim=0)

    rows = usage.rows = len(logits)
    prompts = input_ids.repeat_interleave(num_samples, dim=0)
    sampler = Sampler(Sampling() if sampling is None else sampling, prompts)
    ends = _Ends(stopping, rows, device)
    ended = [False] * rows
    tokens: Tensor | None = None
    try:
        for _ in range(max_new_tokens):
            started = time.perf_counter()
            if tokens is not None:
                logits = step(tokens, cache)
            tokens = sampler(logits)
            chosen = tokens.tolist()  # the only wait for a device
            new_tokens = [ENDED if e else token for e, token in zip(ended, chosen, strict=True)]
            ended = [e or end for e, end in zip(ended, ends(tokens, chosen, logits), strict=True)]
            usage.steps += 1
            usage.new_tokens += rows - new_tokens.count(ENDED)
            usage.decode_seconds += time.perf_counter() - started
            yield new_tokens
            if all(ended):
                return
    finally:
        usage.state_bytes, usage.path = cache.num_bytes(), step.path


class _Ends:
    """Which rows end with the token just made.

    End-of-text tokens are looked up; other criteria see the newest tokens, so many that a stop
    string fits, and never more, however long the text becomes.
    """

    def __init__(self, stopping: Sequence[StoppingCriteria], rows: int, device: torch.device):
        self.final_tokens: set[int] = set()
        others = []
        for one in stopping:
            if type(one) is EosTokenCriteria:
                self.final_tokens.update(one.eos_token_id.tolist())
            else:
                others.append(one)
        self.others = StoppingCriteriaList(others)
        longest = max((getattr(one, "maximum_token_len", 0) for one in others), default=0)
        self.window = max(STOPPING_WINDOW, longest)
        self.recent = torch.empty(rows, 2 * self.window, dtype=torch.int64, device=device)
        self.filled = 0

    def __call__(self, tokens: Tensor, chosen: list[int], logits: Tensor) -> list[bool]:
        """For each row, given its new token as tensor [B] and as list, and the logits."""
        final = [token in self.final_tokens for token in chosen]
        if not self.others:
            return final
        if self.filled == self.recent.shape[1]:
            self.recent[:, : self.window] = self.recent[:, -self.window :].clone()
            self.filled = self.window
        self.recent[:, self.filled] = tokens
        self.filled += 1
        newest = self.recent[:, max(0, self.filled - self.window) : self.filled]
        return [a or b for a, b in zip(final, self.others(newest, logits).tolist(), strict=True)]
