"""Derivatives of the three forms: first and second ones, and those of torch.func."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, jacrev, vmap

from retnet.model.ops.retention import (
    _span,
    retention_chunkwise,
    retention_parallel,
    retention_recurrent,
)
from tests.model.ops.test_retention import (
    TOLERANCE,
    cases,
    random_case,
    relative,
    run,
    run_with_gradients,
    sum_of_squares,
)


@settings(max_examples=40, deadline=None)
@given(case=cases(), chunk_size=st.integers(1, 9))
def test_the_function_of_its_own_is_the_plain_form(case: dict, chunk_size: int) -> None:
    """The backward pass of ``ChunkRetention`` against autograd's, which a decay asks for."""
    mine = run_with_gradients(retention_chunkwise, case, chunk_size=chunk_size)
    asking = {**case, "log_decay": case["log_decay"].clone().requires_grad_()}
    plain = run_with_gradients(retention_chunkwise, asking, chunk_size=chunk_size)
    for a, b in zip(mine, plain, strict=True):
        assert relative(a, b) < TOLERANCE


@pytest.mark.parametrize("flags", [None, "valid", "resets"])
def test_gradcheck(flags: str | None) -> None:
    """Against finite differences, over several spans and a short last chunk."""
    assert _span(2, 1) < 67
    function, leaves = differentiable(67, flags)
    assert torch.autograd.gradcheck(function, leaves)


LEAVES = ("q", "k", "v", "initial_state")


def differentiable(length: int, flags: str | None, chunk_size: int = 2) -> tuple[Any, list[Tensor]]:
    """The chunkwise form of one narrow head as a function of the leaves that come with it."""
    case = random_case(length, heads=1, rows=1, widths=(2, 1))
    if flags:
        case[flags] = torch.rand(1, length, generator=torch.Generator().manual_seed(0)) < 0.6
    case["initial_state"] = torch.ones(1, 1, 2, 1, dtype=torch.float64)

    def function(*values: Tensor) -> tuple[Tensor, Tensor]:
        own = case | dict(zip(LEAVES, values, strict=True))
        return run(retention_chunkwise, own, chunk_size=chunk_size)

    return function, [case[name].requires_grad_() for name in LEAVES]


@pytest.mark.parametrize("flags", [None, "valid", "resets"])
def test_gradgradcheck(flags: str | None) -> None:
    function, leaves = differentiable(5, flags)
    assert torch.autograd.gradgradcheck(function, leaves)


@settings(max_examples=40, deadline=None)
@given(case=cases(), chunk_size=st.integers(1, 9))
def test_gradients_of_gradients_agree(case: dict, chunk_size: int) -> None:
    """Those of every input, through the gradients of all of them."""

    def second(form, **options) -> list[Tensor]:
        names = [n for n in LEAVES if case[n] is not None]
        leaves = [case[name].clone().requires_grad_() for name in names]
        out, state = run(form, case | dict(zip(names, leaves, strict=True)), **options)
        cost = out.pow(3).sum() + state.pow(3).sum()
        first = torch.autograd.grad(cost, leaves, create_graph=True)
        return [*first, *torch.autograd.grad(sum_of_squares(first), leaves)]

    expected = second(retention_recurrent)
    for found in (second(retention_parallel), second(retention_chunkwise, chunk_size=chunk_size)):
        for mine, definition in zip(found, expected, strict=True):
            assert torch.isfinite(mine).all()
            assert relative(mine, definition) < TOLERANCE


def test_second_derivatives_of_some_inputs_only() -> None:
    """Of the queries alone, while the rest is frozen."""
    found = []
    for form, options in ((retention_recurrent, {}), (retention_chunkwise, {"chunk_size": 3})):
        case = random_case(10)
        case["q"].requires_grad_()
        out, _ = run(form, case, **options)
        (first,) = torch.autograd.grad(out.pow(3).sum(), case["q"], create_graph=True)
        found += torch.autograd.grad(first.square().sum(), case["q"])
    assert relative(found[1], found[0]) < TOLERANCE


EVERY = (0, 1, 2, 3)
TRANSFORMS: dict[str, tuple[Any, bool]] = {  # and whether inputs are stacked for it
    "grad of all": (lambda f: grad(f, argnums=EVERY), False),
    "grad of one": (grad, False),
    "grad of grad": (lambda f: grad(lambda *x: sum_of_squares(grad(f, EVERY)(*x)), EVERY), False),
    "vmap": (vmap, True),
    "vmap of grad": (lambda f: vmap(grad(f, argnums=EVERY)), True),
    "jacrev of all": (lambda f: jacrev(f, argnums=EVERY), False),
    "jacrev of one": (jacrev, False),
    "hessian": (lambda f: jacrev(jacrev(f)), False),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_torch_func(name: str) -> None:
    case = random_case(7)
    case["initial_state"] = torch.randn(2, 2, 4, 6, dtype=torch.float64)
    transform, stacked = TRANSFORMS[name]
    inputs = [case[leaf] for leaf in LEAVES]
    if stacked:
        inputs = [torch.stack((x, x.flip(2), 2 * x)) for x in inputs]
    results = []
    for form, options in ((retention_chunkwise, {"chunk_size": 3}), (retention_recurrent, {})):

        def cost(*values: Tensor, form=form, options=options) -> Tensor:
            out, state = run(form, case | dict(zip(LEAVES, values, strict=True)), **options)
            return out.pow(3).sum() + state.pow(3).sum()

        results.append(transform(cost)(*inputs))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_a_decay_can_have_a_gradient() -> None:
    """Ours has none; who calls the functions with one gets it from every form."""
    found = []
    for form, options in ((retention_recurrent, {}), (retention_chunkwise, {"chunk_size": 4})):
        case = random_case(20)
        case["log_decay"].requires_grad_()
        out, _ = run(form, case, **options)
        found += torch.autograd.grad(out.square().sum(), case["log_decay"])
    assert relative(found[0], found[1]) < TOLERANCE
