"""Norm of each head, and the gate: swish(G) * norm(X), keeping little for the backward pass.

Autograd keeps X, norm(X), G and swish(G), which beside all else that a layer keeps is too much;
this keeps X and G and computes the other two again. With Y the result and dY its gradient:

    dG = swish'(G) * dY * norm(X)        dX = norm'(X) (dY * swish(G))
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import wide_dtype

HEAD_NORMS = ("groupnorm", "rmsnorm", "none")
FEW = 2**21  # numbers, of which autograd may keep all: that is the faster way by 2 % of a step


def head_norm(x: Tensor, kind: str, eps: float) -> Tensor:
    """Normalise the last dimension: each head of each token by itself, no learned parameters."""
    if kind == "groupnorm":
        return F.layer_norm(x, x.shape[-1:], *no_change(x), eps)
    if kind == "rmsnorm":
        return F.rms_norm(x, x.shape[-1:], eps=eps)
    return x


def no_change(x: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias [V] that change nothing: torch's kernel is twice as fast with some.

    Wide ones make its CPU kernel keep the means and scales of a narrow x as wide.
    """
    dtype = wide_dtype(x.dtype) if x.device.type == "cpu" else x.dtype
    return x.new_ones(x.shape[-1], dtype=dtype), x.new_zeros(x.shape[-1], dtype=dtype)


def gated_norm(x: Tensor, gate: Tensor | None, kind: str, eps: float) -> Tensor:
    """The norm of x, computed in at least float32, in the type of the gate; times swish(gate).

    Args:
        x: [B, T, H, V].
        gate: [B, T, H, V]; None for none.
        kind, eps: As ``head_norm`` takes them.

    Returns:
        [B, T, H, V].
    """
    if gate is None:
        return head_norm(x, kind, eps)
    few = x.numel() < FEW or not torch.is_grad_enabled()
    if few or torch.compiler.is_compiling():
        return _plain(x, gate, kind, eps)
    y: Tensor = _GatedNorm.apply(x, gate, kind, eps)[0]
    return y


def _plain(x: Tensor, gate: Tensor, kind: str, eps: float) -> Tensor:
    return F.silu(gate) * head_norm(x, kind, eps).to(gate.dtype)


class _GatedNorm(torch.autograd.Function):
    """The result and, without gradients, what normalises: mean and scale of each head and token."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, gate: Tensor, kind: str, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        normed, mean, scale = _normalise(x, kind, eps)
        return F.silu(gate) * normed.to(gate.dtype), mean, scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, gate, ctx.kind, ctx.eps = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(x, gate, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, mean, scale = ctx.saved_tensors
        if torch.is_grad_enabled():  # gradients of the gradients are wanted
            plain = partial(_plain, kind=ctx.kind, eps=ctx.eps)
            return *torch.func.vjp(plain, x, gate)[1](grad), None, None
        normed = torch.addcmul(-mean * scale, x, scale)
        x_grad = F.silu(gate).mul_(grad).to(scale.dtype)  # so far of norm(X)
        gate_grad = torch.ops.aten.silu_backward(grad * normed.to(grad.dtype), gate)
        if ctx.kind == "groupnorm":  # of numbers that are normalised already
            zero, one, mask = torch.zeros_like(mean), torch.ones_like(scale), [True, False, False]
            x_grad = torch.ops.aten.native_layer_norm_backward(
                x_grad, normed, x.shape[-1:], zero, one, None, None, mask
            )[0].mul_(scale)
        elif ctx.kind == "rmsnorm":
            x_grad = (x_grad - normed * (x_grad * normed).mean(-1, keepdim=True)) * scale
        return x_grad.to(x.dtype), gate_grad, None, None


def _normalise(x: Tensor, kind: str, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """norm(x) = (x - mean) * scale with its mean and scale [B, T, H, 1]."""
    if kind == "groupnorm":
        return torch.native_layer_norm(x, x.shape[-1:], *no_change(x), eps)
    x = x.to(wide_dtype(x.dtype))
    scale = torch.ones_like(x[..., :1])
    if kind == "rmsnorm":
        scale = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    return x * scale, torch.zeros_like(scale), scale
