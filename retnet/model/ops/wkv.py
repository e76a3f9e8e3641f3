"""RWKV-4's WKV and token shift (arXiv 2305.13048, section 3.1), as pure functions.

Symbols: B batch, T time, d channels, N chunks, C tokens of a chunk. Each channel for itself, with
the decay w = exp(time_decay) and the bonus u = time_first (equation 16):

    wkv_t = (sum_{i<t} e^(k_i - (t-1-i) w) v_i + e^(u + k_t) v_t) / (the same without v)

Keys are exponents, so sums are kept relative to the largest of their terms: a state (num, den, max)
stands for the true sums num e^max and den e^max. Of them max is a mere unit: no gradient flows
out of it, num and den have it all. All forms take any T >= 1 and an initial state, and return the
outputs and the state after the last token; ``wkv_recurrent`` is the definition (appendix D).

Two optional tensors describe batches that are more than one text per row:

    valid  bool [B, T]   False: padding. It leaves the state as it is, and does not count as time.
    resets bool [B, T]   True: the first token of a new document; nothing before it is remembered.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .precision import in_full_precision, wide_dtype
from .wkv_chunks import EMPTY, WKV, clear, read

CHUNK_SIZE = 16


class WKVState(NamedTuple):
    """Sums over the tokens seen, in units of e^max: each [B, d], float32 (or float64)."""

    num: Tensor
    den: Tensor
    max: Tensor


def wkv_init_state(
    rows: int,
    width: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> WKVState:
    """The state before the first token; float32 unless the model's dtype is float64."""
    options: dict[str, Any] = {
        "device": device,
        "dtype": wide_dtype(torch.float32 if dtype is None else dtype),
    }
    num, den = torch.zeros(2, rows, width, **options).unbind()
    return WKVState(num, den, torch.full((rows, width), EMPTY, **options))


def token_shift(
    x: Tensor,
    previous: Tensor | None = None,
    valid: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Each token's predecessor: the last valid token of its document before it.

    Args:
        x: [B, T, d].
        previous: The last valid token of earlier calls [B, d]; zeros when None.
        valid, resets: bool [B, T], see above.

    Returns:
        x_(t-1) [B, T, d], 0 for the first token of a document, and the last valid token [B, d].
    """
    previous = torch.zeros_like(x[:, 0]) if previous is None else previous.to(x.dtype)
    before = previous[:, None]
    if valid is None:
        shifted, last = torch.cat((before, x[:, :-1]), dim=1), x[:, -1].clone()
    else:
        latest = torch.where(valid, torch.arange(x.shape[1], device=x.device), -1).cummax(1).values
        index = latest[..., None].clamp(min=0).expand_as(x)
        seen = torch.where(latest[..., None] < 0, before, x.gather(1, index))
        shifted, last = torch.cat((before, seen[:, :-1]), dim=1), seen[:, -1].clone()
    if resets is not None:
        shifted = shifted.masked_fill(resets[..., None], 0)
    return shifted, last


@in_full_precision
def wkv_recurrent(
    k: Tensor,
    v: Tensor,
    time_decay: Tensor,
    time_first: Tensor,
    *,
    initial_state: WKVState | None = None,
    valid: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, WKVState]:
    """WKV token by token: O(1) memory and time per token.

    Args:
        k, v: [B, T, d].
        time_decay, time_first: ln w and u [d].
        initial_state: That of ``wkv_init_state`` when None.
        valid, resets: bool [B, T], see above; no padding, no new document when None.

    Returns:
        out [B, T, d] and the state after the last token, all float32 (float64 for float64 inputs).

    Raises:
        ValueError: Shapes that do not fit together.
    """
    k, v, decay, bonus, (num, den, scale), resets = _promote(
        k, v, time_decay, time_first, initial_state, valid, resets
    )
    outputs = []
    for t in range(k.shape[1]):
        key, value = k[:, t], v[:, t]
        if resets is not None:
            num, den, scale = clear(resets[:, t, None], num, den, scale)
        out, after = wkv_token(key, value, decay, bonus, num, den, scale)
        outputs.append(out)
        if valid is not None:
            own = valid[:, t, None]
            num, den, scale = (
                torch.where(own, x, y) for x, y in zip(after, (num, den, scale), strict=True)
            )
        else:
            num, den, scale = after
    return torch.stack(outputs, dim=1), WKVState(num, den, scale)


def wkv_token(
    k: Tensor, v: Tensor, decay: Tensor, bonus: Tensor, num: Tensor, den: Tensor, scale: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """One token: out [B, d], and num, den and max after it; all in at least float32, w [d]."""
    out = read(num, den, scale, k + bonus, v)[0]
    unit = torch.maximum(scale - decay, k).detach()
    keep, add = (scale - unit - decay).exp(), (k - unit).exp()
    return out, (keep * num + add * v, keep * den + add, unit)


@in_full_precision
def wkv_chunkwise(
    k: Tensor,
    v: Tensor,
    time_decay: Tensor,
    time_first: Tensor,
    *,
    chunk_size: int = CHUNK_SIZE,
    initial_state: WKVState | None = None,
    valid: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, WKVState]:
    """WKV with all chunks side by side: C + T/C steps after each other, or fewer; memory O(T).

    Arguments, results and errors as in ``wkv_recurrent``; ``chunk_size`` is C >= 2 and may be
    larger than T or not divide it.
    """
    if chunk_size < 2:
        raise ValueError(f"chunk_size ({chunk_size}) must be at least 2")
    k, v, decay, bonus, state, resets = _promote(
        k, v, time_decay, time_first, initial_state, valid, resets
    )
    out, *last = WKV.apply(k, v, decay, bonus, *state, valid, resets, chunk_size)[:4]
    return out, WKVState(*last)


def _promote(
    k: Tensor,
    v: Tensor,
    time_decay: Tensor,
    time_first: Tensor,
    state: WKVState | None,
    valid: Tensor | None,
    resets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, WKVState, Tensor | None]:
    """Check the shapes, widen to at least float32, take padding out of keys, values and resets.

    The same arguments come back, but for w instead of its logarithm, and without ``valid``. The
    gradient that the state's max has goes through num and den.
    """
    batch, length, width = k.shape
    if v.shape != k.shape:
        raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)} must both be [B, T, d]")
    if length == 0:
        raise ValueError(f"k {tuple(k.shape)} has no tokens: T must be at least 1")
    for name, x in (("time_decay", time_decay), ("time_first", time_first)):
        if x.shape != (width,):
            raise ValueError(f"{name} {tuple(x.shape)} must be [d], here [{width}]")
    for name, flags in (("valid", valid), ("resets", resets)):
        if flags is not None and flags.shape != (batch, length):
            raise ValueError(f"{name} {tuple(flags.shape)} must be {(batch, length)}")
    dtype = wide_dtype(k.dtype)
    if state is None:
        state = wkv_init_state(batch, width, k.device, dtype)
    for name, x in state._asdict().items():
        if x.shape != (batch, width):
            raise ValueError(f"initial_state.{name} {tuple(x.shape)} must be {(batch, width)}")
    k, v, num, den, scale, bonus = (x.to(dtype) for x in (k, v, *state, time_first))
    one = (scale - scale.detach()).exp()
    if valid is not None:
        k, v = (x.masked_fill(~valid[..., None], 0) for x in (k, v))
        resets = None if resets is None else resets & valid
    state = WKVState(num * one, den * one, scale.detach())
    return k, v, time_decay.to(dtype).exp(), bonus, state, resets
