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
        self._keeps_some = "logits_to_keep" in parameters
        own = inner.config.get_text_config()
        self.vocab_size = int(own.vocab_size)
        positions = getattr(own, "max_position_embeddings", None)
        trained = positions if isinstance(positions, int) and positions > 0 else None
        self._half = max(1, min(TRIED, trained or TRIED) // 2)
        try:
            self._check_causal()
            sizes = [self._memory_after(tokens) for tokens in (self._half, 2 * self._half)]
        except UserError:
            raise
        except Exception as error:  # each architecture fails in a way of its own
            if is_out_of_memory(error):
                raise
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise UserError(f"its {type(inner).__name__} fails on a text ({reason})") from error
        short, long = sizes
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
        """The model's own output; ``return_logits`` has no say, its loss is computed its way."""
        options: dict[str, Any] = {"use_cache": use_cache}
        if self._keeps_some and logits_to_keep:
            options["logits_to_keep"] = logits_to_keep
        if labels is not None:
            options["labels"] = labels
        if past_key_values is not None and past_key_values.held is not None:
            options[str(self._memory)] = past_key_values.held
        output = self.inner(input_ids, return_dict=True, **options)
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
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return False
        return self._same(torch.cat(found, dim=1), self(ids).logits[:, half:])

    @torch.inference_mode()
    def _check_causal(self) -> None:
        ids, half = self._some_tokens(1), self._half
        other = ids.clone()
        other[:, half:] = (other[:, half:] + 1) % self.vocab_size
        if not self._same(self(ids).logits[:, :half], self(other).logits[:, :half]):
            raise UserError(
                f"its {type(self.inner).__name__} is no causal language model, later tokens change "
                "what it says of earlier ones"
            )

    @torch.inference_mode()
    def _memory_after(self, tokens: int) -> int:
        memory = self.new_cache()
        self(self._some_tokens(1)[:, :tokens], past_key_values=memory, use_cache=True)
        return memory.num_bytes()

    def _some_tokens(self, rows: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(self.vocab_size, (rows, 2 * self._half), generator=generator)
        return ids.to(self.device)

    def _same(self, one: Tensor, other: Tensor) -> bool:
        """Up to rounding; logits that are no numbers are found where they are scored."""
        one, other = one.double(), other.double()
        if not (one.isfinite().all() and other.isfinite().all()):
            return True
        rounding = 1e-4 if self.dtype in (torch.float32, torch.float64) else 3e-2
        return bool((one - other).abs().max() <= rounding * max(float(one.std()), 1e-30))


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
