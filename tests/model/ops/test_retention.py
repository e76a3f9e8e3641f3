"""The three forms are one function: outputs, states and gradients agree whatever the shapes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from retnet.model.ops.decay import head_log_decay
from retnet.model.ops.retention import (
    _span,
    retention_chunkwise,
    retention_parallel,
    retention_recurrent,
)

TOLERANCE = 1e-10


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference in units of the largest value, of inputs around 1."""
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-3)).item()


@st.composite
def cases(draw: st.DrawFn) -> dict:
    """Tensors of random shapes, perhaps with initial state, padding and several documents."""
    batch, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    length = draw(st.integers(1, 25))
    key_dim, value_dim = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def flags(probability: float) -> Tensor:
        return torch.rand(batch, length, generator=generator) < probability

    decay = draw(st.sampled_from(["paper", "log_linear", 1.0, 0.9, 0.01, "each token's own"]))
    log_decay = normal(batch, heads, length).exp().mul(-draw(st.sampled_from([1e-3, 0.1, 30.0])))
    if decay != "each token's own":
        log_decay = head_log_decay(decay, heads)
    return {
        "q": normal(batch, heads, length, key_dim),
        "k": normal(batch, heads, length, key_dim),
        "v": normal(batch, heads, length, value_dim),
        "log_decay": log_decay,
        "initial_state": normal(batch, heads, key_dim, value_dim) if draw(st.booleans()) else None,
        "valid": flags(0.7) if draw(st.booleans()) else None,
        "resets": flags(0.2) if draw(st.booleans()) else None,
    }


def run(form, case: dict, **options) -> tuple[Tensor, Tensor]:
    names = ("q", "k", "v", "log_decay")
    rest = {key: value for key, value in case.items() if key not in names}
    return form(*(case[name] for name in names), **rest, **options)


def run_with_gradients(form, case: dict, **options) -> list[Tensor]:
    """Outputs, state, and the gradients of a fixed function of both."""
    names = [n for n in ("q", "k", "v", "initial_state") if case[n] is not None]
    names += ["log_decay"] if case["log_decay"].dim() == 3 else []
    leaves = {name: case[name].clone().requires_grad_() for name in names}
    out, state = run(form, {**case, **leaves}, **options)
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)).sum()
        for x in (out, state)
    )
    return [out.detach(), state.detach(), *torch.autograd.grad(loss, list(leaves.values()))]


def sum_of_squares(grads: tuple[Tensor, ...]) -> Tensor:
    return sum((grad.square().sum() for grad in grads), torch.zeros(()))


@settings(max_examples=60, deadline=None)
@given(case=cases(), chunk_size=st.integers(1, 40))
def test_forms_agree_in_outputs_states_and_gradients(case: dict, chunk_size: int) -> None:
    expected = run_with_gradients(retention_recurrent, case)
    parallel = run_with_gradients(retention_parallel, case)
    chunkwise = run_with_gradients(retention_chunkwise, case, chunk_size=chunk_size)
    for other in (parallel, chunkwise):
        for mine, definition in zip(other, expected, strict=True):
            assert torch.isfinite(mine).all()
            assert relative(mine, definition) < TOLERANCE


@settings(max_examples=40, deadline=None)
@given(case=cases(), data=st.data())
def test_any_split_with_any_form_gives_the_whole(case: dict, data: st.DataObject) -> None:
    length = case["q"].shape[2]
    split = data.draw(st.integers(0, length))
    forms = [
        (retention_parallel, {}),
        (retention_recurrent, {}),
        (retention_chunkwise, {"chunk_size": data.draw(st.integers(1, 9))}),
    ]
    out, state = run(retention_recurrent, case)
    parts, carried = [], case["initial_state"]
    for cut in (slice(0, split), slice(split, length)):
        if cut.start == cut.stop:
            continue
        piece = {name: case[name][:, :, cut] for name in ("q", "k", "v")}
        for name in ("valid", "resets"):
            piece[name] = None if case[name] is None else case[name][:, cut]
        form, options = data.draw(st.sampled_from(forms))
        own = case["log_decay"]
        own = own[..., cut] if own.dim() == 3 else own
        piece |= {"log_decay": own, "initial_state": carried}
        part, carried = run(form, piece, **options)
        parts.append(part)
    assert relative(torch.cat(parts, dim=2), out) < TOLERANCE
    assert relative(carried, state) < TOLERANCE


