"""Chunkwise retention with a backward pass of its own.

Autograd, given the plain form (``retention._chunkwise_span``), keeps every product and every copy.
This function keeps queries, keys, values and one state per chunk; it computes the scores again in
the backward pass, works in place, and goes span by span, so that what it needs beside its inputs
and outputs does not grow with the text. With G_n the gradient of out_n, and A = Q K^T * D:

    dA = (G V^T) * D      dQ = dA K + xi * (G R^T)      dK = dA^T Q + zeta * (V dU^T)
    dV = A^T G + (zeta * K) dU                          dR = (xi * Q)^T G

where R are the states that the chunks meet, U what each adds to them, xi the decay since a chunk's
start and zeta that to its end; dU sums dR over the later chunks, decayed as the states are.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .precision import in_full_precision
from .products import fast_products
from .timing import ChunkDecays, chunk_decays

# Chunks whose states are combined by one matrix product; longer texts go on span by span, so that
# cost and memory of that product stay linear in T. Few rows are worth a longer span, many make one
# of that many tokens large enough.
CHUNKS_PER_SPAN, MOST_CHUNKS_PER_SPAN = 8, 32
TOKENS_PER_SPAN = 2048  # of all rows


class ChunkwiseRetention(torch.autograd.Function):
    """q, k [B, H, T, K], v [B, H, T, V], state [B, H, K, V] -> what the plan makes, the state."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, state: Tensor, plan: "Plan"
    ) -> tuple[Tensor, Tensor]:
        trains = any(ctx.needs_input_grad)
        out, kept = plan.new_result(v), []
        for index, cut in enumerate(plan.spans):
            own_q, own_k, own_v = plan.read(q, k, v, cut)
            decays = plan.decays(index)
            with fast_products(q.device):
                found, before, state = _span_forward(own_q, own_k, own_v, state, decays)
            rest = plan.write(out, plan.tokens(found, cut), gate, cut)
            kept += [own_q, own_k, own_v, before, *rest] if trains else []
        ctx.plan = plan
        ctx.save_for_backward(gate, *kept)
        return out, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_grad: Tensor, state_grad: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(out_grad, state_grad, ctx)


@in_full_precision
def _gradients(out_grad: Tensor, state_grad: Tensor, ctx: Any) -> tuple[Tensor | None, ...]:
    plan: Plan = ctx.plan
    gate, *saved = ctx.saved_tensors
    each = len(saved) // len(plan.spans)
    gate_grad = None if gate is None else torch.empty_like(gate)
    grads: list[Tensor] = []
    for index in reversed(range(len(plan.spans))):
        cut, decays = plan.spans[index], plan.decays(index)
        q, k, v, before, *rest = saved[each * index : each * (index + 1)]
        slope = plan.slope(out_grad, gate, gate_grad, rest, cut)
        with fast_products(q.device):
            *found, state_grad = _span_backward(
                q, k, v, before, plan.chunks(slope), state_grad, decays
            )
        rows, heads = q.shape[:2]
        grads = grads or [_empty_heads(q, rows, plan.length, heads, x.shape[-1]) for x in found]
        plan.write_gradients(grads, found, cut)
    return *grads, gate_grad, state_grad, None


class Plan:
    """How a row is cut into spans and chunks, the decays of each span, what is made of the result.

    Here nothing: it is the outputs as they are, [B, H, T, V].

    Args:
        log_decay: ln g [H].
        chunk_size: C.
        rows, length: B and T.
        valid, resets: As ``retention_recurrent`` takes them.
    """

    def __init__(
        self,
        log_decay: Tensor,
        chunk_size: int,
        rows: int,
        length: int,
        valid: Tensor | None,
        resets: Tensor | None,
    ) -> None:
        self.log_decay, self.length = log_decay, length
        self.chunk_size = min(chunk_size, length)
        chunks = TOKENS_PER_SPAN // max(1, self.chunk_size * rows)
        span = self.chunk_size * min(max(chunks, CHUNKS_PER_SPAN), MOST_CHUNKS_PER_SPAN)
        self.spans = [slice(start, min(start + span, length)) for start in range(0, length, span)]
        self.valid, self.resets = valid, resets
        self._plain: dict[int, ChunkDecays] = {}  # by number of tokens, if nothing else counts

    def decays(self, index: int) -> ChunkDecays:
        cut = self.spans[index]
        size, chunk_size = cut.stop - cut.start, self.chunk_size
        if self.valid is None and self.resets is None:
            if size not in self._plain:
                self._plain[size] = chunk_decays(self.log_decay, size, chunk_size, None, None)
            return self._plain[size]
        valid, resets = (None if x is None else x[:, cut] for x in (self.valid, self.resets))
        return chunk_decays(self.log_decay, size, chunk_size, valid, resets)

    def read(self, q: Tensor, k: Tensor, v: Tensor, cut: slice) -> tuple[Tensor, Tensor, Tensor]:
        """The span's chunks of each."""
        q, k, v = (self.chunks(x[:, :, cut]) for x in (q, k, v))
        return q, k, v

    def chunks(self, x: Tensor) -> Tensor:
        """[B, H, span, D] -> [B, H, N, C, D], the last chunk filled up with zeros."""
        short = -x.shape[2] % self.chunk_size
        x = F.pad(x, (0, 0, 0, short)) if short else x.contiguous()
        return x.unflatten(2, (-1, self.chunk_size))

    def tokens(self, x: Tensor, cut: slice) -> Tensor:
        """Back to the span's tokens, [B, H, span, D]."""
        return x.flatten(2, 3)[:, :, : cut.stop - cut.start]

    def new_result(self, v: Tensor) -> Tensor:
        """Memory for the result of all spans."""
        rows, heads, length, width = v.shape
        return _empty_heads(v, rows, length, heads, width)

    def write(
        self, result: Tensor, found: Tensor, gate: Tensor | None, cut: slice
    ) -> Sequence[Tensor]:
        """Make a span's result of its outputs [B, H, span, V]; returns what ``slope`` needs."""
        result[:, :, cut] = found
        return ()

    def slope(
        self,
        result_grad: Tensor,
        gate: Tensor | None,
        gate_grad: Tensor | None,
        kept: Sequence[Tensor],
        cut: slice,
    ) -> Tensor:
        """The gradient of a span's outputs [B, H, span, V]; that of its gates is written."""
        return result_grad[:, :, cut]

    def write_gradients(self, grads: Sequence[Tensor], found: Sequence[Tensor], cut: slice) -> None:
        """Write a span's gradients of q, k and v [B, H, N, C, .] into those of the text."""
        for grad, part in zip(grads, found, strict=True):
            grad[:, :, cut] = self.tokens(part, cut)


