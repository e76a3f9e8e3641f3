"""WKV of chunks side by side, with a backward pass of its own.

With m_t the largest exponent so far, all weights are at most 1, however loud the keys: what is kept
of the sums at a token, e^(m_{t-1} - m_t - w), what it adds to them, e^(k_t - m_t), and those with
which it reads them and itself. ``WKV`` keeps keys, values, and the sums and maxima that each token
meets, and computes the weights again in the backward pass, where the same recurrence goes from the
last token to the first: with G the gradient of the outputs over their denominators, a token hands
the sums that it met G times its weight for them, and what of the later tokens' it kept.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import in_full_precision
from .scan import running_max, running_sums

EMPTY = -1e30  # the largest exponent of no terms; minus infinity would make NaN of its differences


class WKV(torch.autograd.Function):
    """``_mix``, of whose results the maxima and the last three have no gradients."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
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
        return _mix(k, v, decay, bonus, num, den, start, valid, resets, chunk_size)

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
        num, den, start = clear(resets[:, :1], num, den, start)
    key, decays = _transitions(k, decay, valid, resets)
    scales = _scales(key, decays, start, chunk_size)
    keep, add = _weights(key, decays, scales)
    (nums, dens), last = running_sums(keep, (add * v, add), (num, den), chunk_size)
    out, *_ = read(nums, dens, scales[:, :-1], k + bonus, v)
    return out, *last, scales[:, -1].clone(), nums, dens, scales


@in_full_precision
def _gradients(out_grad: Tensor, num_grad: Tensor, den_grad: Tensor, *saved: Any) -> tuple:
    """Of k, v, decay, bonus, num and den; saved as of ``WKV``."""
    k, v, decay, bonus, *_, valid, resets, nums, dens, scales, chunk_size = saved
    if torch.is_grad_enabled():  # for gradients of the gradients, the states have theirs
        inputs: Any = (*saved[:9], chunk_size)
        nums, dens, scales = _mix(*inputs)[4:]
    out, total, past, now = read(nums, dens, scales[:, :-1], k + bonus, v)
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


def clear(new: Tensor, num: Tensor, den: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
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


@torch.no_grad()
def _scales(key: Tensor, decays: Tensor, start: Tensor, chunk_size: int) -> Tensor:
    """max before and after each token [B, T + 1, d].

    In float64 where there is one: a decay far below the spacing of float32 at a large maximum would
    not move it, and rounding errors add up over time.
    """
    precise = key.dtype if key.device.type == "mps" else torch.float64
    scales = running_max(key.to(precise), decays.to(precise), start.to(precise), chunk_size)
    return scales.to(key.dtype).clamp(min=EMPTY)


def _weights(key: Tensor, decays: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """How much of the sums is kept at each token, and with what weight its own value is added.

    The difference of large neighbours first: it is exact, and gives back what rounding took.
    """
    before, after = scales[:, :-1], scales[:, 1:]
    return (before - after - decays).exp(), (key - after).exp()


def read(
    num: Tensor, den: Tensor, scale: Tensor, current: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """WKV from the state before a token, its own exponent u + k and its value.

    Returns out, its denominator, and the weights of the state's sums and of the token itself.
    """
    unit = torch.maximum(scale, current).detach()
    past, now = (scale - unit).exp(), (current - unit).exp()
    total = past * den + now
    return (past * num + now * v) / total, total, past, now