def random_case(
    length: int,
    heads: int = 2,
    dtype: torch.dtype = torch.float64,
    rows: int = 2,
    widths: tuple[int, int] = (4, 6),
) -> dict:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(rows, heads, length, d, generator=generator, dtype=torch.float64).to(dtype)
        for d in (widths[0], *widths)
    )
    empty = dict.fromkeys(("initial_state", "valid", "resets"))
    return {"q": q, "k": k, "v": v, "log_decay": head_log_decay("paper", heads), **empty}


@pytest.mark.parametrize("flags", [(), ("valid",), ("resets",), ("valid", "resets")])
def test_texts_longer_than_a_span(flags: tuple[str, ...]) -> None:
    case = random_case(150)
    for seed, name in enumerate(flags):
        generator = torch.Generator().manual_seed(seed)
        case[name] = torch.rand(2, 150, generator=generator) < {"valid": 0.7, "resets": 0.05}[name]
    expected = run_with_gradients(retention_recurrent, case)
    for chunk_size in (1, 2, 4):
        assert _span(chunk_size, 2) < 150
        mine = run_with_gradients(retention_chunkwise, case, chunk_size=chunk_size)
        for a, b in zip(mine, expected, strict=True):
            assert relative(a, b) < TOLERANCE


def test_equation_by_hand() -> None:
    """o_n = sum_m g^(n-m) (q_n k_m) v_m, written out for three tokens."""
    q, k, v = (torch.tensor(x, dtype=torch.float64).view(1, 1, 3, 1) for x in
               ([1.0, 2.0, 3.0], [1.0, -1.0, 2.0], [1.0, 3.0, 5.0]))  # fmt: skip
    out, state = retention_recurrent(q, k, v, torch.tensor([0.5], dtype=torch.float64).log())
    assert out.flatten().tolist() == pytest.approx([1.0, 2 * (0.5 - 3.0), 3 * (0.25 - 1.5 + 10)])
    assert state.item() == pytest.approx(0.25 - 1.5 + 10)


@pytest.mark.parametrize("chunk_size", [1, 16, 100, 500])
def test_float32_is_close_to_float64(chunk_size: int) -> None:
    wide, narrow = random_case(300), random_case(300, dtype=torch.float32)
    expected = run_with_gradients(retention_recurrent, wide)
    for form, options in (
        (retention_recurrent, {}),
        (retention_parallel, {}),
        (retention_chunkwise, {"chunk_size": chunk_size}),
    ):
        for a, b in zip(run_with_gradients(form, narrow, **options), expected, strict=True):
            assert a.dtype == torch.float32
            assert relative(a.double(), b) < 1e-4


def test_low_precision_inputs_are_computed_in_float32() -> None:
    """A bfloat16 sum of ones sticks at 256; the state must not."""
    ones = torch.ones(1, 1, 2000, 1, dtype=torch.bfloat16)
    for form, options in (
        (retention_recurrent, {}),
        (retention_parallel, {}),
        (retention_chunkwise, {"chunk_size": 64}),
    ):
        out, state = form(ones, ones, ones, torch.zeros(1), **options)
        assert out.dtype == state.dtype == torch.float32
        assert state.item() == 2000


@pytest.mark.parametrize("form", [retention_parallel, retention_chunkwise, retention_recurrent])
def test_causal(form) -> None:
    case = random_case(20)
    options = {"chunk_size": 6} if form is retention_chunkwise else {}
    out, _ = run(form, case, **options)
    changed = {**case, "k": case["k"].clone(), "v": case["v"].clone()}
    changed["k"][:, :, 13:] += 1
    changed["v"][:, :, 13:] += 1
    other, _ = run(form, changed, **options)
    assert torch.equal(out[:, :, :13], other[:, :, :13])
    assert not torch.allclose(out[:, :, 13:], other[:, :, 13:])


