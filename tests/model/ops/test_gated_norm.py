"""Norm and gate with their own backward pass, against what autograd makes of the formula."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from retnet.model.ops.gated_norm import (
    FEW,
    HEAD_NORMS,
    _GatedNorm,
    _normalise,
    gated_norm,
    head_norm,
)

EPS = 1e-6
kinds = pytest.mark.parametrize("kind", HEAD_NORMS)


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, 2, 5)
    x, gate = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return x.to(dtype).requires_grad_(), gate.to(dtype).requires_grad_()


def own(x: Tensor, gate: Tensor, kind: str) -> Tensor:
    """The function that few numbers do not take."""
    return _GatedNorm.apply(x, gate, kind, EPS)[0]


def plain(x: Tensor, gate: Tensor, kind: str) -> Tensor:
    if kind == "groupnorm":
        normed = (x - x.mean(-1, keepdim=True)) / (
            x.var(-1, keepdim=True, correction=0) + EPS
        ).sqrt()
    elif kind == "rmsnorm":
        normed = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()
    else:
        normed = x
    return gate * torch.sigmoid(gate) * normed


@kinds
def test_outputs_and_gradients_are_those_of_the_formula(kind: str) -> None:
    x, gate = inputs()
    mine, expected = own(x, gate, kind), plain(x, gate, kind)
    assert gated_norm(x, gate, kind, EPS).allclose(expected, rtol=1e-12)
    torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(expected)
    for found, other in zip(
        torch.autograd.grad(mine, (x, gate), weights),
        torch.autograd.grad(expected, (x, gate), weights),
        strict=True,
    ):
        torch.testing.assert_close(found, other, rtol=1e-10, atol=1e-12)


@kinds
def test_second_derivatives(kind: str) -> None:
    function = partial(own, kind=kind)
    assert torch.autograd.gradcheck(function, inputs())
    assert torch.autograd.gradgradcheck(function, inputs())


@kinds
def test_without_a_gate_it_is_the_norm(kind: str) -> None:
    x, gate = inputs()
    assert gated_norm(x, None, kind, EPS).equal(head_norm(x, kind, EPS))
    with torch.no_grad():
        expected = F.silu(gate) * head_norm(x, kind, EPS)
        assert gated_norm(x, gate, kind, EPS).equal(expected)


def test_a_narrow_gate_gives_a_narrow_result_and_gradients_of_each_type() -> None:
    x, gate = inputs(torch.float32)[0], inputs(torch.bfloat16)[1]
    out = own(x, gate, "groupnorm")
    assert out.dtype == torch.bfloat16
    x_grad, gate_grad = torch.autograd.grad(out.sum(), (x, gate))
    assert x_grad.dtype == torch.float32 and gate_grad.dtype == torch.bfloat16


@kinds
@pytest.mark.parametrize("form", [own, partial(gated_norm, eps=EPS)], ids=["own", "few"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_narrow_gate_costs_its_rounding_alone(kind: str, form, dtype: torch.dtype) -> None:
    """Of outputs and gradients, whether x is as narrow or not."""
    x, gate = (x.detach().bfloat16() for x in inputs())
    exact = [x.double().requires_grad_(), gate.double().requires_grad_()]
    given = [x.to(dtype).requires_grad_(), gate.requires_grad_()]
    found, expected = form(*given, kind=kind), plain(*exact, kind)
    weights = inputs(torch.bfloat16)[0].detach().flip(0)
    results = found, *torch.autograd.grad(found, given, weights)
    assert [out.dtype for out in results] == [torch.bfloat16, dtype, torch.bfloat16]
    right = expected, *torch.autograd.grad(expected, exact, weights.double())
    for out, other in zip(results, right, strict=True):
        assert (out - other).norm() < 2**-7 * other.norm()


@kinds
def test_what_normalises_a_narrow_x_is_wide(kind: str) -> None:
    x = inputs()[0].detach()
    _, *found = _normalise(x.bfloat16(), kind, EPS)
    expected = _normalise(x.bfloat16().double(), kind, EPS)[1:]
    for own, other in zip(found, expected, strict=True):
        assert own.dtype == torch.float32 and own.allclose(other.float(), rtol=1e-5, atol=1e-6)


def test_it_keeps_its_inputs_and_little_else() -> None:
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    x, gate = torch.randn(1, FEW // 512, 2, 256, 2).unbind(-1)
    x, gate = x.contiguous().requires_grad_(), gate.contiguous().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        gated_norm(x, gate, "groupnorm", EPS)
    assert sum(kept.values()) < 2.1 * x.nbytes
