"""Causal softmax attention with rotary positions, the mixer of the Transformer.

Over all of a document, or over a window (``attention_window``). Hybrids of other mixers have it in
some of their layers (``HybridOptions``).
"""

import copy
from contextlib import nullcontext
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cache import is_locked
from ..configuration import DecoderConfig, option
from ..documents import TokenInfo
from ..ops.rotary import Rotation
from ..ops.sdpa import for_any_length
from ..ops.window_attention import empty_ring, window_attention, window_attention_step
from .base import ProjectedMixer, RotaryStep, State, make_rotation, one_token_each, split_heads

ROTATION = {"rotary_layout": "half", "rotary_frequencies": "standard"}  # Llama's


def _window_option() -> Any:
    text = "attention sees the last n tokens, its state is of constant size; null: all"
    return option(None, text, meaning=True)


class RotationOptions(DecoderConfig):
    """Rotation as in Llama, of mixers that are compared with attention."""

    rotary_layout: str = option(ROTATION["rotary_layout"], "interleaved or half", meaning=True)
    rotary_frequencies: str = option(
        ROTATION["rotary_frequencies"], "linspace or standard", meaning=True
    )


class AttentionOptions(RotationOptions):
    """Attention's own: over everything, or over a window."""

    attention_window: int = _window_option()

    def mixer_of(self, layer_idx: int) -> Any:
        return self.mixer_class if self.attention_window is None else WindowAttention

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.attention_window is not None:
            problems += self.check_size("attention_window")
        return problems


class HybridOptions(DecoderConfig):
    """Keys of a mixer that some layers may have attention in place of.

    A null ``intermediate_size`` stays so where they have: each layer's configuration has its own.
    """

    attention_layers: list[int] = option(
        None, "layers, from 0, that are softmax attention instead; null: none", meaning=True
    )
    attention_window: int = _window_option()

    def mixer_of(self, layer_idx: int) -> Any:
        if layer_idx not in (self.attention_layers or ()):
            return self.mixer_class
        return CausalAttention if self.attention_window is None else WindowAttention

    def config_of(self, layer_idx: int) -> Any:
        if not self.attention_layers:
            return self
        own = self._with_mixer(self.mixer_of(layer_idx))
        if own.intermediate_size is None:
            DecoderConfig.settle_intermediate_size(own)
        return own

    def settle_intermediate_size(self) -> list[str]:
        if not self.attention_layers:
            return super().settle_intermediate_size()
        kinds = (self.mixer_class, self.mixer_of(self.attention_layers[0]))
        found = (DecoderConfig.settle_intermediate_size(self._with_mixer(kind)) for kind in kinds)
        return list(dict.fromkeys(problem for problems in found for problem in problems))

    def _with_mixer(self, kind: Any) -> Any:
        """A copy for layers of one mixer."""
        own = copy.copy(self)
        if kind is not self.mixer_class:
            vars(own).update(ROTATION, mixer_class=kind)
        return own

    def problems(self) -> list[str]:
        problems = super().problems()
        layers, most = self.attention_layers, self.num_hidden_layers
        if self.attention_window is not None:
            problems += self.check_size("attention_window")
            if not layers:
                problems.append(
                    f"attention_window ({self.attention_window}) needs layers that are attention: "
                    "name them in attention_layers, or leave it out"
                )
        if layers is None:
            return problems
        what = f"attention_layers ({layers})"
        if not isinstance(layers, list | tuple) or any(type(i) is not int for i in layers):
            problems.append(f"{what} must be a list of whole numbers, as [1, 3]")
        elif len(set(layers)) < len(layers):
            problems.append(f"{what} names a layer twice: name each once")
        elif type(most) is int and any(not 0 <= i < most for i in layers):
            problems.append(
                f"{what} must be among the layers 0 to {most - 1} of num_hidden_layers ({most})"
            )
        return problems


class AttentionShared(NamedTuple):
    """What all layers of a pass share."""

    turn: Rotation  # of queries and keys
    mask: Tensor | None  # as ``attention_mask`` gives it
    past: int  # columns of the earlier calls


