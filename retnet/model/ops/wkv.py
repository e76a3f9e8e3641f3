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
import torch.nn.functional as F
from torch import Tensor

from .precision import in_full_precision, wide_dtype

EMPTY = -1e30  # the largest exponent of no terms; minus infinity would make NaN of its differences
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
            new = resets[:, t, None]
            num, den, scale = (
                num.masked_fill(new, 0),
                den.masked_fill(new, 0),
                scale.masked_fill(new, EMPTY),
            )
        outputs.append(_read(num, den, scale, key + bonus, value)[0])
        unit = torch.maximum(scale - decay, key).detach()
        keep, add = (scale - decay - unit).exp(), (key - unit).exp()
        after = keep * num + add * value, keep * den + add, unit
        if valid is not None:
            own = valid[:, t, None]
            after = tuple(
                torch.where(own, x, y) for x, y in zip(after, (num, den, scale), strict=True)
            )
        num, den, scale = after
    return torch.stack(outputs, dim=1), WKVState(num, den, scale)


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
    inputs = (k, v, decay, bonus, *state, valid, resets, chunk_size)
    if torch.compiler.is_compiling():
        out, *state, _, _, _ = _mix(*inputs)
    else:
        out, *state, _, _, _ = WKV.apply(*inputs)
    return out, WKVState(*state)