def test_chunkwise_keeps_nothing_of_size_t_by_t_nor_a_state_per_token() -> None:
    """What the backward pass keeps grows linearly with T."""

    def kept(length: int) -> int:
        case = random_case(length, dtype=torch.float32)
        sizes: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        leaves = {n: case[n].clone().requires_grad_() for n in ("q", "k", "v")}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out, _ = run(retention_chunkwise, {**case, **leaves}, chunk_size=16)
        assert out.requires_grad
        return sum(sizes.values())

    assert kept(2048) / kept(1024) < 2.1
    state_per_token = 2048 * 2 * 2 * 4 * 6 * 4
    assert kept(2048) < 5 * state_per_token


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": torch.zeros(2, 2, 5, 3)}, "must be"),
        ({"log_decay": torch.zeros(3)}, "log_decay"),
        ({"initial_state": torch.zeros(2, 2, 4, 4)}, "initial_state"),
        ({"valid": torch.ones(2, 4, dtype=torch.bool)}, "valid"),
        ({"resets": torch.ones(1, 5, dtype=torch.bool)}, "resets"),
    ],
)
def test_shapes_that_do_not_fit(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        run(retention_parallel, {**random_case(5), **change})


def test_no_rows() -> None:
    case = {name: x[:0] if name in ("q", "k", "v") else x for name, x in random_case(5).items()}
    out, state = run(retention_chunkwise, case, chunk_size=2)
    assert out.shape == (0, 2, 5, 6) and state.shape == (0, 2, 4, 6)


def test_no_tokens_and_no_chunk() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        run(retention_parallel, random_case(0))
    with pytest.raises(ValueError, match="chunk_size"):
        run(retention_chunkwise, random_case(5), chunk_size=0)


def test_the_state_owns_no_more_memory_than_it_needs() -> None:
    """A view of all chunks' states would keep them alive in every cache."""
    case = random_case(100)
    for form, options in (
        (retention_parallel, {}),
        (retention_recurrent, {}),
        (retention_chunkwise, {"chunk_size": 8}),
    ):
        _, state = run(form, case, **options)
        assert state.is_contiguous()
        assert state.untyped_storage().nbytes() == state.numel() * state.element_size()


def test_autocast_reaches_no_form_and_no_backward_pass() -> None:
    case = random_case(30, dtype=torch.float32)
    expected = run_with_gradients(retention_recurrent, case)
    for form, options in (
        (retention_recurrent, {}),
        (retention_parallel, {}),
        (retention_chunkwise, {"chunk_size": 8}),
    ):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mine = run_with_gradients(form, case, **options)
        for a, b in zip(mine, expected, strict=True):
            if form is retention_chunkwise or a is mine[0] or a is mine[1]:
                assert a.dtype == torch.float32
                assert relative(a, b) < 1e-4


@pytest.mark.parametrize(
    ("rows", "chunk_size", "span"), [(1, 64, 2048), (3, 64, 640), (8, 64, 512), (1, 16, 512)]
)
def test_spans_of_few_rows_are_longer(rows: int, chunk_size: int, span: int) -> None:
    """2,048 tokens of all rows, but never fewer than 8 chunks of a row or more than 32."""
    assert _span(chunk_size, rows) == span


@pytest.mark.parametrize("per_token", [False, True])
def test_products_of_bfloat16(per_token: bool) -> None:
    """Outputs and gradients to its rounding; states and decays keep their digits."""
    torch.manual_seed(0)
    shape = 2, 3, 70
    q, k, v = (torch.randn(*shape, n, dtype=torch.float64) for n in (16, 16, 24))
    log_decay = torch.tensor([0.9, 0.99, 0.999], dtype=torch.float64).log()
    if per_token:
        log_decay = torch.nn.functional.logsigmoid(torch.randn(shape, dtype=torch.float64)) / 16
    state = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    resets = torch.rand(2, 70) < 0.03
    weights = torch.randn(*shape, 24, dtype=torch.float64)

    def outcome(dtype: torch.dtype, products: torch.dtype | None) -> list[torch.Tensor]:
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v, state)]
        decay = log_decay.to(dtype).requires_grad_(per_token)
        out, last = retention_chunkwise(
            *inputs[:3], decay, chunk_size=16, initial_state=inputs[3], resets=resets,
            products=products,
        )  # fmt: skip
        assert out.dtype == (products or dtype) and last.dtype == dtype
        total = (out.to(dtype) * weights.to(dtype)).sum() + last.sum()
        wanted = [*inputs, decay] if per_token else inputs
        return [out, last, *torch.autograd.grad(total, wanted)]

    exact = outcome(torch.float64, None)
    wide, narrow = outcome(torch.float32, None), outcome(torch.float32, torch.bfloat16)
    for x, y, z in zip(exact, wide, narrow, strict=True):
        spread = x.std()
        assert (y - x).abs().max() < 1e-5 * spread
        assert 1e-4 * spread < (z - x).abs().max() < 0.15 * spread
        assert (z - x).square().mean().sqrt() < 0.008 * spread