class AttentionStep(RotaryStep):
    """``CausalAttention`` for one token per row, its keys and values written into the state."""

    def shared(self, positions: Tensor, length: int) -> tuple[Rotation, int]:
        return super().shared(positions, length), length

    def __call__(self, joined: Tensor, shared: tuple[Rotation, int], state: State) -> Tensor:
        turn, past = shared
        rows, heads = joined.shape[0], self.num_heads
        qkv = joined.view(rows, 3 * heads, 1, -1)
        q, k = turn(qkv[:, : 2 * heads]).to(qkv.dtype).split(heads, dim=1)
        state |= append(state, k, qkv[:, 2 * heads :], past)
        keys, values = (state[name][:, :, : past + 1] for name in ("keys", "values"))
        return F.scaled_dot_product_attention(q, keys, values).view(rows, -1)


class CausalAttention(ProjectedMixer):
    """Multi-head softmax attention.

    Its state: ``keys`` and ``values`` [B, H, capacity, K] of the model's dtype, of which as many
    columns are used as were seen; when they are full, twice as many are reserved. Its memory by
    row, each only where there was a cause: ``valid`` bool [B, past], False at padding;
    ``document_start`` int64 [B], the column where the row's last document begins.
    """

    name = "attention"
    options: ClassVar[type[DecoderConfig]] = AttentionOptions
    positions = "rotary"
    rotates = True
    step: ClassVar[Any] = AttentionStep

    @classmethod
    def growing(cls, config: Any) -> tuple[str, ...]:
        return ("keys", "values")

    @classmethod
    def grows(cls, config: Any) -> bool:
        return config.attention_window is None

    @classmethod
    def describe(cls, config: Any) -> list[str]:
        layers, window = getattr(config, "attention_layers", None), config.attention_window
        where = [f"in layers {', '.join(map(str, layers))}"] if layers else []
        where += [] if window is None else [f"over the last {window:,} tokens"]
        return [f"attention   {', '.join(where)}"] if where else []

    def init_state(
        self, rows: int, device: torch.device, dtype: torch.dtype, capacity: int | None = None
    ) -> State:
        heads, width = self.config.num_heads, self.config.head_dim
        shape = (rows, heads, capacity or 0, width)
        return {name: torch.empty(shape, dtype=dtype, device=device) for name in ("keys", "values")}

    def shared(self, tokens: TokenInfo, memory: State) -> tuple[AttentionShared, State]:
        mask, memory = attention_mask(tokens, memory)
        return AttentionShared(make_rotation(self.config, tokens), mask, tokens.past), memory

    def forward(
        self,
        hidden: Tensor,
        shared: AttentionShared,
        state: State | None = None,
        mode: str | None = None,
    ) -> tuple[Tensor, State]:
        q, k, v = self.project(hidden)
        q, k = shared.turn(q).to(v.dtype), shared.turn(k).to(v.dtype)
        if state is None:
            state = {"keys": k, "values": v}
        else:
            state = append(state, k, v, shared.past)
            end = shared.past + k.shape[2]
            k, v = state["keys"][:, :, :end], state["values"][:, :, :end]
        causal = bool(shared.mask is None and q.shape[2] > 1)  # of a traced size too
        grows = shared.past > 0 and not torch.compiler.is_compiling()
        with for_any_length(hidden.device) if grows else nullcontext():
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=shared.mask, is_causal=causal)
        return self.o_proj(out.transpose(1, 2).flatten(2)), state

    def token_weights(self, hidden: Tensor, shared: AttentionShared) -> Tensor:
        heads = self.config.num_heads
        q, k = (shared.turn(split_heads(f(hidden), heads)) for f in (self.q_proj, self.k_proj))
        causal = shared.mask is None
        return F.scaled_dot_product_attention(
            q, k, one_token_each(q), attn_mask=shared.mask, is_causal=causal
        )


class WindowStep(RotaryStep):
    """``WindowAttention`` for one token per row, its key and value written into the ring."""

    def __call__(self, joined: Tensor, shared: Rotation, state: State) -> Tensor:
        rows, heads = joined.shape[0], self.num_heads
        qkv = joined.view(rows, 3 * heads, 1, -1)
        q, k = shared(qkv[:, : 2 * heads]).to(qkv.dtype).split(heads, dim=1)
        return window_attention_step(q, k, qkv[:, 2 * heads :], state).view(rows, -1)


