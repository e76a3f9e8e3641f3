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
from .scan import running_max, running_sums

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
            num, den, scale = _clear(resets[:, t, None], num, den, scale)
        outputs.append(_read(num, den, scale, key + bonus, value)[0])
        unit = torch.maximum(scale - decay, key).detach()
        keep, add = (scale - unit - decay).exp(), (key - unit).exp()
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
        out, *last, _, _, _ = _mix(*inputs)
    else:
        out, *last, _, _, _ = WKV.apply(*inputs)
    return out, WKVState(*last)


class WKV(torch.autograd.Function):
    """``_mix`` with a backward pass of its own, which keeps keys, values and the states met.

    The weights of the forward pass, all at most 1, are the backward pass's too: with G the gradient
    of the outputs over their denominators, that of the sums is G times the weight with which a
    token reads them, and what the next token's sums hand back, times what was kept of these.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return _mix(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[3:])
        ctx.set_materialize_grads(True)
        ctx.chunk_size = inputs[-1]
        ctx.save_for_backward(*inputs[:-1], *output[4:])

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
    start: Tensor,
    valid: Tensor | None,
    resets: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, ...]:
    """WKV from the state num, den, start, all [B, d].

    Returns out [B, T, d]; num, den and max after the last token [B, d]; num and den that the
    tokens meet [B, T, d], and max before and after each [B, T + 1, d].
    """
    if resets is not None:
        num, den, start = _clear(resets[:, :1], num, den, start)
    key, decays = _transitions(k, decay, valid, resets)
    with torch.no_grad():
        scales = running_max(key.detach(), decays.detach(), start, chunk_size).clamp(min=EMPTY)
    keep, add = _weights(key, decays, scales)
    sums, last = running_sums(keep, (add * v, add), (num, den), chunk_size)
    out, *_ = _read(*sums, scales[:, :-1], k + bonus, v)
    return out, *last, scales[:, -1].clone(), *sums, scales


@in_full_precision
def _gradients(out_grad: Tensor, num_grad: Tensor, den_grad: Tensor, *saved: Any) -> tuple:
    """Of k, v, decay, bonus, num and den; saved as of ``WKV``."""
    k, v, decay, bonus, *_, valid, resets, nums, dens, scales, chunk_size = saved
    if torch.is_grad_enabled():  # for gradients of the gradients, the states have theirs
        nums, dens, scales = _mix(*saved[:9], chunk_size)[4:]
    out, total, past, now = _read(nums, dens, scales[:, :-1], k + bonus, v)
    key, decays = _transitions(k, decay, valid, resets)
    keep, add = _weights(key, decays, scales)
    grad = out_grad / total
    read_grad = grad * past
    (num_grads, den_grads), first = running_sums(
        keep, (read_grad, -read_grad * out), (num_grad, den_grad), chunk_size, reverse=True
    )
    own_grad = grad * now
    v_grad = own_grad + add * num_grads
    own_grad = own_grad * (v - out)
    k_grad = own_grad + add * (v * num_grads + den_grads)
    decay_grad = keep * (nums * num_grads + dens * den_grads)
    if valid is not None:
        decay_grad = decay_grad.masked_fill(~valid[..., None], 0)
    if resets is not None:
        first = tuple(x.masked_fill(resets[:, :1], 0) for x in first)
    return k_grad, v_grad, -decay_grad.sum((0, 1)), own_grad.sum((0, 1)), *first


def _clear(new: Tensor, num: Tensor, den: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The state [B, d], the initial one in rows where a document begins: new is bool [B, 1]."""
    return num.masked_fill(new, 0), den.masked_fill(new, 0), scale.masked_fill(new, EMPTY)


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


def _weights(key: Tensor, decays: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """How much of the sums is kept at each token, and with what weight its own value is added.

    The difference of large neighbours first: it is exact, and gives back what rounding took.
    """
    before, after = scales[:, :-1], scales[:, 1:]
    return (before - after - decays).exp(), (key - after).exp()


def _read(
    num: Tensor, den: Tensor, scale: Tensor, current: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """WKV from the state before a token, its own exponent u + k and its value.

    Returns out, its denominator, and the weights of the state's sums and of the token itself.
    """
    unit = torch.maximum(scale, current).detach()
    past, now = (scale - unit).exp(), (current - unit).exp()
    total = past * den + now
    return (past * num + now * v) / total, total, past, now


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
