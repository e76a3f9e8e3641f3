"""The attention-free transformer's sums over a span of P tokens, with a backward pass of its own.

Each query's sums come from its own block of C tokens, term by term (``_direct``), and from blocks
that end before it begins, by products (``_product``): the neighbours of C, 2C, ... P / 2 tokens,
the tokens kept from before the span, and sums that were given. Blocks have a scale each and are
joined by the larger one. Autograd, given that, would keep [C, C, d] of each block; ``MixSpan``
keeps its inputs, the outputs o and the logarithm l of the denominators. With G the gradient of o:

    p_ts = e^(k_s + w_ts - l_t)              dv_s = sum_t p_ts G_t
    dk_s = sum_t p_ts G_t (v_s - o_t)        dw_ts = sum over channels of p_ts G_t (v_s - o_t)
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .precision import in_full_precision

LOW = -1e30  # a maximum of nothing: finite, so that differences are
Sums = tuple[Tensor, Tensor]  # numerator and denominator [B, N, S, 2, d], scale [B, N, S, 1, d]


class Tokens(NamedTuple):
    """Tokens of a row [B, T, ...], or of N blocks of it [B, N, S, ...].

    Attributes:
        k, v: [.., d]; k is minus infinity and v 0 at tokens that nobody sees.
        u, z: [.., r], w = u z^T; B may be 1.
        position: int64; B may be 1.
        document: Its number; None when all are of one.
    """

    k: Tensor
    v: Tensor
    u: Tensor
    z: Tensor
    position: Tensor
    document: Tensor | None

    def map(self, change: Callable[[Tensor], Tensor]) -> "Tokens":
        k, v, u, z, position = (change(x) for x in self[:5])
        return Tokens(k, v, u, z, position, None if self[5] is None else change(self[5]))

    def blocks(self, size: int) -> "Tokens":
        return self.map(lambda x: x.unflatten(1, (-1, size)))

    def halves(self, size: int) -> tuple["Tokens", "Tokens"]:
        """Of neighbouring blocks the earlier and the later."""
        return self.map(lambda x: _halves(x, size)[0]), self.map(lambda x: _halves(x, size)[1])


def mix_span(
    text: Tokens, old: Tokens, sums: tuple[Tensor, ...], window: int | None, block: int | None
) -> tuple[Tensor, Tensor]:
    """AFT without its gate.

    Args:
        text: The span, P = C 2^n tokens; any number where C is None, one block.
        old: Tokens before the span, perhaps none, that its document 0 sees; their u and document
            are not asked for.
        sums: num, den and max [B, d], which document 0 sees; or empty.
        window: How far w reaches, None for everywhere, 0 where there is none.
        block: C, or None.

    Returns:
        out and the logarithm of its denominator [B, P, d], 0 where there is nothing to see.
    """
    blocks = text.map(lambda x: x[:, None]) if block is None else text.blocks(block)
    total, scale = (x.flatten(1, 2) for x in _direct(blocks, window))
    for size in [] if block is None else _sizes(text, block):
        keys, queries = text.halves(size)
        (first, own), (first_scale, own_scale) = (_halves(x, size) for x in (total, scale))
        own, own_scale = _join((own, own_scale), _product(queries, keys, window))
        total = torch.stack((first, own), 2).flatten(1, 3)
        scale = torch.stack((first_scale, own_scale), 2).flatten(1, 3)
    both = total[:, None], scale[:, None]
    if old.k.shape[1]:
        both = _join(both, _product(*_before(text, old), window))
    if sums:
        num, den, top = _given(text, sums)
        both = _join(both, (torch.stack((num, den), 3), top[:, :, :, None]))
    num, den = both[0][:, 0].unbind(2)
    seen = den > 0
    den = torch.where(seen, den, 1.0)
    out = torch.where(seen, num / den, 0.0)
    return out, torch.where(seen, both[1][:, 0, :, 0] + den.log(), 0.0)


class MixSpan(torch.autograd.Function):
    """``mix_span`` of the flat list window, block, 6 of text, 6 of old and those of the sums.

    Its second result has no gradient.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(window: int | None, block: int, *flat: Any) -> tuple[Tensor, Tensor]:
        return mix_span(Tokens(*flat[:6]), Tokens(*flat[6:12]), flat[12:], window, block)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        ctx.window, ctx.block = inputs[:2]
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs[2:], *output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple:
        *flat, out, log_den = ctx.saved_tensors
        text, old, sums = Tokens(*flat[:6]), Tokens(*flat[6:12]), tuple(flat[12:])
        if torch.is_grad_enabled():  # for gradients of the gradients, they have theirs
            out, log_den = mix_span(text, old, sums, ctx.window, ctx.block)
        return None, None, *_gradients(grad, out, log_den, text, old, sums, ctx.window, ctx.block)


