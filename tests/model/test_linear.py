"""Linear layers through convolutions compute what linear layers compute."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from retnet.model import linear as module
from retnet.model.linear import MIN_TOKENS, MOST_LEFT, Linear, linear, linear_gradients
from tests.model.conftest import make_model, random_ids

needs_kernels = pytest.mark.skipif(not module._HAS_KERNELS, reason="a CPU without AVX-512")


@pytest.fixture
def convolutions(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The inputs of the convolutions that were called."""
    seen: list[Tensor] = []
    real = F.conv2d

    def counted(x: Tensor, *args: Any) -> Tensor:
        seen.append(x)
        return real(x, *args)

    monkeypatch.setattr(F, "conv2d", counted)
    return seen


@settings(max_examples=30, deadline=None)
@given(
    shape=st.sampled_from([(256,), (1, 300), (3, 96), (2, 2, 64), (257,), (16, 16)]),
    inputs=st.integers(1, 40),
    outputs=st.integers(1, 40),
    bias=st.booleans(),
)
def test_outputs_and_gradients(shape: tuple[int, ...], inputs: int, outputs: int, bias) -> None:
    generator = torch.Generator().manual_seed(inputs * 41 + outputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_HAS_KERNELS", True)  # right on every CPU, if not faster
        x = torch.randn(*shape, inputs, generator=generator, requires_grad=True)
        weight = torch.randn(outputs, inputs, generator=generator, requires_grad=True)
        b = torch.randn(outputs, generator=generator, requires_grad=True) if bias else None
        slope = torch.randn(*shape, outputs, generator=generator)
        leaves = [leaf for leaf in (x, weight, b) if leaf is not None]
        mine, plain = linear(x, weight, b), F.linear(x, weight, b)
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-4)
        grads = (
            torch.autograd.grad(out, leaves, slope, retain_graph=True) for out in (mine, plain)
        )
        for own, expected in zip(*grads, strict=True):
            torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-3)
        if len(shape) == 1:
            pair = linear_gradients(x.detach(), weight.detach(), slope)
            expected = torch.autograd.grad(plain, (x, weight), slope)
            for own, other in zip(pair, expected, strict=True):
                torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-3)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(MOST_LEFT + 1, MIN_TOKENS - 1),
    inputs=st.integers(1, 40),
    outputs=st.sampled_from([1, 7, 16, 33, 64]),
    grad=st.booleans(),
)
def test_few_rows_as_a_convolution(rows: int, inputs: int, outputs: int, grad: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_HAS_KERNELS", True)
        patch.setattr(module, "MIN_PRODUCTS", 1)
        x = torch.randn(rows, inputs, requires_grad=grad)
        weight = torch.randn(outputs, inputs, requires_grad=grad)
        mine, plain = linear(x, weight), F.linear(x, weight)
        assert mine.is_contiguous()
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-4)
        if grad:
            slope = torch.randn(rows, outputs)
            grads = [torch.autograd.grad(out, (x, weight), slope) for out in (mine, plain)]
            for own, expected in zip(*grads, strict=True):
                torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-3)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.integers(1, 40), st.integers(1, 70), st.booleans())
def test_products_of_few_rows(rows: int, inputs: int, outputs: int, transposed: bool) -> None:
    x = torch.randn(1, rows, inputs, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(outputs, inputs, dtype=torch.float64)
    if transposed:
        weight = weight.t().contiguous().t()
    weight.requires_grad_()
    mine, plain = linear(x, weight), F.linear(x, weight)
    torch.testing.assert_close(mine, plain)
    slope = torch.randn(1, rows, outputs, dtype=torch.float64)
    grads = [torch.autograd.grad(out, (x, weight), slope) for out in (mine, plain)]
    for own, expected in zip(*grads, strict=True):
        torch.testing.assert_close(own, expected)


@pytest.mark.parametrize(("rows", "blocks"), [(1, True), (64, True), (65, False)])
def test_few_rows_go_in_blocks(rows: int, blocks: bool, monkeypatch) -> None:
    calls: list[int] = []
    real = module.bmm
    monkeypatch.setattr(module, "bmm", lambda a, b: calls.append(1) or real(a, b))
    Linear(8, 32, bias=False)(torch.randn(1, rows, 8))
    assert bool(calls) == blocks


@needs_kernels
def test_it_is_taken_where_it_pays(convolutions: list[Tensor]) -> None:
    layer, x = Linear(8, 6, bias=False), torch.randn(2, MIN_TOKENS // 2, 8)
    layer(x)
    assert [tuple(x.shape) for x in convolutions] == [(16, 8, 1, MIN_TOKENS // 16)]
    convolutions.clear()
    layer(x[:, 1:])
    layer.double()(x.double())
    layer.bfloat16()(x.bfloat16())
    layer.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x)
    with torch.backends.mkldnn.flags(enabled=False):
        layer(x)
    assert not convolutions


@needs_kernels
@pytest.mark.parametrize(
    ("rows", "outputs", "taken"),
    [(4, 8192, False), (5, 4096, True), (16, 1024, True), (15, 1024, False), (255, 1024, True)],
)
def test_few_rows_take_it_where_it_pays(rows, outputs, taken, convolutions) -> None:
    """Products large enough, and more rows than reading the weight alone would decide about."""
    layer, x = Linear(1024, outputs, bias=False), torch.randn(rows, 1024)
    layer(x)
    assert [tuple(x.shape) for x in convolutions] == [(16, 1024, 1, outputs // 16)] * taken


@needs_kernels
@pytest.mark.parametrize("mixer", ["retention", "attention"])
def test_every_linear_layer_of_a_training_step_takes_it(mixer: str, convolutions) -> None:
    model = make_model(mixer, torch.float32)
    ids = random_ids(1, MIN_TOKENS)
    loss = model(ids, labels=ids, return_logits=False).loss
    layers = sum(isinstance(layer, torch.nn.Linear) for layer in model.modules())
    assert len(convolutions) == layers
    loss.backward()


@pytest.mark.parametrize("mixer", ["retention", "attention"])
def test_one_thread_and_two_give_the_same_numbers(mixer: str) -> None:
    model, ids = make_model(mixer, torch.float32), random_ids(2, MIN_TOKENS)
    before = torch.get_num_threads()
    try:
        outs = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with torch.no_grad():
                outs.append(model(ids).logits)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-4)


def test_no_rows_and_weights_of_other_classes() -> None:
    """Quantised and sharded weights know their own product; no rows give no rows."""

    class Own(torch.Tensor):
        seen = 0

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            cls.seen += func is F.linear
            return super().__torch_function__(func, types, args, kwargs or {})

    assert linear(torch.empty(0, 8), torch.ones(32, 8)).shape == (0, 32)
    weight = torch.ones(32, 8).as_subclass(Own)
    for rows in (1, MIN_TOKENS):
        linear(torch.ones(rows, 8), weight)
    assert Own.seen == 2
