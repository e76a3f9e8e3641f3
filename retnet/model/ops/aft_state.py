"""The state of the attention-free transformer: the values of ``aft``'s docstring, and what follows.

Sums of what left the window, a ring of what is in it, or all columns; by spans or by one token.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cache import is_locked
from .aft_blocks import LOW, Tokens
from .precision import wide_dtype

State = dict[str, Tensor]
KEPT = ("k", "v", "z", "position")


def aft_state(
    rows: int,
    width: int,
    *,
    window: int | None,
    capacity: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> State:
    """The state before the first token, see above.

    Args:
        rows, width: B and d.
        window: As ``aft_recurrent`` takes it.
        capacity: Columns to reserve, where it is None.
        dtype: Of the keys and values that will be kept.
    """
    state, size = {}, capacity
    if window is not None:
        num, den = torch.zeros(2, rows, width, dtype=wide_dtype(dtype), device=device)
        state, size = {"num": num, "den": den.clone(), "max": torch.full_like(num, LOW)}, window
    if size or window is None:
        state["keys"] = torch.zeros(rows, size, width, dtype=dtype, device=device)
        state["values"] = torch.zeros_like(state["keys"])
        state["positions"] = torch.full((rows, size, 1), -1, dtype=torch.int64, device=device)
    return state


def fit_state(state: State | None, k: Tensor, window: int | None) -> State:
    """A given state checked, or that of the start, for keys [B, T, d].

    Sums come as wide as is computed, a ring at least as wide as k; columns stay what they are.
    """
    start = aft_state(k.shape[0], k.shape[2], window=window, dtype=k.dtype, device=k.device)
    if state is None:
        return start
    fitted = {}
    for name, x in start.items():
        shape = list(x.shape)
        if name in state and window is None:
            shape[1] = state[name].shape[1]
        if name not in state or list(state[name].shape) != shape:
            raise ValueError(f"initial_state must have {name} {shape}")
        wide = torch.promote_types(x.dtype, state[name].dtype)
        fitted[name] = state[name] if window is None else state[name].to(wide)
    return fitted


def sums_of(state: State) -> tuple[Tensor, ...]:
    return tuple(state[name] for name in ("num", "den", "max") if name in state)


def clear(cleared: Tensor, start: State, state: State) -> State:
    """The start in the rows of cleared bool [B], the state in the others."""
    return {
        name: torch.where(cleared.view(-1, *[1] * (x.dim() - 1)), start[name], x)
        for name, x in state.items()
    }


def push(
    state: State, k: Tensor, v: Tensor, position: Tensor, shown: Tensor | None, window: int | None
) -> State:
    """The state after one token [B, d], nothing where shown bool [B] is False."""
    if not window:
        return _absorb(state, k[:, None], v[:, None], None if shown is None else shown[:, None])
    k, v = k.to(state["keys"].dtype), v.to(state["keys"].dtype)
    new = {"keys": k, "values": v, "positions": position[:, None].expand(k.shape[0], 1)}
    slot = (new["positions"] % window)[..., None]
    slots = {name: slot.expand(-1, 1, x.shape[1]) for name, x in new.items()}
    old = {name: state[name].gather(1, slots[name]) for name in new}
    leaving = old["positions"][..., 0] >= 0
    if shown is not None:
        leaving = leaving & shown[:, None]
        new = {name: torch.where(shown[:, None], x, old[name][:, 0]) for name, x in new.items()}
    ring = {name: state[name].scatter(1, slots[name], x[:, None]) for name, x in new.items()}
    return _absorb(state, old["keys"], old["values"], leaving) | ring


def advance(
    state: State,
    start: State,
    text: Tokens,
    k: Tensor,
    v: Tensor,
    shown: Tensor | None,
    window: int | None,
) -> State:
    """The state after a span [B, P, d], whose documents count from that of the state."""
    if text.document is not None:
        last = text.document[:, -1:]
        state = clear(last[:, 0] > 0, start, state)
        shown = text.document == last if shown is None else shown & (text.document == last)
    if not window:
        return _absorb(state, k, v, shown)
    k, v = k.to(state["keys"].dtype), v.to(state["keys"].dtype)
    rows, length = k.shape[:2]
    slot = (text.position % window).expand(rows, length)
    index = torch.arange(length, device=k.device).expand(rows, length)
    index = index if shown is None else torch.where(shown, index, -1)
    newest = index.new_full((rows, window), -1).scatter_reduce(1, slot, index, "amax")
    taken = newest >= 0
    passed = newest.gather(1, slot) > index  # by a later token of the slot
    passed = passed if shown is None else passed & shown
    leaving = torch.cat((taken & (state["positions"][..., 0] >= 0), passed), 1)
    keys, values = torch.cat((state["keys"], k), 1), torch.cat((state["values"], v), 1)
    sums = _absorb(state, keys, values, leaving)
    new = {"keys": k, "values": v, "positions": text.position.expand(rows, -1)[..., None]}
    source = newest.clamp(min=0)[..., None]
    ring = {
        name: torch.where(
            taken[..., None], x.gather(1, source.expand(-1, -1, x.shape[2])), state[name]
        )
        for name, x in new.items()
    }
    return sums | ring


def _absorb(state: State, k: Tensor, v: Tensor, leaving: Tensor | None) -> State:
    """The sums with the tokens [B, L, d] of which ``leaving`` bool [B, L] is True, at w = 0."""
    num, den, top = sums_of(state)
    k, v = k.to(num.dtype), v.to(num.dtype)
    if leaving is not None:
        k, v = hide(k, v, ~leaving)
    new = torch.maximum(top, k.detach().amax(1))
    fade, e = (top - new).exp(), (k - new[:, None]).exp()
    return {"num": num * fade + (e * v).sum(1), "den": den * fade + e.sum(1), "max": new}


def kept(state: State, text: Tokens, w_v: Tensor | None) -> Tokens:
    """The tokens in the ring, for those of a span; none for window 0."""
    if "keys" not in state:
        return text.map(lambda x: x[:, :0])
    return _tokens(state, w_v, text)


def grow(
    state: State,
    text: Tokens,
    k: Tensor,
    v: Tensor,
    w_v: Tensor | None,
    valid: Tensor | None,
    past: int | None,
) -> tuple[Tokens, State]:
    """All columns up to the last of the text's, and the state that holds them."""
    position = text.position.expand(k.shape[0], -1)
    position = position if valid is None else torch.where(valid, position, -1)
    past = state["keys"].shape[1] if past is None else past
    state, end = _append(state, {"keys": k, "values": v, "positions": position[..., None]}, past)
    columns = text
    if past:
        used = {name: x[:, :past] for name, x in state.items()}
        columns = _joined(_tokens(used, w_v, text), text)
    if text.document is not None and columns.document is not None:
        positions = state["positions"].clone()
        positions[:, :end, 0].masked_fill_(columns.document != text.document[:, -1:], -1)
        state = state | {"positions": positions}
    return columns, state


