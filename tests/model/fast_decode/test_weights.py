"""Linear layers by whichever product compute what linear layers compute."""

import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from retnet.model.linear import FEW_TOKENS, MOST_LEFT, Linear, PackedWeight, linear, pack, product
from torch import Tensor

from retnet.model import linear as module
from retnet.model import products
from tests.model.conftest import make_model, random_ids


@pytest.fixture
def products_seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of what ``matmul`` was called with, as if this CPU had the kernels."""
    seen: list[tuple[int, ...]] = []
    real: Callable[[Tensor, Tensor], Tensor] = module.matmul

    def counted(a: Tensor, b: Tensor) -> Tensor:
        seen.append((*a.shape, b.shape[-1]))
        return real(a, b)

    monkeypatch.setattr(products, "_HAS_KERNELS", True)
    monkeypatch.setattr(products, "_is_exact", lambda: True)
    monkeypatch.setattr(module, "matmul", counted)
    return seen


@settings(max_examples=50, deadline=None)
@given(
    shape=st.sampled_from([(256,), (1, 300), (3, 96), (2, 2, 64), (5,), (17,), (2, 3)]),
    inputs=st.integers(1, 40),
    outputs=st.integers(1, 40),
    bias=st.booleans(),
    left=st.booleans(),
)
def test_outputs_and_gradients(
    shape: tuple[int, ...], inputs: int, outputs: int, bias: bool, left: bool
) -> None:
    generator = torch.Generator().manual_seed(inputs * 41 + outputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "_HAS_KERNELS", True)  # right on every CPU, if not faster
        patch.setattr(module, "MIN_PRODUCTS", 1 if left else 2**60)
        x = torch.randn(*shape, inputs, generator=generator, requires_grad=True)
        weight = torch.randn(outputs, inputs, generator=generator, requires_grad=True)
        b = torch.randn(outputs, generator=generator, requires_grad=True) if bias else None
        slope = torch.randn(*shape, outputs, generator=generator)
        leaves = [leaf for leaf in (x, weight, b) if leaf is not None]
        mine, plain = linear(x, weight, b), F.linear(x, weight, b)
        assert mine.is_contiguous()
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-4)
        grads = (
            torch.autograd.grad(out, leaves, slope, retain_graph=True) for out in (mine, plain)
        )
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
    monkeypatch.setattr(products, "_HAS_KERNELS", False)
    real = module.bmm
    monkeypatch.setattr(module, "bmm", lambda a, b: calls.append(1) or real(a, b))
    Linear(8, 32, bias=False)(torch.randn(1, rows, 8))
    assert bool(calls) == blocks


@pytest.mark.parametrize(
    ("rows", "outputs", "left"),
    [(5, 4096, True), (16, 1024, True), (15, 1024, False), (255, 1024, True), (256, 1024, False)],
)
def test_few_rows_leave_the_weight_as_it_lies(rows, outputs, left, products_seen) -> None:
    """Where the product is large enough."""
    Linear(1024, outputs, bias=False)(torch.randn(rows, 1024))
    assert products_seen == [(outputs, 1024, rows) if left else (rows, 1024, outputs)]


def test_very_few_rows_and_other_types_take_none_of_it(products_seen) -> None:
    layer, x = Linear(8, 32, bias=False), torch.randn(2, FEW_TOKENS // 2, 8)
    layer(x)
    assert products_seen == [(FEW_TOKENS, 8, 32)]
    products_seen.clear()
    layer(x[:1, :MOST_LEFT])
    layer.double()(x.double())
    layer.bfloat16()(x.bfloat16())
    layer.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x)
    assert not products_seen


@pytest.mark.parametrize("mixer", ["retention", "attention"])
def test_one_thread_and_two_give_the_same_numbers(mixer: str) -> None:
    model, ids = make_model(mixer, torch.float32), random_ids(2, FEW_TOKENS)
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
    for rows in (1, FEW_TOKENS):
        linear(torch.ones(rows, 8), weight)
    assert Own.seen == 2


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
def test_packed_weights_compiled_and_not(products_seen) -> None:
    weight = torch.randn(32, 8)
    packed = pack(weight, 6)
    assert isinstance(packed, PackedWeight) and pack(weight, MOST_LEFT) is weight
    compiled = torch.compile(lambda x: product(x, packed) + 1, backend="aot_eager", fullgraph=True)
    for rows in (6, 9, 1):
        x = torch.randn(rows, 8)
        expected = x @ weight.T
        with torch.inference_mode():
            torch.testing.assert_close(product(x, packed), expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(compiled(x), expected + 1, rtol=1e-4, atol=1e-4)
    arguments = (torch.randn(6, 8), packed.key, 32)
    torch.library.opcheck(
        torch.ops.retnet.packed_linear.default, arguments, test_utils="test_faketensor"
    )


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
def test_packed_weights_go_with_their_last_user(products_seen) -> None:
    packed = pack(torch.randn(32, 8), 6)
    assert isinstance(packed, PackedWeight)
    key, gone = packed.key, weakref.ref(packed)
    assert key in module._packed_weights
    del packed
    assert gone() is None and key not in module._packed_weights
