"""Causal language models of transformers' own, to be measured by the same code as ours.

``ForeignModel`` answers what scoring, the clock and the report ask of a ``DecoderForCausalLM``;
what the model itself cannot do is found out by trying, not by its name.
"""

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from retnet.errors import UserError, is_out_of_memory
from retnet.generation import check_text_fits, prefill
from retnet.generation.checks import DRAWING_BYTES
from retnet.machine import memory_of

# What a model's memory is called, as an argument and in its output, the newest name first
MEMORIES = ("cache", "past_key_values", "cache_params", "state")
TRIED = 16  # tokens of a text on which a model is tried, if it takes so many
ID_BYTES = 8
MOST_OF_A_REASON = 200  # characters of what a library says


@dataclass(frozen=True)
class ForeignKind:
    """Stands where our models have their mixer's class."""

    name: str  # of the architecture: "llama"

    def windows(self, config: Any) -> list[float]:
        """Decay windows of its heads: none that are known here."""
        return []


@dataclass(frozen=True)
class ForeignConfig:
    """Of a model's own configuration what is asked for here.

    Attributes:
        max_position_embeddings: Tokens of its training texts; None where it does not say.
        longest: Tokens of a text for which it is defined; None where it has a state of constant
            size, or does not say.
    """

    mixer_class: ForeignKind
    vocab_size: int
    max_position_embeddings: int | None
    longest: int | None


class ForeignMemory:
    """What a model wants back at its next call, whatever that is; None before the first."""

    def __init__(self, held: Any = None) -> None:
        self.held = held

    def num_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in _tensors(self.held))

    @torch.inference_mode()
    def __deepcopy__(self, memo: dict[int, Any]) -> "ForeignMemory":
        return ForeignMemory(copy.deepcopy(self.held, memo))