def _empty_heads(like: Tensor, rows: int, length: int, heads: int, width: int) -> Tensor:
    """[B, H, T, width], tokens before heads in memory, as the projections have it."""
    return like.new_empty(rows, length, heads, width).transpose(1, 2)


def _flat(x: Tensor) -> Tensor:
    """[B, H, N, C, D] -> [B H N, C, D]."""
    return x.flatten(0, 2)


def _scores(a: Tensor, b: Tensor, decays: ChunkDecays) -> Tensor:
    """(a b^T) * D inside the chunks, [B, H, N, C, C]."""
    scores = torch.bmm(_flat(a), _flat(b).mT).view(*a.shape[:4], b.shape[3]).mul_(decays.inside)
    return scores if decays.same is None else scores.mul_(decays.same)


def _span_forward(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, decays: ChunkDecays
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs [B, H, N, C, V], the states that the chunks meet [B, H, N, K, V], the last state."""
    out = torch.bmm(_flat(_scores(q, k, decays)), _flat(v))
    added = torch.bmm(_flat(k * decays.to_end[..., None]).mT, _flat(v))
    added = added.view(*k.shape[:3], state.shape[2] * state.shape[3])  # [B, H, N, K V]
    before = state.new_empty(*k.shape[:3], *state.shape[2:])
    before[:, :, 0] = state
    states = decays.between @ added
    states.addcmul_(decays.from_start[..., None], state.flatten(2)[:, :, None])
    before.flatten(3)[:, :, 1:] = states[:, :, :-1]
    out.baddbmm_(_flat(q * decays.since_start[..., None]), _flat(before))
    # a copy: as a view, the last state would keep those of all chunks alive
    return out.view(*v.shape), before, states[:, :, -1].clone().view(state.shape)


def _span_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    before: Tensor,
    out_grad: Tensor,
    last_grad: Tensor,
    decays: ChunkDecays,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v and of the state before the span."""
    since_start, to_end = decays.since_start[..., None], decays.to_end[..., None]
    slope = _flat(_scores(out_grad, v, decays))  # dA
    q_grad = torch.bmm(slope, _flat(k)).view(q.shape)
    k_grad = torch.bmm(slope.mT, _flat(q)).view(k.shape)
    del slope
    v_grad = torch.bmm(_flat(_scores(q, k, decays)).mT, _flat(out_grad))
    q_grad.addcmul_(torch.bmm(_flat(out_grad), _flat(before).mT).view(q.shape), since_start)

    met = torch.bmm(_flat(q * since_start).mT, _flat(out_grad)).view(before.shape)  # dR
    at_end = torch.empty_like(met)
    at_end[:, :, :-1] = met[:, :, 1:]
    at_end[:, :, -1] = last_grad
    at_end = at_end.flatten(3)  # [B, H, N, K V]
    state_grad = met[:, :, 0] + (decays.from_start[..., None] * at_end).sum(2).view(last_grad.shape)
    added = _flat((decays.between.mT @ at_end).view(before.shape))  # dU
    v_grad.baddbmm_(_flat(k * to_end), added)
    k_grad.addcmul_(torch.bmm(_flat(v), added.mT).view(k.shape), to_end)
    return q_grad, k_grad, v_grad.view(v.shape), state_grad