@in_full_precision
def _gradients(
    grad: Tensor,
    out: Tensor,
    log_den: Tensor,
    text: Tokens,
    old: Tokens,
    sums: tuple[Tensor, ...],
    window: int | None,
    block: int,
) -> list[Tensor | None]:
    """Of everything that ``MixSpan`` takes after window and block."""
    result = (grad, grad * out, log_den)
    own = _direct_gradients(text.blocks(block), grad, out, log_den, window, block)
    own = [x.flatten(1, 2) for x in own]  # k, v, u, z
    for size in _sizes(text, block):
        keys, queries = text.halves(size)
        parts = _product_gradients(queries, keys, [_halves(x, size)[1] for x in result], window)
        for total, x, half in zip(own, parts, (0, 0, 1, 0), strict=True):
            total.unflatten(1, (-1, 2, size))[:, :, half].add_(x)
    earlier: list[Tensor | None] = [None] * 4
    if old.k.shape[1]:
        parts = _product_gradients(*_before(text, old), [x[:, None] for x in result], window)
        own[2].add_(parts[2][:, 0])
        earlier = [parts[0][:, 0], parts[1][:, 0], None, parts[3][:, 0]]
    of_sums: list[Tensor | None] = []
    if sums:
        factor = _exp(_given(text, sums)[2][:, 0] - log_den)
        of_sums = [(grad * factor).sum(1), -(result[1] * factor).sum(1), None]
    return [*own, None, None, *earlier, None, None, *of_sums]


def _direct(text: Tokens, window: int | None) -> Sums:
    """Sums over the tokens of a query's own block up to itself, term by term."""
    terms = _terms(text, window)[0]
    scale = _top(terms, -2)
    e = (terms - scale).exp()
    return torch.stack(((e * text.v[:, :, None]).sum(-2), e.sum(-2)), -2), scale


def _terms(text: Tokens, window: int | None) -> tuple[Tensor, Tensor | None]:
    """k_s + w_ts of the pairs of a block [B, N, C, C, d], and where w is that of the window."""
    w, near = _w(text, text, window)
    size = w.shape[-1]
    hidden = torch.ones(size, size, dtype=torch.bool, device=w.device).triu(1)
    if text.document is not None:
        hidden = hidden | (text.document[..., :, None] != text.document[..., None, :])
    return text.k[:, :, None] + w.masked_fill(hidden, -math.inf)[..., None], near


def _direct_gradients(
    text: Tokens, grad: Tensor, out: Tensor, log_den: Tensor, window: int | None, block: int
) -> list[Tensor]:
    """Of k, v, u, z."""
    terms, near = _terms(text, window)
    grad, out, log_den = (x.unflatten(1, (-1, block))[..., None, :] for x in (grad, out, log_den))
    p = (terms - log_den).exp() * grad
    dv = p.sum(-3)
    p = p * (text.v[:, :, None] - out)
    return [p.sum(-3), dv, *_w_gradients(p.sum(-1), near, text, text)]


def _product(queries: Tokens, keys: Tokens, window: int | None) -> Sums:
    """Sums over keys that are all earlier than the queries."""
    e, a, scale, _ = _factors(queries, keys, window)
    total = (a @ torch.cat((e * keys.v, e), -1)).unflatten(-1, (2, -1))
    return total, scale[..., None, :]


