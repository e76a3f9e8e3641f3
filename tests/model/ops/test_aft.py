"""The forms of the attention-free transformer are one function, that of the equation."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.func import grad, vmap

from retnet.model.ops.aft import aft_parallel, aft_recurrent
from retnet.model.ops.aft_state import aft_state
from tests.model.ops.aft_cases import (
    FORMS,
    T_MAX,
    TOLERANCE,
    WINDOWS,
    assert_alike,
    cases,
    difference,
    direct,
    make_case,
    run,
    run_with_gradients,
)

REFERENCE = Path(__file__).parent / "reference" / "aft"


@settings(max_examples=50, deadline=None)
@given(case=cases(), span=st.sampled_from([1, 8, 16, 32, 64]))
def test_forms_agree_in_outputs_states_and_gradients(case: dict, span: int) -> None:
    expected = run_with_gradients(aft_recurrent, case)
    assert_alike(run_with_gradients(aft_parallel, case, span=span), expected)
    if case["initial_state"] is None:
        assert difference(expected["out"], direct(case)) < TOLERANCE


@settings(max_examples=30, deadline=None)
@given(case=cases(), data=st.data())
def test_any_split_with_any_form_gives_the_whole(case: dict, data: st.DataObject) -> None:
    length = case["q"].shape[1]
    split = data.draw(st.integers(0, length))
    out, state = run(aft_recurrent, case)
    parts, carried = [], case["initial_state"]
    for cut in (slice(0, split), slice(split, length)):
        if cut.start == cut.stop:
            continue
        piece = case | {"initial_state": carried}
        for name in ("q", "k", "v", "positions", "valid", "resets"):
            piece[name] = None if case[name] is None else case[name][:, cut]
        part, carried = run(data.draw(st.sampled_from(FORMS)), piece)
        parts.append(part)
    mask = 1.0 if case["valid"] is None else case["valid"][..., None]
    assert difference(torch.cat(parts, 1) * mask, out * mask) < TOLERANCE
    assert_alike(carried, state)


@pytest.mark.parametrize("window", [0, 3, None])
@pytest.mark.parametrize("flags", [(), ("valid", "resets")])
def test_second_derivatives(window: int | None, flags: tuple[str, ...]) -> None:
    case = make_case(3, length=19, width=2, window=window, flags=flags, prefix=3)
    expected = run_with_gradients(aft_recurrent, case, order=2)
    assert_alike(run_with_gradients(aft_parallel, case, order=2, span=16), expected, 1e-9)


@pytest.mark.parametrize("window", [0, 3, None])
def test_gradcheck(window: int | None) -> None:
    case = make_case(5, rows=1, length=19, width=1, window=window, prefix=2)
    names = ("q", "k", "v", "w_u", "w_v")

    def function(*leaves: Tensor) -> Tensor:
        return run(aft_parallel, case | dict(zip(names, leaves, strict=True)), span=16)[0]

    assert torch.autograd.gradcheck(
        function, [case[n].requires_grad_() for n in names], fast_mode=True
    )


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reference_values(name: str, form, dtype: torch.dtype) -> None:
    """Of labml-nn, see reference/aft/README.md."""
    stored = load_file(REFERENCE / f"{name}.safetensors")
    tolerance = {torch.float64: 1e-13, torch.float32: 2e-6}[dtype] * (10 if "hard" in name else 1)
    case = {n: x.to(dtype) for n, x in stored.items()}
    length = case["q"].shape[1]
    if "w" in case:  # as a product
        case |= {"w_u": case["w"], "w_v": torch.eye(length, dtype=dtype)}
    leaves = {n: case[n].requires_grad_() for n in ("q", "k", "v", "w_u") if n in case}
    w = case.get("w_u"), case.get("w_v")
    q, k, v = (case[n] for n in "qkv")
    positions = torch.arange(length)[None]
    out, state = form(q, k, v, positions, *w, window=WINDOWS[name])
    assert out.dtype == dtype and difference(out, stored["out"]) < tolerance
    if "probe" in case:
        grads = torch.autograd.grad((out * case["probe"]).sum(), list(leaves.values()))
        for leaf, x in zip(leaves, grads, strict=True):
            assert difference(x, stored["grad_" + leaf.removesuffix("_u")]) < tolerance
    if WINDOWS[name] == 0:
        _, state20 = form(*(x[:, :20] for x in (q, k, v)), window=0)
        for prefix, found in (("state", state), ("state20", state20)):
            for n, x in found.items():
                assert difference(x, stored[f"{prefix}_{n}"]) < tolerance


@pytest.mark.parametrize("window", [0, 5, None])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("loud", [1.0, 90.0, 1000.0])
def test_causal_with_loud_late_keys(window: int | None, form, loud: float) -> None:
    case = make_case(0, length=40, window=window, dtype=torch.float32)
    options = {"span": 16} if form is aft_parallel else {}
    out, _ = run(form, case, **options)
    for t in (1, 7, 8, 21, 39):
        changed = case | {"k": case["k"].clone(), "v": case["v"].clone()}
        changed["k"][:, t:] += loud
        changed["v"][:, t:] += 1
        other, _ = run(form, changed, **options)
        assert torch.isfinite(other).all()
        assert torch.equal(out[:, :t], other[:, :t])
        assert not torch.allclose(out[:, t:], other[:, t:])


@pytest.mark.parametrize("window", [0, 5, None])
def test_loud_keys_in_float32(window: int | None) -> None:
    """Keys up to some +-100, with padding and documents: outputs, states and gradients."""
    options = {"length": 40, "window": window, "loud": 40.0, "flags": ("valid", "resets")}
    expected = run_with_gradients(aft_recurrent, make_case(4, **options))
    narrow = make_case(4, **options, dtype=torch.float32)
    for form in FORMS:
        found = run_with_gradients(form, narrow)
        assert_alike({n: x.double() for n, x in found.items()}, expected, 1e-4)


def test_w_of_a_wide_range_is_finite() -> None:
    """Beyond what products of factors can tell apart in float32."""
    case = make_case(0, length=40, window=None, dtype=torch.float32)
    case |= {"w_u": 10 * case["w_u"], "w_v": 10 * case["w_v"], "k": 50 * case["k"]}
    assert all(torch.isfinite(x).all() for x in run_with_gradients(aft_parallel, case).values())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("window", [0, 4, None])
def test_padding_anywhere_changes_nothing(form, window: int | None) -> None:
    """Also not where its keys and values are no numbers."""
    case = make_case(1, rows=1, length=20, window=window)
    out, state = run(form, case)
    for columns in (range(5, 25), range(20), [*range(3), *range(6, 9), *range(11, 25)]):
        valid = torch.zeros(1, 25, dtype=torch.bool)
        valid[:, list(columns)] = True
        padded = case | {"valid": valid, "positions": torch.full((1, 25), 999)}
        padded["positions"][valid] = case["positions"][0]
        for name in "qkv":
            padded[name] = torch.full((1, 25, 3), 0.0 if name == "q" else torch.nan).double()
            padded[name][valid] = case[name][0]
        other, last = run(form, padded)
        assert torch.isfinite(other).all()
        assert difference(other[valid], out[0]) < TOLERANCE
        if window is not None:
            assert_alike(last, state)


def test_positions_may_leave_gaps_and_be_shared_by_rows() -> None:
    case = make_case(2, window=4)
    case["positions"] = torch.arange(20)[None].repeat(2, 1) * 2
    case["positions"][:, 10:] += 3
    shared = case | {"positions": case["positions"][:1]}
    for form in FORMS:
        for own in (case, shared):
            assert difference(run(form, own)[0], direct(case)) < TOLERANCE
    assert_alike(run_with_gradients(aft_parallel, shared), run_with_gradients(aft_recurrent, case))


@pytest.mark.parametrize("form", FORMS)
def test_columns_are_written_in_place_where_there_is_room(form) -> None:
    case = make_case(0, length=10, window=None)
    out, _ = run(form, case)
    state = aft_state(2, 3, window=None, capacity=6, dtype=torch.float64)
    reserved, parts = state["keys"], []
    with torch.no_grad():
        for past in range(0, 10, 2):
            piece = case | {n: case[n][:, past : past + 2] for n in ("q", "k", "v", "positions")}
            part, state = run(form, piece | {"initial_state": state}, past=past)
            parts.append(part)
            assert (state["keys"] is reserved) == (past < 6)
    assert difference(torch.cat(parts, 1), out) < TOLERANCE
    assert state["keys"].shape[1] == 12 and torch.equal(state["keys"][:, :10], case["k"])
    _, state = run(form, piece | {"initial_state": state}, past=8)  # with gradients on, a new one
    assert state["keys"].shape[1] == 10


@pytest.mark.parametrize(("window", "numbers"), [(0, 3 * 8), (5, 3 * 8 + 2 * 5 * 8)])
def test_the_state_has_the_size_of_its_formula(window: int, numbers: int) -> None:
    for length in (1, 30):
        for form in FORMS:
            _, state = run(form, make_case(0, 1, length, 8, window))
            found = sum(x.numel() for name, x in state.items() if name != "positions")
            assert found == numbers
            expected = aft_state(1, 8, window=window, dtype=torch.float64)
            assert {n: (x.shape, x.dtype) for n, x in state.items()} == {
                n: (x.shape, x.dtype) for n, x in expected.items()
            }
            for x in state.values():
                assert x.untyped_storage().nbytes() == x.numel() * x.element_size()


@pytest.mark.parametrize("window", [0, 4])
def test_memory_is_linear_and_holds_no_block_of_pairs(window: int) -> None:
    def kept(length: int) -> int:
        case = make_case(0, 1, 1, 16, window, dtype=torch.float32)
        leaves = {n: torch.randn(1, length, 16, requires_grad=True) for n in "qkv"}
        case |= leaves | {"positions": torch.arange(length)[None] % T_MAX}
        case["resets"] = case["positions"] == 0
        sizes: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out, _ = run(aft_parallel, case)
        assert out.requires_grad
        return sum(sizes.values())

    assert kept(4096) / kept(2048) < 2.1
    assert kept(2048) < 24 * 2048 * 16 * 4


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("window", [0, 4, None])
def test_low_precision_and_autocast_are_computed_in_float32(form, window: int | None) -> None:
    case = make_case(0, length=20, window=window, dtype=torch.bfloat16)
    wide = {n: x.float() if n in ("q", "k", "v", "w_u", "w_v") else x for n, x in case.items()}
    expected, last = run(form, wide)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for own in (case, wide):
            out, state = run(form, own)
            assert out.dtype == torch.float32 and difference(out, expected) < 1e-6
            for name, x in state.items():
                assert difference(x, last[name]) < 1e-6
    if window != 0:
        assert run(form, case)[1]["keys"].dtype == torch.bfloat16
    state = run(form, case)[1]
    assert run(form, wide | {"initial_state": state})[0].dtype == torch.float32
    double = {n: x.double() if n in ("q", "k", "v", "w_u", "w_v") else x for n, x in case.items()}
    out, state = run(form, double | {"initial_state": state})
    assert out.dtype == torch.float64
    assert all(x.dtype == torch.float64 for n, x in state.items() if n in ("num", "den", "max"))


@pytest.mark.slow
@pytest.mark.parametrize("window", [0, 4, None])
def test_compiled_into_one_graph(window: int | None) -> None:
    case = make_case(0, length=11, width=2, window=window, flags=("valid", "resets"), prefix=2)
    compiled = torch.compile(aft_parallel, backend="aot_eager", fullgraph=True)
    assert_alike(run_with_gradients(compiled, case), run_with_gradients(aft_parallel, case))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("window", [0, 4, None])
def test_transforms_of_torch_func(window: int | None) -> None:
    case = make_case(0, length=11, width=2, window=window)
    stacked = [torch.stack((case[n], 2 * case[n])) for n in "qkv"]
    found = []
    for form in FORMS:

        def cost(q: Tensor, k: Tensor, v: Tensor, form=form) -> Tensor:
            return run(form, case | {"q": q, "k": k, "v": v})[0].pow(2).sum()

        found.append(vmap(grad(cost, argnums=(0, 1, 2)))(*stacked))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": torch.zeros(2, 5, 4)}, "must all be"),
        ({"valid": torch.ones(2, 4, dtype=torch.bool)}, "valid"),
        ({"resets": torch.ones(1, 5, dtype=torch.bool)}, "resets"),
        ({"positions": torch.zeros(2, 4, dtype=torch.int64)}, "positions"),
        ({"w_v": None}, "w_u and w_v"),
        ({"window": -1}, "window"),
        ({"initial_state": aft_state(2, 4, window=4)}, "initial_state"),
        ({"initial_state": aft_state(2, 3, window=5)}, "initial_state"),
    ],
)
def test_what_does_not_fit(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        run(aft_parallel, make_case(0, length=5) | change)
    with pytest.raises(ValueError, match="span"):
        run(aft_parallel, make_case(0, length=5), span=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("window", [0, 4, None])
def test_no_rows(form, window: int | None) -> None:
    out, state = run(form, make_case(0, rows=0, length=5, window=window))
    assert out.shape == (0, 5, 3) and all(x.shape[0] == 0 for x in state.values())