class WindowAttention(CausalAttention):
    """``CausalAttention`` over the last ``attention_window`` unmasked tokens of the document.

    Its state is a ring, see ``ops.window_attention``, reserved in full at once; it keeps nothing by
    row.
    """

    step = WindowStep

    @classmethod
    def growing(cls, config: Any) -> tuple[str, ...]:
        return ()

    def init_state(
        self, rows: int, device: torch.device, dtype: torch.dtype, capacity: int | None = None
    ) -> State:
        config = self.config
        sizes = rows, config.num_heads, config.attention_window, config.head_dim
        return empty_ring(*sizes, dtype, device)

    def shared(self, tokens: TokenInfo, memory: State) -> tuple[Any, State]:
        return (make_rotation(self.config, tokens), tokens), {}

    def forward(
        self, hidden: Tensor, shared: Any, state: State | None = None, mode: str | None = None
    ) -> tuple[Tensor, State]:
        turn, tokens = shared
        window = self.config.attention_window
        q, k, v = self.project(hidden)
        q, k = turn(q).to(v.dtype), turn(k).to(v.dtype)
        out, ring = window_attention(
            q,
            k,
            v,
            window,
            initial_state=state if tokens.past else None,
            valid=tokens.valid,
            resets=tokens.resets,
            keep=state is not None,
        )
        return self.o_proj(out.transpose(1, 2).flatten(2)), ring

    def token_weights(self, hidden: Tensor, shared: Any) -> Tensor:
        (turn, tokens), config = shared, self.config
        q, k = (turn(split_heads(f(hidden), config.num_heads)) for f in (self.q_proj, self.k_proj))
        flags = {"valid": tokens.valid, "resets": tokens.resets, "keep": False}
        return window_attention(q, k, one_token_each(q), config.attention_window, **flags)[0]


def append(state: State, keys: Tensor, values: Tensor, past: int) -> State:
    """The state with [B, H, T, K] of new tokens after the ``past`` columns that are used.

    Without gradients it is written in place, after a larger one was made where it was full.
    """
    new = {"keys": keys, "values": values}
    if torch.is_grad_enabled() and keys.requires_grad:
        # autograd needs the old values as they were
        used = {name: state[name][:, :, :past] for name in new}
        return {name: torch.cat((used[name], new[name]), 2) if past else new[name] for name in new}
    end, capacity = past + keys.shape[2], state["keys"].shape[2]
    full = end > capacity
    other_type = past == 0 and state["keys"].dtype != keys.dtype  # under autocast
    if full or is_locked(state["keys"]) or other_type:
        capacity = max(end, 2 * capacity) if full else capacity
        for name, x in new.items():
            buffer = x.new_empty(*x.shape[:2], capacity, x.shape[3])
            buffer[:, :, :past] = state[name][:, :, :past]
            state = state | {name: buffer}
    for name, x in new.items():
        state[name][:, :, past:end] = x
    return state


def attention_mask(tokens: TokenInfo, memory: State) -> tuple[Tensor | None, State]:
    """Which columns each query may look at, and what the next pass must know for that.

    Returns:
        bool [B or 1, 1, T, past + T], or None where causality by itself is right; and the memory
        by row that ``CausalAttention`` describes.
    """
    (batch, length), past, device = tokens.shape, tokens.past, tokens.device
    column = torch.arange(past + length, device=device)
    query = column[past:, None]

    valid, earlier = tokens.valid, memory.get("valid")
    if valid is not None or earlier is not None:
        ones = torch.ones(batch, past + length, dtype=torch.bool, device=device)
        earlier = ones[:, :past] if earlier is None else earlier
        valid = torch.cat((earlier, ones[:, past:] if valid is None else valid), dim=1)

    start = memory.get("document_start")
    if start is not None:
        start = start[:, None].expand(batch, length)
    if tokens.resets is not None:
        begin = torch.where(tokens.resets, column[past:], 0).cummax(1).values
        start = begin if start is None else torch.maximum(begin, start)

    memory = {} if valid is None else {"valid": valid}
    if start is not None:
        memory["document_start"] = start[:, -1]
    if not memory:
        if past == 0 or length == 1:
            return None, memory
        return (column <= query)[None, None], memory
    allowed = (column <= query)[None]
    if start is not None:
        allowed = allowed & (column >= start[..., None])
    if valid is not None:
        # padding sees itself, so that no query is left with nothing (softmax would give NaN)
        allowed = allowed & (valid[:, None] | (column == query))
    return allowed[:, None], memory