class ForeignModel(nn.Module):
    """A model of transformers' own behind the calls of ours.

    Prompts go through it in one pass, as transformers' ``generate`` has it: the memory of some
    architectures (Mamba) is right for single tokens only.

    Raises:
        UserError: It fails on a text, or later tokens change what it says of earlier ones.
    """

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        parameters = inspect.signature(inner.forward).parameters
        self._memory = next((name for name in MEMORIES if name in parameters), None)
        anything = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
        self._keeps_some = "logits_to_keep" in parameters
        self._options = {"use_cache", "return_dict"} if anything else set(parameters)
        own = inner.config.get_text_config()
        self.vocab_size = getattr(own, "vocab_size", 0)
        if not isinstance(self.vocab_size, int) or self.vocab_size < 2:
            raise UserError(f"its vocab_size ({self.vocab_size}) is none of a language model")
        positions = getattr(own, "max_position_embeddings", None)
        trained = positions if isinstance(positions, int) and positions > 0 else None
        self._half = max(1, min(TRIED, trained or TRIED) // 2)
        self._check_causal()
        short, long = (self._memory_after(tokens) for tokens in (self._half, 2 * self._half))
        self.bytes_per_token = (long - short) // self._half
        self.state_bytes = short - self._half * self.bytes_per_token
        constant = bool(short) and not self.bytes_per_token
        kind = ForeignKind(str(inner.config.model_type))
        self.config = ForeignConfig(kind, self.vocab_size, trained, None if constant else trained)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.inner.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.inner.dtype
        return dtype

    def num_parameters(self) -> int:
        number: int = self.inner.num_parameters()
        return number

    def new_cache(self, max_length: int | None = None) -> ForeignMemory:
        return ForeignMemory()

    def forward(
        self,
        input_ids: Tensor,
        *,
        past_key_values: ForeignMemory | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
        labels: Tensor | None = None,
        return_logits: bool = True,
    ) -> Any:
        """The model's own output; ``return_logits`` has no say, its loss is computed its way.

        A ``UserError`` where it fails, on more tokens than it has positions for, say.
        """
        options: dict[str, Any] = {"use_cache": use_cache, "return_dict": True}
        options = {name: value for name, value in options.items() if name in self._options}
        if self._keeps_some and logits_to_keep:
            options["logits_to_keep"] = logits_to_keep
        if labels is not None:
            options["labels"] = labels
        if past_key_values is not None and past_key_values.held is not None:
            options[str(self._memory)] = past_key_values.held
        try:
            output = self.inner(input_ids, **options)
        except Exception as error:  # each architecture fails in a way of its own
            if is_out_of_memory(error):
                raise
            rows, tokens = input_ids.shape
            kind, reason = type(self.inner).__name__, f"{type(error).__name__}: {error}"
            reason = " ".join(reason.split())[:MOST_OF_A_REASON]
            raise UserError(
                f"a {kind} fails on {rows} rows of {tokens} tokens ({reason}): "
                "take shorter windows (--context), or another model"
            ) from error
        if past_key_values is not None:
            past_key_values.held = next((output[k] for k in MEMORIES if k in output), None)
        return output

    def decodes(self, rows: int) -> bool:
        """Whether single tokens with its memory continue so many rows as a whole text does."""
        return self._decodes_one if rows == 1 else self._decodes_several

    @cached_property
    def _decodes_one(self) -> bool:
        return self._continues(1)

    @cached_property
    def _decodes_several(self) -> bool:
        return self._continues(2)

    @torch.inference_mode()
    def _continues(self, rows: int) -> bool:
        if self._memory is None:
            return False
        ids, half = self._some_tokens(rows), self._half
        memory = self.new_cache()
        try:
            self(ids[:, :half], past_key_values=memory, use_cache=True)
            pieces = ids[:, half:].split(1, dim=1)
            found = [self(one, past_key_values=memory, use_cache=True).logits for one in pieces]
        except UserError:
            return False
        narrow = self.dtype in (torch.bfloat16, torch.float16)
        return _same(torch.cat(found, dim=1), self(ids).logits[:, half:], 0.1 if narrow else 0.01)

    @torch.inference_mode()
    def _check_causal(self) -> None:
        ids, half = self._some_tokens(1), self._half
        other = ids.clone()
        other[:, half:] = (other[:, half:] + 1) % self.vocab_size
        if not _same(self(ids).logits[:, :half], self(other).logits[:, :half], 1e-4):
            raise UserError(
                f"its {type(self.inner).__name__} is no causal language model, later tokens change "
                "what it says of earlier ones"
            )

    @torch.inference_mode()
    def _memory_after(self, tokens: int) -> int:
        """Bytes; 0 where it has no memory, or none that works: it can be scored all the same."""
        memory = self.new_cache()
        try:
            self(self._some_tokens(1)[:, :tokens], past_key_values=memory, use_cache=True)
        except UserError:
            return 0
        return memory.num_bytes()

    def _some_tokens(self, rows: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(self.vocab_size, (rows, 2 * self._half), generator=generator)
        return ids.to(self.device)


def _same(one: Tensor, other: Tensor, rounding: float) -> bool:
    """Whether logits differ by less than a part of their spread, in the root of the mean square.

    Logits that are no numbers are found where they are scored.
    """
    if one.shape != other.shape:
        return False
    one, other = one.double(), other.double()
    if not (one.isfinite().all() and other.isfinite().all()):
        return True
    return bool((one - other).pow(2).mean().sqrt() <= rounding * other.std())


def _tensors(x: Any) -> Iterator[Tensor]:
    """Every tensor in a memory once: in lists, dictionaries, and attributes of objects."""
    seen: set[int] = set()
    left = [x]
    while left:
        x = left.pop()
        if id(x) in seen or isinstance(x, type | nn.Module):
            continue
        seen.add(id(x))
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, dict):
            left += x.values()
        elif isinstance(x, list | tuple):
            left += x
        elif hasattr(x, "__dict__"):
            left += vars(x).values()


def decodes(model: Any, rows: int) -> bool:
    """Whether a model makes tokens one by one with its memory; ours do."""
    return not isinstance(model, ForeignModel) or model.decodes(rows)


def read_prompt(model: Any, ids: Tensor, memory: Any) -> None:
    """Read a prompt into a memory, a foreign model in one pass."""
    if isinstance(model, ForeignModel):
        prefill(model, ids, memory, chunk_size=ids.shape[1])  # type: ignore[arg-type]
    else:
        prefill(model, ids, memory)


def check_fits(model: Any, tokens: int, rows: int, what: str) -> None:
    """``check_text_fits`` for any model."""
    if not isinstance(model, ForeignModel):
        check_text_fits(model, tokens, rows, what)
        return
    each = ID_BYTES + model.bytes_per_token
    row = DRAWING_BYTES * model.vocab_size + model.state_bytes
    memory, needed = memory_of(model.device), rows * (row + tokens * each)
    if memory is not None and needed > memory:
        raise UserError(
            f"{what} {needed:,} bytes, {each:,} a token, and {model.device} has {memory:,}: at "
            f"most {max(0, memory // rows - row) // each:,} tokens can fit"
        )


def runs_own_code(model: Any) -> bool:
    """Whether a model is of a class that lay beside its weights."""
    return type(getattr(model, "inner", model)).__module__.startswith("transformers_modules")