def _append(state: State, new: State, past: int) -> tuple[State, int]:
    """The state with the new columns after ``past``, and where they end."""
    end, capacity = past + new["keys"].shape[1], state["keys"].shape[1]
    if torch.is_grad_enabled():  # autograd needs the old values as they were
        return {n: torch.cat((state[n][:, :past], x), 1) for n, x in new.items()}, end
    other_type = past == 0 and state["keys"].dtype != new["keys"].dtype  # under autocast
    if end > capacity or is_locked(state["keys"]) or other_type:
        capacity = max(end, 2 * capacity) if end > capacity else capacity
        for name, x in new.items():
            buffer = x.new_full((x.shape[0], capacity, x.shape[2]), -1)
            buffer[:, :past] = state[name][:, :past]
            state = state | {name: buffer}
    for name, x in new.items():
        state[name][:, past:end] = x
    return state, end


def _joined(old: Tokens, text: Tokens) -> Tokens:
    """Kept tokens and those of the text behind them."""

    def join(a: Tensor, b: Tensor) -> Tensor:
        return torch.cat((a, b.expand(a.shape[0], *b.shape[1:])), 1)

    k, v, z, position = (join(getattr(old, name), getattr(text, name)) for name in KEPT)
    document = None
    if old.document is not None and text.document is not None:
        document = join(old.document, text.document)
    return Tokens(k, v, old.u, z, position, document)


def until(columns: Tokens, end: int, document: Tensor | None) -> Tokens:
    """The first columns, those of other documents than ``document`` [B, 1] hidden."""
    first = columns.map(lambda x: x[:, :end])._replace(u=columns.u[:, :0])
    if first.document is None or document is None:
        return first
    k = first.k.masked_fill((first.document != document)[..., None], -math.inf)
    return first._replace(k=k, document=torch.zeros_like(first.document))


def _tokens(state: State, w_v: Tensor | None, text: Tokens) -> Tokens:
    """Kept tokens, empty slots hidden, in document 0 if the text has documents."""
    assert w_v is not None
    position, dtype = state["positions"][..., 0], text.k.dtype
    k, v = hide(state["keys"].to(dtype), state["values"].to(dtype), position < 0)
    position = position.clamp(min=0)
    document = None if text.document is None else torch.zeros_like(position)
    return Tokens(k, v, text.u[:, :0], F.embedding(position, w_v.to(dtype)), position, document)


def hide(k: Tensor, v: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """k and v [B, L, d] without the tokens of hidden bool [B, L]."""
    return k.masked_fill(hidden[..., None], -math.inf), v.masked_fill(hidden[..., None], 0)
