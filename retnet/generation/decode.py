"""The decode path as small verbs, and the one loop made of them.

``prefill`` reads a prompt in pieces, ``decode_one`` feeds one token per row and ``make_step`` does
so faster, a ``Sampler`` chooses the next one, ``generate`` is the loop for one prompt and for a
batch, whatever the mixer.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from retnet.errors import UserError
from retnet.generation.sampling import Sampler, Sampling
from retnet.machine import set_up_compiler, steps_folder
from retnet.model.cache import DecoderCache
from retnet.model.causal_lm import DecoderForCausalLM
from retnet.model.fast_decode.graph import StepGraph
from retnet.model.fast_decode.step import make_decode_step

PREFILL_CHUNK = 1024  # tokens in one forward pass of a prompt; bounds the memory of long prompts
ENDED = -1  # stands for the tokens of a row that has ended while others go on


class NotFiniteError(UserError):
    """A model's logits are no numbers any more, after so many tokens of each row."""

    def __init__(self, tokens: int) -> None:
        super().__init__(
            f"the model gives logits that are not finite after {tokens:,} new tokens: its weights "
            "are damaged, of a run that diverged, or too large for --dtype, so take other ones"
        )


@dataclass
class Usage:
    """What a generation took; filled in by ``generate``."""

    prompt_tokens: int = 0  # of one prompt
    prefill_seconds: float = 0.0
    steps: int = 0  # tokens made one after the other
    new_tokens: int = 0  # summed over the rows
    decode_seconds: float = 0.0  # without the time that the tokens' reader took
    rows: int = 0  # continuations made side by side
    state_bytes: int = 0  # at the end; of a key-value cache, its used part
    path: str = ""  # which step made the tokens, and why not the fast one
    answers: int = 0  # of a conversation, whose sum this is

    @property
    def prompt_tokens_per_second(self) -> float:
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def ms_per_token(self) -> float:
        return 1000 * self.decode_seconds / self.steps if self.steps else 0.0

    def add(self, answer: "Usage") -> None:
        """Count one more answer of a conversation."""
        self.answers += 1
        for name in ("prompt_tokens", "prefill_seconds", "steps", "new_tokens", "decode_seconds"):
            setattr(self, name, getattr(self, name) + getattr(answer, name))
        self.rows, self.state_bytes, self.path = answer.rows, answer.state_bytes, answer.path

    def summary(self) -> str:
        """One line for people."""
        prompt = f"messages: {self.answers:,} of" if self.answers else "prompt:"
        together = f" ({self.rows} samples at once)" if self.rows > 1 else ""
        read = f"{self.prompt_tokens:,} tokens, {self.prompt_tokens_per_second:,.0f} tokens/s"
        return (
            f"{prompt} {read} "
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
    """Read tokens, [B, T] with T >= 1, into the cache; the result does not depend on chunk_size.

    Returns the logits of the last position, [B, vocab], at least float32.
    """
    for piece in input_ids.split(chunk_size, dim=1):
        logits = _last_logits(model, piece, cache)
    return logits


@torch.inference_mode()
def decode_one(model: DecoderForCausalLM, tokens: Tensor, cache: DecoderCache) -> Tensor:
    """Feed one token per row, [B], into the cache; the logits that follow as of ``prefill``."""
    return _last_logits(model, tokens[:, None], cache)


class Step:
    """The fastest right way to feed one token per row: tokens [B] and the cache in, logits out.

    What ``decode_one`` does, without the model. Models with wrapped, hooked or adapted parts, and
    caches that need a mask, take the plain way; ``path`` says which was taken last, and why if not
    the fast one. It is compiled at the first call; the growing number of tokens seen compiles
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
        if compile:
            self.fast = self.lean.compile(steps_folder())
        graph = model.device.type == "cuda" and not self.lean.grows
        if graph:
            self.fast = StepGraph(self.lean)
        graph_said = ", CUDA graph" if graph else ""
        weights = f", {self.lean.weights} weights" if self.lean.weights else ""
        plain = f" by plain products: {self.lean.problem}" if self.lean.problem else ""
        self.path = self.fast_path = f"fast step{compiled}{graph_said}{weights}{plain}"

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, cache: DecoderCache) -> Tensor:
        if self.lean is None or self.fast is None:
            return decode_one(self.model, tokens, cache)
        if reason := self.lean.obstacle(cache):
            self.path = f"plain step: {reason}"
            return decode_one(self.model, tokens, cache)
        self.path = self.fast_path
        return _widened(self.fast(tokens, cache))


@dataclass
class Memory:
    """What a conversation goes on from: the state of one row, and what made it."""

    cache: DecoderCache
    step: Step
    ids: list[int]  # all tokens that were read into the cache


def make_step(model: DecoderForCausalLM, *, compile: bool = False) -> Step:
    """A ``Step``; a ``UserError`` where there is no C++ compiler to compile it with."""
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
    ends: Callable[[int, int], bool] = lambda row, token: False,
    usage: Usage | None = None,
    compile: bool = False,
    memory: Memory | None = None,
) -> Iterator[list[int]]:
    """Continue prompts of equal length, one token of every row at a time.

    The prompts are read once; with several samples their state is then repeated.

    Args:
        model: In evaluation mode.
        input_ids: The prompts, [P, T] with T >= 1.
        max_new_tokens: The most tokens of a row.
        sampling: How to choose; the defaults of ``Sampling`` when None.
        num_samples: Continuations of each prompt; those of one prompt are neighbours, B = P * n.
        ends: Whether a row ends with a token; asked with the row's number and its new token after
            the tokens were handed out, so it may look at what was made of them.
        usage: Filled in while the loop runs.
        compile: Compile the decode step (some 20 s on a CPU, kept for later processes where the
            state is of constant size): pays for thousands of tokens.
        memory: What came before a prompt of one row, and goes on with it: the tokens that are read
            here are appended. The last token that was made is not among them.

    Yields:
        The new token of each row, B of them, ``ENDED`` for a row that has ended.

    Raises:
        NotFiniteError: The logits of a row that has not ended are no numbers.
    """
    usage = Usage() if usage is None else usage
    device, length = input_ids.device, input_ids.shape[1]
    started = time.perf_counter()
    read = input_ids
    if memory is None:
        cache = model.new_cache(max_length=length + max_new_tokens)
        step = make_step(model, compile=compile)
    else:
        cache, step = memory.cache, memory.step
        memory.ids += input_ids[0].tolist()
        read = torch.tensor([memory.ids], device=device)
    logits = prefill(model, input_ids, cache)
    synchronize(device)
    usage.prompt_tokens, usage.prefill_seconds = length, time.perf_counter() - started
    if num_samples > 1:
        cache.batch_repeat_interleave(num_samples)
        logits = logits.repeat_interleave(num_samples, dim=0)

    rows = usage.rows = len(logits)
    sampler = Sampler(sampling or Sampling(), read.repeat_interleave(num_samples, dim=0))
    ended, vocab_size = [False] * rows, logits.shape[1]
    tokens: Tensor | None = None
    chosen: list[int] = []
    try:
        for _ in range(max_new_tokens):
            started = time.perf_counter()
            if tokens is not None:
                logits = step(tokens, cache)
                if memory is not None:
                    memory.ids.append(chosen[0])
            tokens = sampler(logits)
            chosen = tokens.tolist()  # the only wait for a device
            if max(chosen) >= vocab_size:  # what the sampler says of logits that are no numbers
                if any(t >= vocab_size and not e for e, t in zip(ended, chosen, strict=True)):
                    raise NotFiniteError(usage.steps)
                tokens = tokens.clamp(max=vocab_size - 1)
            new_tokens = [ENDED if e else token for e, token in zip(ended, chosen, strict=True)]
            usage.steps += 1
            usage.new_tokens += rows - new_tokens.count(ENDED)
            usage.decode_seconds += time.perf_counter() - started
            yield new_tokens
            ended = [token == ENDED or ends(row, token) for row, token in enumerate(new_tokens)]
            if all(ended):
                return
    finally:
        usage.state_bytes, usage.path = cache.num_bytes(), step.path
