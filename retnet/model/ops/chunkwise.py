"""Retention of N chunks at once, with a backward pass of its own.

Inside the chunks all pairs, from before them the state that each chunk meets (``mix_chunks``).
Autograd, given that, keeps every product; ``ChunkRetention`` keeps queries, keys, values and one
state per chunk, and computes the scores again in the backward pass. With A = (Q K^T) * D inside the
chunks, R the states that they meet, U what each adds to the state at its end, xi the decay since a
chunk's start, zeta that to its end, and S' the state after the last of them:

    O = A V + (xi * Q) R   U = (zeta * K)^T V   R_i = sum_{j < i} g_ij U_j + g_i0 S   S' = R_{N+1}

with g_ij the decay from the end of chunk j to the start of chunk i. So with G the gradient of O:

    dA = (G V^T) * D      dQ = dA K + xi * (G R^T)      dK = dA^T Q + zeta * (V dU^T)
    dV = A^T G + (zeta * K) dU      dR = (xi * Q)^T G           dU_j = sum_{i > j} g_ij dR_i

Queries, keys and values may be narrower than states and decays: products are then of operands of
that type, summed in float32 inside of each and rounded to it; states are added up in their own.
"""

from typing import Any

import torch
from torch import Tensor

from .decay import ChunkDecays
from .precision import in_full_precision


def mix_chunks(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, decays: ChunkDecays
) -> tuple[Tensor, Tensor, Tensor]:
    """Retention of the chunks; every one of its steps has gradients of its own.

    Args:
        q, k: [B, H, N, C, K].
        v: [B, H, N, C, V].
        state: Before the first chunk, [B, H, K, V].
        decays: Of these chunks, in the state's type.

    Returns:
        out [B, H, N, C, V] in the type of v, the state after the last chunk, and those that the
        chunks meet [B, H, N, K, V].
    """
    own = decays.within(v.dtype)
    added = ((k * own.to_end).mT @ v).flatten(3).to(state.dtype)  # U, [B, H, N, K V]
    first, size = state.flatten(2)[:, :, None], state.shape[2:]
    before = (decays.between[:, :, :-1] @ added).addcmul_(decays.from_start[:, :, :-1], first)
    last = (decays.between[:, :, -1:] @ added).addcmul_(decays.from_start[:, :, -1:], first)
    before = before.unflatten(3, size)
    out = _scores(q, k, own) @ v
    _add_product(out, q * own.since_start, before.to(v.dtype))
    return out, last[:, :, 0].unflatten(2, size), before


class ChunkRetention(torch.autograd.Function):
    """``mix_chunks``, of whose results the third has no gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, state: Tensor, *decays: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        return mix_chunks(q, k, v, state, ChunkDecays(*decays))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(True)
        ctx.save_for_backward(*inputs, output[2])

    @staticmethod
    def backward(ctx: Any, out_grad: Tensor, last_grad: Tensor, _: Tensor) -> tuple:
        *inputs, before = ctx.saved_tensors
        return *_gradients(out_grad, last_grad, before, *inputs), *[None] * len(ChunkDecays._fields)


@in_full_precision
def _gradients(
    out_grad: Tensor, last_grad: Tensor, before: Tensor, *inputs: Any
) -> tuple[Tensor, ...]:
    """Of q, k, v and of the state before the first chunk; inputs as of ``ChunkRetention``."""
    q, k, v, state = inputs[:4]
    decays = ChunkDecays(*inputs[4:])
    if torch.is_grad_enabled():  # for gradients of the gradients, the states have theirs
        before = mix_chunks(q, k, v, state, decays)[2]
    out_grad = out_grad.contiguous()  # once, instead of for each product
    own = decays.within(v.dtype)
    score_grad = _scores(out_grad, v, own)  # dA
    met_grad = ((q * own.since_start).mT @ out_grad).to(state.dtype)  # dR
    met, last = met_grad.flatten(3), last_grad.flatten(2)[:, :, None]
    state_grad = decays.from_start[:, :, :-1].mT @ met + decays.from_start[:, :, -1:] * last
    added_grad = decays.between[:, :, :-1].mT @ met  # dU
    added_grad.addcmul_(decays.between[:, :, -1:].mT, last)
    added_grad, before = added_grad.view(before.shape).to(v.dtype), before.to(v.dtype)
    q_grad = (score_grad @ k).addcmul_(out_grad @ before.mT, own.since_start)
    k_grad = (score_grad.mT @ q).addcmul_(v @ added_grad.mT, own.to_end)
    v_grad = _scores(q, k, own).mT @ out_grad
    _add_product(v_grad, k * own.to_end, added_grad)
    return q_grad, k_grad, v_grad, state_grad.view(state.shape)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, of batches of matrices."""
    total.flatten(0, 2).baddbmm_(a.flatten(0, 2), b.flatten(0, 2))


def _scores(a: Tensor, b: Tensor, decays: ChunkDecays) -> Tensor:
    """(a b^T) * D inside the chunks, [B, H, N, C, C]."""
    scores = (a @ b.mT).mul_(decays.inside)
    return scores if decays.same is None else scores.mul_(decays.same)
