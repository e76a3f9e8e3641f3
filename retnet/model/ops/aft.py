"""Attention-free transformer (arXiv 2105.14103, equation 2, causal) as pure functions.

Symbols: B batch, T time, d channels, r rank of w, S window, L kept tokens, P span, C block. For
each channel by itself, p(t) being the position of token t in its document,

    y_t = sigmoid(q_t) * sum_{s <= t} exp(k_s + w_ts) v_s / sum_{s <= t} exp(k_s + w_ts)

with w_ts = w_u[p(t)] . w_v[p(s)] where p(t) - p(s) < window, and 0 elsewhere. The window makes the
variant, and the variant the state, a dictionary with one entry per row (``aft_state``):

    0 (simple)      num, den, max [B, d]: the true sums are num e^max and den e^max
    S >= 1 (local)  the same of the tokens that left the window, and the last S: keys, values
                    [B, S, d] and positions int64 [B, S, 1], token t in slot p(t) mod S
    None (full)     keys, values [B, columns, d] and positions [B, columns, 1] of all tokens

A position of -1 is an empty slot: padding, room not yet used, or a token of an earlier document.
Keys and values are kept as they come; all that is computed is float32 (float64 for float64 inputs).
A maximum only is a choice of scale, so it has no gradient.

``aft_recurrent`` is the definition. ``aft_parallel`` takes spans of P queries and joins, by the
larger maximum, the sums over the tokens before the span, over those in the query's own block of C,
and over neighbouring blocks of C, 2C, ... P / 2 tokens, each with a maximum of its own of keys that
are earlier than all of its queries: no later key, however loud, changes anything. Sums over blocks
are products of e^(k - max k) and e^(w - max w). They lose keys where the w of one query differ by
more than about 80 (float32; 700 in float64). Programs for texts of any length (``torch.export``)
have one block of all pairs instead, [B, T, T, d].
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .aft_blocks import LOW, MixSpan, Tokens, mix_span
from .aft_state import (
    State,
    advance,
    aft_state,
    clear,
    fit_state,
    grow,
    hide,
    kept,
    push,
    sums_of,
    until,
)
from .precision import in_full_precision, wide_dtype

BLOCK = 4  # C
SPAN, SPAN_OF_ALL = 256, 512  # P for windows, and where w is everywhere


@in_full_precision
def aft_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None = None,
    w_u: Tensor | None = None,
    w_v: Tensor | None = None,
    *,
    window: int | None,
    initial_state: State | None = None,
    past: int | None = None,
    valid: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, State]:
    """AFT token by token: O(L d) time per token.

    Args:
        q, k, v: [B, T, d].
        positions: int64 [B, T] or [1, T], rising in each document, 0 or more and below T_max;
            anything at padding. Not needed for window 0, nor are w_u and w_v.
        w_u, w_v: Of the query and of the key, [T_max, r].
        window: 0, how far w reaches, or None for everywhere.
        initial_state: As ``aft_state`` or an earlier call gives it; that of the start when None.
        past: Columns of its keys that are used, for window None; all when None. With gradients off
            the new tokens are written behind them in place, where there is room.
        valid: bool [B, T], False: padding, which changes nothing.
        resets: bool [B, T], True: the first token of a new document, before which the state returns
            to the initial one.

    Returns:
        out [B, T, d], float32 (float64 for float64 inputs), and the state after the last token.

    Raises:
        ValueError: Shapes that do not fit together.
    """
    text, state = _prepare(q, k, v, positions, w_u, w_v, window, initial_state, valid, resets)
    start = aft_state(*q[:, 0].shape, window=window, dtype=k.dtype, device=q.device)
    columns = old = None
    if window is None:
        columns, state = grow(state, text, k, v, w_v, valid, past)
    outputs = []
    for t in range(q.shape[1]):
        shown, begins = (None if x is None else x[:, t] for x in (valid, resets))
        if columns is not None:
            document = None if text.document is None else text.document[:, t, None]
            old = until(columns, columns.k.shape[1] - q.shape[1] + t + 1, document)
        else:
            if begins is not None:
                state = clear(begins if shown is None else begins & shown, start, state)
            state = push(state, k[:, t], v[:, t], text.position[:, t], shown, window)
            old = kept(state, text, w_v)
        outputs.append(_read(_terms(text, old, t, window), old.v, sums_of(state)))
    return _gate(q, torch.stack(outputs, dim=1)), state


@in_full_precision
def aft_parallel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None = None,
    w_u: Tensor | None = None,
    w_v: Tensor | None = None,
    *,
    window: int | None,
    initial_state: State | None = None,
    past: int | None = None,
    valid: Tensor | None = None,
    resets: Tensor | None = None,
    span: int | None = None,
) -> tuple[Tensor, State]:
    """AFT span by span: memory linear in T, and time too but for window None.

    Arguments, results and errors as in ``aft_recurrent``; ``span`` is P >= 1, by default
    what is fastest; it is filled up to C 2^n tokens.
    """
    if span is not None and span < 1:
        raise ValueError(f"span ({span}) must be at least 1")
    text, state = _prepare(q, k, v, positions, w_u, w_v, window, initial_state, valid, resets)
    start = aft_state(*q[:, 0].shape, window=window, dtype=k.dtype, device=q.device)
    columns = None
    if window is None:
        columns, state = grow(state, text, k, v, w_v, valid, past)
    size = (SPAN_OF_ALL if window is None else SPAN) if span is None else span
    outputs, document, last = [], None, None
    given = (*text, k, v, valid)
    parts: list[Any] = [[x] for x in given]
    if not _is_open(q.shape[1]):
        parts = [[None] * q.shape[1] if x is None else x.split(size, 1) for x in given]
    for index, (*fields, given_k, given_v, shown) in enumerate(zip(*parts, strict=False)):
        part = Tokens(*fields)
        if part.document is not None:  # counted from the last token before the span
            document = torch.zeros_like(part.document[:, :1]) if last is None else last
            last = part.document[:, -1:]
            part = part._replace(document=part.document - document)
        if columns is not None:
            old = until(columns, columns.k.shape[1] - q.shape[1] + index * size, document)
        else:
            old = kept(state, text, w_v)
        outputs.append(_mix(part, old, sums_of(state), window))
        if columns is None:
            state = advance(state, start, part, given_k, given_v, shown, window)
    return _gate(q, torch.cat(outputs, dim=1)), state


def _is_open(length: Any) -> bool:
    """Whether a program is made (exported, traced) whose texts may have any length."""
    return torch.jit.is_tracing() or isinstance(length, torch.SymInt)


def _gate(q: Tensor, mean: Tensor) -> Tensor:
    return torch.sigmoid(q.to(mean.dtype)) * mean


def _mix(text: Tokens, old: Tokens, sums: tuple[Tensor, ...], window: int | None) -> Tensor:
    """``mix_span`` of any number of tokens, filled up with hidden ones of the last document."""
    length = text.k.shape[1]
    if _is_open(length):
        return mix_span(text, old, sums, window, None)[0]
    short = (BLOCK << max(0, -(-length // BLOCK) - 1).bit_length()) - length
    if short:
        k = F.pad(text.k, (0, 0, 0, short), value=-math.inf)
        v, u, z = (F.pad(x, (0, 0, 0, short)) for x in text[1:4])
        position, document = text.position, text.document
        position = torch.cat((position, position[:, -1:].expand(-1, short)), 1)
        if document is not None:
            document = torch.cat((document, document[:, -1:].expand(-1, short)), 1)
        text = Tokens(k, v, u, z, position, document)
    if torch.compiler.is_compiling():
        out, _ = mix_span(text, old, sums, window, BLOCK)
    else:
        out, _ = MixSpan.apply(window, BLOCK, *text, *old, *sums)
    return out[:, :length]


def _terms(text: Tokens, old: Tokens, t: int, window: int | None) -> Tensor:
    """k_s + w_ts of the query of token t with kept tokens [B, L, d]."""
    w = (old.z @ text.u[:, t, :, None])[..., 0]  # [B or 1, L]
    if window:
        w = torch.where(text.position[:, t, None] - old.position < window, w, 0.0)
    return old.k + w[..., None]


def _read(terms: Tensor, values: Tensor, sums: tuple[Tensor, ...]) -> Tensor:
    """Mean [B, d] of values [B, L, d] with weights e^terms, and of sums; 0 of nothing."""
    top = terms.new_full((), LOW) if not sums else sums[2]
    if terms.shape[1]:
        top = torch.maximum(terms.detach().amax(1), top)
    e = (terms - top[:, None]).exp()
    num, den = (e * values).sum(1), e.sum(1)
    if sums:
        fade = (sums[2] - top).exp()
        num, den = num + sums[0] * fade, den + sums[1] * fade
    seen = den > 0
    return torch.where(seen, num / torch.where(seen, den, 1.0), 0.0)


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    w_u: Tensor | None,
    w_v: Tensor | None,
    window: int | None,
    state: State | None,
    valid: Tensor | None,
    resets: Tensor | None,
) -> tuple[Tokens, State]:
    """Check the shapes; widen to at least float32, padding hidden; a state where there is none."""
    rows, length, _ = q.shape
    if window is not None and window < 0:
        raise ValueError(f"window ({window}) must be 0 or more, or None")
    if k.shape != q.shape or v.shape != q.shape or length == 0:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}"
        raise ValueError(f"{shapes} must all be [B, T, d], T at least 1")
    for name, flags in (("valid", valid), ("resets", resets)):
        if flags is not None and flags.shape != (rows, length):
            raise ValueError(f"{name} {tuple(flags.shape)} must be {(rows, length)}")
    state = fit_state(state, k, window)
    k, v = k.to(wide_dtype(k.dtype)), v.to(wide_dtype(k.dtype))
    if valid is not None:
        k, v = hide(k, v, ~valid)
        resets = None if resets is None else resets & valid
    document = None if resets is None else resets.cumsum(1)
    if window == 0:
        none, position = k.new_zeros(1, length, 0), q.new_zeros(1, length, dtype=torch.int64)
        return Tokens(k, v, none, none, position, document), state
    if positions is None or w_u is None or w_v is None or w_u.shape != w_v.shape:
        raise ValueError("w needs positions, w_u and w_v [T_max, r] (or window 0)")
    if positions.shape not in ((rows, length), (1, length)):
        raise ValueError(f"positions {tuple(positions.shape)} must be {(rows, length)}")
    position = positions if valid is None else torch.where(valid, positions, 0)
    u, z = (F.embedding(position, x.to(k.dtype)) for x in (w_u, w_v))
    return Tokens(k, v, u, z, position, document), state