class WKV(torch.autograd.Function):
    """``_mix`` with a backward pass of its own, which keeps keys, values and states only."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return _mix(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[3:])
        ctx.set_materialize_grads(True)
        ctx.chunk_size = inputs[-1]
        ctx.save_for_backward(*inputs[:-1], *output[3:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        return *_gradients(*grads[:3], *ctx.saved_tensors, ctx.chunk_size), *[None] * 4


def _mix(
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    bonus: Tensor,
    num: Tensor,
    den: Tensor,
    scale: Tensor,
    valid: Tensor | None,
    resets: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, ...]:
    """out [B, T, d], num, den and max after the last token [B, d] and before each [B, T, d]."""
    if resets is not None:
        first = resets[:, :1]
        num, den, scale = (
            num.masked_fill(first, 0),
            den.masked_fill(first, 0),
            scale.masked_fill(first, EMPTY),
        )
    key, decays = _transitions(k, decay, valid, resets)
    scales, sums, last = _scan(key, (v, None), decays, scale, (num, den), chunk_size)
    out, *_ = _read(*sums, scales, k + bonus, v)
    return out, *last[1], last[0], *sums, scales


@in_full_precision
def _gradients(
    out_grad: Tensor,
    num_grad: Tensor,
    den_grad: Tensor,
    *saved: Any,
) -> tuple[Tensor, ...]:
    """Of k, v, decay, bonus, num and den; saved as of ``WKV``.

    The gradients of the sums go through the same recurrence from the last token to the first: read
    with e^(max - unit) / total, they are added with the exponent -unit, and decay alike.
    """
    k, v, decay, bonus, num, den, scale, valid, resets, last_scale, nums, dens, scales, size = saved
    if torch.is_grad_enabled():  # for gradients of the gradients, the states have theirs
        nums, dens, scales = _mix(k, v, decay, bonus, num, den, scale, valid, resets, size)[4:]
    out, total, now, unit = _read(nums, dens, scales, k + bonus, v)
    grad = out_grad / total
    v_grad = grad * now
    k_grad = v_grad * (v - out)
    bonus_grad = k_grad.sum((0, 1))
    key, decays = _transitions(k, decay, valid, resets)
    exponents, (num_grads, den_grads), (exponent, first) = _scan(
        -unit, (grad, -grad * out), decays, -last_scale, (num_grad, den_grad), size, reverse=True
    )
    add = (key + exponents).exp()
    v_grad = v_grad + add * num_grads
    k_grad = k_grad + add * (v * num_grads + den_grads)
    decay_grad = (scales - decays + exponents).exp() * (nums * num_grads + dens * den_grads)
    if valid is not None:
        decay_grad = decay_grad.masked_fill(~valid[..., None], 0)
    begin = (scale + exponent).exp()
    if resets is not None:
        begin = begin.masked_fill(resets[:, :1], 0)
    return k_grad, v_grad, -decay_grad.sum((0, 1)), bonus_grad, begin * first[0], begin * first[1]


def _read(
    num: Tensor, den: Tensor, scale: Tensor, current: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """WKV from the state before a token, its own exponent u + k and its value.

    Returns out, the denominator and the token's own weight in units of e^unit, and that unit.
    """
    unit = torch.maximum(scale, current).detach()
    past, now = (scale - unit).exp(), (current - unit).exp()
    total = past * den + now
    return (past * num + now * v) / total, total, now, unit


def _transitions(
    k: Tensor, decay: Tensor, valid: Tensor | None, resets: Tensor | None
) -> tuple[Tensor, Tensor]:
    """From each token to the next: with what exponent it is added, and what is lost [B, T, d].

    Padding adds and loses nothing; before a new document all is lost. Without flags the second is
    the same for all tokens, [1, 1, d].
    """
    key, decays = k, decay[None, None]
    if valid is not None:
        key = key.masked_fill(~valid[..., None], -torch.inf)
        decays = torch.where(valid[..., None], decays, 0.0)
    if resets is not None:
        ends = F.pad(resets[:, 1:], (0, 1))[..., None]
        key = key.masked_fill(ends, -torch.inf)
        decays = torch.where(ends, torch.inf, decays)
    return key, decays


Sums = tuple[Tensor, ...]


def _scan(
    key: Tensor,
    values: tuple[Tensor | None, ...],
    decay: Tensor,
    scale: Tensor,
    sums: Sums,
    chunk_size: int,
    reverse: bool = False,
) -> tuple[Tensor, Sums, tuple[Tensor, Sums]]:
    """s <- e^-decay s + e^key value, over time: the sums that each token meets, and the last.

    Args:
        key: [B, T, d].
        values: Each [B, T, d]; ones when None.
        decay: [B or 1, T, d], or [1, 1, d] for all tokens.
        scale, sums: Before the first token [B, d]: sums in units of e^scale.
        reverse: From the last token to the first.

    Returns:
        scale and sums that the tokens meet, each [B, T, d], and those after them, each [B, d].
    """
    length = key.shape[1]
    if length <= 2 * chunk_size:
        return _steps(key, values, decay.expand(-1, length, -1), scale, sums, reverse)
    short = -length % chunk_size
    ends = (0, 0, short, 0) if reverse else (0, 0, 0, short)  # behind what counts, in its order

    def chunks(x: Tensor, fill: float = 0.0) -> Tensor:
        return (F.pad(x, ends, value=fill) if short else x).unflatten(1, (-1, chunk_size))

    constant = decay.shape[1] == 1
    key = chunks(key, -torch.inf)  # [B, N, C, d]
    values = tuple(None if x is None else chunks(x) for x in values)
    decay = decay.expand(-1, chunk_size, -1)[:, None] if constant else chunks(decay)
    # what each chunk adds at its end
    later = (
        F.pad(decay[..., :-1, :], (0, 0, 1, 0))
        if reverse
        else F.pad(decay[..., 1:, :], (0, 0, 0, 1))
    )
    later = later.cumsum(-2) if reverse else later.flip(-2).cumsum(-2).flip(-2)
    exponents = key - later
    chunk_key = exponents.detach().amax(2).clamp(min=EMPTY)
    weights = (exponents - chunk_key[:, :, None]).exp()
    chunk_values = tuple((weights if x is None else weights * x).sum(2) for x in values)
    met, met_sums, last = _scan(
        chunk_key, chunk_values, decay.sum(2), scale, sums, chunk_size, reverse
    )
    scales, all_sums, _ = _steps(key, values, decay, met, met_sums, reverse)
    scales, *rest = (x.flatten(1, 2) for x in (scales, *all_sums))
    if short:  # the first of the filling meets what comes after the last token
        at, own = (short - 1, slice(short, None)) if reverse else (length, slice(length))
        last = scales[:, at], tuple(x[:, at] for x in rest)
        scales, *rest = (x[:, own] for x in (scales, *rest))
    return scales, tuple(rest), last


def _steps(
    key: Tensor,
    values: tuple[Tensor | None, ...],
    decay: Tensor,
    scale: Tensor,
    sums: Sums,
    reverse: bool,
) -> tuple[Tensor, Sums, tuple[Tensor, Sums]]:
    """``_scan`` step by step, of any number of chunks side by side: [..., C, d], start [..., d]."""
    order = -1 if reverse else 1

    def along(x: Tensor) -> tuple[Tensor, ...]:
        return x.unbind(-2)[::order]

    scales = [scale.detach()]
    for own_key, own_decay in zip(along(key.detach()), along(decay.detach()), strict=True):
        scales.append(torch.maximum(scales[-1] - own_decay, own_key))
    after = torch.stack(scales[:0:-1] if reverse else scales[1:], dim=-2).clamp_(min=EMPTY)
    before = torch.stack(scales[-2::-1] if reverse else scales[:-1], dim=-2).clamp_(min=EMPTY)
    keep = along((before - decay - after).exp())
    add = (key - after).exp()
    found, last = [], []
    for value, total in zip(values, sums, strict=True):
        totals = [total]
        for own, kept in zip(along(add if value is None else add * value), keep, strict=True):
            totals.append(torch.addcmul(own, kept, totals[-1]))
        last.append(totals.pop())
        found.append(torch.stack(totals[::order], dim=-2))
    return before, tuple(found), (scales[-1].clamp(min=EMPTY), tuple(last))


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
