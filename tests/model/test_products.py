"""Products by oneDNN are products, and are taken where they are the faster ones."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from retnet.model.products import are_fast, fast_products, matmul
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from retnet.model import products as module
from tests.model.conftest import make_model, random_ids

needs_kernels = pytest.mark.skipif(not module._HAS_KERNELS, reason="a CPU without AVX-512")
SETTING = torch.backends.mkldnn.matmul
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def _everywhere() -> Iterator[None]:
    """Right on every CPU, if not faster; but only where it is as exact."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_HAS_KERNELS", True)
        yield


@settings(max_examples=40, deadline=None)
@given(
    lead=st.sampled_from([(), (3,), (2, 2)]),
    sizes=st.tuples(*[st.integers(1, 40)] * 3),
    turned=st.tuples(st.booleans(), st.booleans()),
)
def test_outputs_and_gradients(lead: tuple[int, ...], sizes, turned) -> None:
    n, k, m = sizes
    shapes = ((*lead, n, k), (*lead, k, m))
    a, b = (
        (torch.randn(shape).mT.contiguous().mT if turn else torch.randn(shape)).requires_grad_()
        for shape, turn in zip(shapes, turned, strict=True)
    )
    mine, plain = matmul(a, b), a @ b
    torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-4)
    slope = torch.randn_like(plain)
    grads = [torch.autograd.grad(y, (a, b), slope) for y in (mine, plain)]
    for own, expected in zip(*grads, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)
    assert torch.autograd.grad(matmul(a, b.detach()).sum(), a)[0].shape == a.shape


def test_all_digits_are_kept() -> None:
    """Float64 says how far float32 products may be off; bfloat16 would be 10,000 times as far."""
    if not module._is_exact():
        pytest.skip("a CPU whose products round to bfloat16 when they may")
    a, b = torch.randn(8, 64, 512), torch.randn(8, 512, 96)
    exact = a.double() @ b.double()
    with fast_products(CPU):
        batch, single = torch.bmm(a, b), a[0] @ b[0]
    for found, expected in ((batch, exact), (single, exact[0])):
        assert (found - expected).abs().max() < 2e-4 < (expected - expected.bfloat16()).abs().max()


def test_it_is_not_used_where_digits_would_be_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_is_exact", lambda: False)
    assert not are_fast(torch.ones(2, 2))
    with fast_products(CPU):
        assert SETTING.fp32_precision != "bf16"


def test_rounded_products_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: real(a.bfloat16(), b.bfloat16()).float())
    assert not module._is_exact.__wrapped__()


def test_the_question_is_answered_whatever_is_on() -> None:
    """Modes in which nothing is computed, another default type and device."""
    with FakeTensorMode(), torch.device("meta"), torch.inference_mode():
        assert module._is_exact.__wrapped__() == module._is_exact()
    torch.set_default_dtype(torch.float64)
    try:
        assert module._is_exact.__wrapped__() == module._is_exact()
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("own", ["none", "ieee", "tf32"])
def test_the_setting_is_as_before_afterwards(own: str) -> None:
    before = SETTING.fp32_precision
    try:
        SETTING.fp32_precision = own
        with pytest.raises(ZeroDivisionError), fast_products(CPU), fast_products(CPU):
            assert SETTING.fp32_precision == "bf16" or not module._is_exact()
            1 / 0  # noqa: B018
        assert SETTING.fp32_precision == own
        a = torch.ones(2, 2, requires_grad=True)
        matmul(a, a).sum().backward()
        assert SETTING.fp32_precision == own
    finally:
        SETTING.fp32_precision = before


def test_the_setting_stays_until_the_last_thread_is_out() -> None:
    if not module._is_exact():
        pytest.skip("a CPU whose products round to bfloat16 when they may")
    before, entered, leave = SETTING.fp32_precision, threading.Event(), threading.Event()

    def other() -> None:
        with fast_products(CPU):
            entered.set()
            leave.wait(10)

    with ThreadPoolExecutor(1) as pool:
        with fast_products(CPU):
            running = pool.submit(other)
            entered.wait(10)
        assert SETTING.fp32_precision == "bf16"
        leave.set()
        running.result()
    assert SETTING.fp32_precision == before


def test_inside_torchs_own_gradients_do() -> None:
    a = torch.ones(2, 2, requires_grad=True)
    with fast_products(CPU):
        inside = matmul(a, a).grad_fn
    outside = matmul(a, a).grad_fn
    assert inside is not None and outside is not None
    assert inside.name() == "MmBackward0"
    assert outside.name() == ("_MatmulBackward" if are_fast(a) else "MmBackward0")


def test_what_is_not_trained_costs_no_memory() -> None:
    """Of a frozen weight's product no input is kept."""
    a, b = torch.randn(3, 4, requires_grad=True), torch.randn(4, 2)
    seen: list[Tensor] = []
    keep = torch.autograd.graph.saved_tensors_hooks(lambda x: seen.append(x) or x, lambda x: x)
    for first, second, kept in ((a, b, [b]), (b.T, a.T, [b.T]), (a, a.T, [a, a.T])):
        seen.clear()
        with keep:
            matmul(first, second)
        assert [x.shape for x in seen] == [x.shape for x in kept] or not are_fast(a)


def test_only_plain_float32_on_a_cpu() -> None:
    x = torch.ones(2, 2)
    assert are_fast(x, torch.nn.Parameter(x)) == module._is_exact()
    assert not are_fast(x, x.double())
    assert not are_fast(x.bfloat16())
    assert not are_fast(x.to("meta"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not are_fast(x)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not are_fast(x)


def test_gradients_of_gradients_and_transforms() -> None:
    a, b = torch.randn(3, 4), torch.randn(4, 2)

    def cost(a: Tensor) -> Tensor:
        return matmul(a, b).pow(3).sum()

    def plain(a: Tensor) -> Tensor:
        return (a @ b).pow(3).sum()

    for found in (cost, plain):
        leaf = a.clone().requires_grad_()
        (first,) = torch.autograd.grad(found(leaf), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), leaf)
        if found is cost:
            mine = second
    torch.testing.assert_close(mine, second, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.func.grad(cost)(a), torch.func.grad(plain)(a))
    rows = torch.randn(5, 3, 4)
    each = torch.func.vmap(torch.func.grad(cost))(rows)
    torch.testing.assert_close(each, torch.func.vmap(torch.func.grad(plain))(rows))


@needs_kernels
@pytest.mark.parametrize("length", [40, 300])
@pytest.mark.parametrize("mixer", ["retention", "attention"])
def test_a_training_step_makes_no_slow_product(mixer: str, length: int) -> None:
    """Every product of float32 matrices of the model's own, forward and backward."""
    model, ids = make_model(mixer, torch.float32), random_ids(1, length)
    seen: list[tuple[str, str]] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func._schema.name
            if name.split("::")[-1].split(".")[0] in ("mm", "bmm", "addmm_", "baddbmm", "baddbmm_"):
                seen.append((name, SETTING.fp32_precision))
            return func(*args, **(kwargs or {}))

    with Watch():
        model(ids, labels=ids, return_logits=False).loss.backward()
    layers = sum(isinstance(layer, torch.nn.Linear) for layer in model.modules())
    assert len(seen) >= 3 * layers
    assert {setting for _, setting in seen} == {"bf16"}