def _factors(
    queries: Tokens, keys: Tokens, window: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """e^(k - max k) [B, N, S, d], e^(w - max w) [B, N, Q, S], both maxima's sum [B, N, Q, d].

    Only the queries of the last key's document see any of the keys, and only those of it.
    """
    k, (w, near) = keys.k, _w(queries, keys, window)
    if queries.document is not None and keys.document is not None:
        last = keys.document[..., -1:]
        k = k.masked_fill((keys.document != last)[..., None], -math.inf)
        w = w.masked_fill((queries.document != last)[..., None], -math.inf)
    top, w_top = _top(k, -2), _top(w, -1)
    return (k - top).exp(), (w - w_top).exp(), top + w_top, near


def _product_gradients(
    queries: Tokens, keys: Tokens, result: list[Tensor], window: int | None
) -> list[Tensor]:
    """Of the keys' k and v, the queries' u and the keys' z; result is G, G o and l."""
    e, a, scale, near = _factors(queries, keys, window)
    grad, grad_out, log_den = result
    factor = _exp(scale - log_den)
    grad, grad_out = grad * factor, grad_out * factor
    to_v, to_k = (a.mT @ torch.cat((grad, grad_out), -1)).chunk(2, -1)
    dw = a * (torch.cat((grad, -grad_out), -1) @ torch.cat((e * keys.v, e), -1).mT)
    return [e * (keys.v * to_v - to_k), e * to_v, *_w_gradients(dw, near, queries, keys)]


def _w(queries: Tokens, keys: Tokens, window: int | None) -> tuple[Tensor, Tensor | None]:
    """w [B or 1, N, Q, S], and where it is that of the window; None: everywhere."""
    w = queries.u @ keys.z.mT
    if not window:
        return w, None
    near = queries.position[..., :, None] - keys.position[..., None, :] < window
    return torch.where(near, w, 0.0), near


def _w_gradients(
    grad: Tensor, near: Tensor | None, queries: Tokens, keys: Tokens
) -> tuple[Tensor, Tensor]:
    """Of u and z, given that of w."""
    if near is not None:
        grad = torch.where(near, grad, 0.0)
    if queries.u.shape[0] == keys.z.shape[0] == 1:
        grad = grad.sum(0, keepdim=True)
    du, dz = grad @ keys.z, grad.mT @ queries.u
    return du.sum_to_size(queries.u.shape), dz.sum_to_size(keys.z.shape)


def _join(a: Sums, b: Sums) -> Sums:
    """Sums over both; what is empty, or too small for its scale, does not set the scale."""
    scale = torch.where(b[0][..., 1:, :] > 0, b[1], LOW)
    top = torch.maximum(a[1], scale)
    return a[0] * (a[1] - top).exp() + b[0] * (scale - top).exp(), top


def _top(x: Tensor, dim: int) -> Tensor:
    return x.detach().amax(dim, keepdim=True).clamp(min=LOW)


def _exp(x: Tensor) -> Tensor:
    return x.clamp(max=math.log(torch.finfo(x.dtype).max) - 8).exp()


def _sizes(text: Tokens, block: int) -> list[int]:
    """C, 2C, ... P / 2."""
    return [block << n for n in range((text.k.shape[1] // block).bit_length() - 1)]


def _halves(x: Tensor, size: int) -> tuple[Tensor, ...]:
    return x.unflatten(1, (-1, 2, size)).unbind(2)


def _before(text: Tokens, old: Tokens) -> tuple[Tokens, Tokens]:
    """The span as one block of queries, and the tokens before it as one of keys."""
    queries, keys = (x.map(lambda y: y[:, None]) for x in (text, old))
    return queries, keys


def _given(text: Tokens, sums: tuple[Tensor, ...]) -> list[Tensor]:
    """num, den and max for each query [B, 1, P, d]; nothing for those of later documents."""
    num, den, top = (x[:, None, None].expand(-1, 1, text.k.shape[1], -1) for x in sums)
    if text.document is not None:
        hidden = (text.document > 0)[:, None, :, None]
        num, den = (x.masked_fill(hidden, 0) for x in (num, den))
        top = top.masked_fill(hidden, LOW)
    return [num, den, top]
