"""FAVOR+: public numbers, three forms that are one function, and its random matrix."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from retnet.model.ops.favor import (
    FavorState,
    favor_chunkwise,
    favor_parallel,
    favor_recurrent,
    favor_state,
    running_maximum,
)
from retnet.model.ops.random_features import favor_projection

REFERENCE = Path(__file__).parent / "reference" / "performer"
FORMS: list[tuple[Any, dict[str, int]]] = [
    (favor_recurrent, {}),
    (favor_parallel, {}),
    (favor_chunkwise, {"chunk_size": 2}),
    (favor_chunkwise, {"chunk_size": 64}),
]
EMPTY = dict.fromkeys(("initial_state", "valid", "resets"))
NAMES = ("q", "k", "v", "projection")


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference in units of the largest value, but at least of 1."""
    return ((a.double() - b).abs().max() / b.abs().max().clamp(min=1)).item()


def run(form: Any, case: dict, **options: int) -> tuple[Tensor, FavorState]:
    rest = {key: case[key] for key in EMPTY}
    return form(*(case[name] for name in NAMES), **rest, **options)


def reference(name: str, dtype: torch.dtype) -> dict:
    case = load_file(REFERENCE / f"{name}.safetensors")
    return case | EMPTY | {x: case[x].to(dtype).requires_grad_() for x in NAMES}


def sums_of(case: dict, prefix: str) -> Tensor:
    return torch.cat((case[f"{prefix}_s"], case[f"{prefix}_z"][..., None]), dim=-1)


@pytest.mark.parametrize(("form", "options"), FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["eps0_t37", "eps0_t300", "eps0_hard_t48"])
def test_public_numbers(name: str, dtype: torch.dtype, form: Any, options: dict) -> None:
    """In float32 the hard case, with exponents from -243, is not finite without a maximum."""
    case = reference(name, dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5 if "hard" in name else 2e-6
    out, state = run(form, case, **options)
    expected = case["out_every_10th"] if name == "eps0_t300" else case["out"]
    mine = out[:, :, 9::10] if name == "eps0_t300" else out
    assert relative(mine, expected) < tolerance
    assert relative(state.sums, sums_of(case, "state")) < tolerance
    assert relative(state.maximum, case["state_max"]) < tolerance
    if "grad_q" in case:
        leaves = [case[x] for x in "qkv"]
        found = torch.autograd.grad((out * case["probe"].to(dtype)).sum(), leaves)
        for grad, x in zip(found, "qkv", strict=True):
            assert relative(grad, case[f"grad_{x}"]) < (1e-12 if tolerance == 1e-12 else 5e-6)


@pytest.mark.parametrize("name", ["eps0_t37", "eps0_hard_t48"])
def test_hand_over_after_20_tokens(name: str) -> None:
    case = reference(name, torch.float64)
    start = case | {x: case[x][:, :, :20] for x in "qkv"}
    _, state = run(favor_chunkwise, start, chunk_size=8)
    assert relative(state.sums, sums_of(case, "state20")) < 1e-12
    assert relative(state.maximum, case["state20_max"]) < 1e-12
    rest = case | {x: case[x][:, :, 20:] for x in "qkv"} | {"initial_state": state}
    assert relative(run(favor_recurrent, rest)[0], case["out"][:, :, 20:]) < 1e-12


@pytest.mark.parametrize(("form", "options"), FORMS)
def test_early_outputs_where_public_codes_look_ahead(form: Any, options: dict) -> None:
    case = reference("leak_t48", torch.float64)
    out, _ = run(form, case | {"k": case["k_late_scaled"].double()}, **options)
    assert relative(out, case["out_late_scaled_eps0"]) < 1e-12


@st.composite
def cases(draw: st.DrawFn) -> dict:
    """Tensors of random shapes, perhaps with initial state, padding and several documents."""
    batch, heads, length = (
        draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 20)),
    )
    key_dim, value_dim = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def flags(probability: float) -> Tensor:
        return torch.rand(batch, length, generator=generator) < probability

    features = draw(st.integers(1, 7))
    sums = normal(batch, heads, features, value_dim + 1)
    sums[..., -1] = sums[..., -1].exp()
    state = FavorState(sums, 5 * normal(batch, heads))
    loudness = draw(st.sampled_from([1, 8]))
    return {
        "q": normal(batch, heads, length, key_dim) * loudness,
        "k": normal(batch, heads, length, key_dim) * loudness,
        "v": normal(batch, heads, length, value_dim),
        "projection": normal(features, key_dim),
        "initial_state": state if draw(st.booleans()) else None,
        "valid": flags(0.7) if draw(st.booleans()) else None,
        "resets": flags(0.2) if draw(st.booleans()) else None,
    }


def with_leaves(case: dict) -> tuple[dict, list[Tensor]]:
    """The case with inputs that ask for gradients (a maximum has none), and those."""
    mine = case | {name: case[name].clone().requires_grad_() for name in NAMES}
    leaves = [mine[name] for name in NAMES]
    if case["initial_state"] is not None:
        sums, maximum = case["initial_state"]
        leaves.append(sums.clone().requires_grad_())
        mine["initial_state"] = FavorState(leaves[-1], maximum)
    return mine, leaves


def run_with_gradients(form: Any, case: dict, **options: int) -> list[Tensor]:
    """Outputs, state, and the gradients of a fixed function of both."""
    case, leaves = with_leaves(case)
    out, state = run(form, case, **options)
    assert torch.isfinite(out).all() and not state.maximum.requires_grad
    if case["valid"] is not None:
        out = out.where(case["valid"][:, None, :, None], 0.0)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    loss = (out * weights).sum() + state.sums.sin().sum()
    gradients = torch.autograd.grad(loss, leaves)
    return [out.detach(), state.sums.detach(), state.maximum, *gradients]


@settings(max_examples=25, deadline=None)
@given(case=cases(), chunk_size=st.integers(1, 30))
def test_forms_agree_in_outputs_states_and_gradients(case: dict, chunk_size: int) -> None:
    expected = run_with_gradients(favor_recurrent, case)
    parallel = run_with_gradients(favor_parallel, case)
    chunkwise = run_with_gradients(favor_chunkwise, case, chunk_size=chunk_size)
    for other in (parallel, chunkwise):
        for mine, definition in zip(other, expected, strict=True):
            assert torch.isfinite(mine).all()
            assert relative(mine, definition) < 1e-10


@settings(max_examples=25, deadline=None)
@given(case=cases(), data=st.data())
def test_any_split_with_any_form_gives_the_whole(case: dict, data: st.DataObject) -> None:
    length = case["q"].shape[2]
    split = data.draw(st.integers(1, length))
    out, state = run(favor_recurrent, case)
    parts, carried = [], case["initial_state"]
    for cut in (slice(0, split), slice(split, length))[: 1 + (split < length)]:
        piece = case | {name: case[name][:, :, cut] for name in "qkv"}
        piece["initial_state"] = carried
        for name in ("valid", "resets"):
            piece[name] = None if case[name] is None else case[name][:, cut]
        form, options = data.draw(st.sampled_from(FORMS))
        part, carried = run(form, piece, **options)
        parts.append(part)
    assert relative(torch.cat(parts, dim=2), out) < 1e-10
    assert_same(carried, state)


def assert_same(a: FavorState, b: FavorState) -> None:
    assert relative(a.sums, b.sums) < 1e-10
    assert relative(a.maximum, b.maximum) < 1e-10


def random_case(length: int, dtype: torch.dtype = torch.float64, rows: int = 2) -> dict:
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, 3, length, 4)] * 2 + [(rows, 3, length, 6), (9, 4)]
    values = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    return EMPTY | dict(zip(NAMES, values, strict=True))


@pytest.mark.parametrize("exponent", [1e2, 1e4])
@pytest.mark.parametrize(("form", "options"), FORMS)
def test_loud_late_keys_change_nothing_before_them(
    form: Any, options: dict, exponent: float
) -> None:
    case = random_case(20, torch.float32)
    loudest = case["projection"][0]
    loudest *= (2 * exponent) ** 0.5 / loudest.norm()
    out, state = run(form, case, **options)
    loud = case | {"k": case["k"].clone(), "v": case["v"].clone()}
    loud["k"][:, :, 13:] = loudest * 4**0.25  # x' = w, whose exponent is |w|^2 / 2
    loud["v"][:, :, 13:] = -1e4
    other, after = run(form, loud, **options)
    assert after.maximum == pytest.approx(torch.full((2, 3), exponent))
    assert torch.equal(out[:, :, :13], other[:, :, :13])
    for x in (out, other, state.sums, after.sums):
        assert torch.isfinite(x).all()
    assert not torch.allclose(out[:, :, 13:], other[:, :, 13:])


@pytest.mark.parametrize(("form", "options"), FORMS)
@pytest.mark.parametrize("scale", [1.0, 30.0, 100.0])
def test_float32_gradients_are_finite(form: Any, options: dict, scale: float) -> None:
    """Also where a query's weights of all keys are 0 beside the loudest key."""
    case = random_case(30, torch.float32)
    case["q"] *= scale
    case["k"] *= scale
    case["valid"] = torch.arange(30)[None].expand(2, -1) > 4
    for x in run_with_gradients(form, case, **options):
        assert torch.isfinite(x).all()


@pytest.mark.parametrize(("form", "options"), FORMS)
def test_padding_anywhere_and_documents_are_as_if_alone(form: Any, options: dict) -> None:
    case = random_case(12, rows=1)
    alone, state = run(form, case, **options)
    for keep in (range(5, 17), range(12), [0, 1, 2, 7, 8, 9, 10, 11, 13, 14, 15, 16]):
        padded = {n: torch.full((1, 3, 17, case[n].shape[3]), 9.0).double() for n in "qkv"}
        valid = torch.zeros(1, 17, dtype=torch.bool)
        valid[:, list(keep)] = True
        for name in "qkv":
            padded[name][:, :, list(keep)] = case[name]
        out, after = run(form, case | padded | {"valid": valid}, **options)
        assert torch.isfinite(out).all()
        assert relative(out[:, :, list(keep)], alone) < 1e-12
        assert_same(after, state)
    twice = {name: torch.cat((case[name] * 3, case[name]), dim=2) for name in "qkv"}
    resets = torch.arange(24)[None] == 12
    out, after = run(form, case | twice | {"resets": resets}, **options)
    assert relative(out[:, :, 12:], alone) < 1e-12
    assert_same(after, state)
    _, after = run(form, case | {"valid": torch.zeros(1, 12, dtype=torch.bool)}, **options)
    assert_same(after, favor_state(1, 3, 9, 6, dtype=torch.float64))


@pytest.mark.parametrize(("form", "options"), FORMS)
def test_texts_longer_than_a_span(form: Any, options: dict) -> None:
    case = random_case(50)
    case["resets"] = torch.rand(2, 50, generator=torch.Generator().manual_seed(2)) < 0.05
    expected = run_with_gradients(favor_recurrent, case)
    for mine, definition in zip(run_with_gradients(form, case, **options), expected, strict=True):
        assert relative(mine, definition) < 1e-10


@pytest.mark.parametrize(("form", "options"), FORMS)
def test_sums_are_wide_whatever_the_inputs(form: Any, options: dict) -> None:
    """A bfloat16 sum of ones sticks at 256, a float16 one ends at 65504. No autocast either."""
    ones = torch.ones(1, 1, 600, 1, dtype=torch.bfloat16)
    case = EMPTY | {"q": ones, "k": ones, "v": 300 * ones, "projection": ones[0, 0, :1]}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, state = run(form, case, **options)
    assert out.dtype == state.sums.dtype == state.maximum.dtype == torch.float32
    assert state.sums.flatten().tolist() == [180_000, 600] and state.maximum.item() == 0.5
    assert (out - 300).abs().max() < 1e-3


def test_chunkwise_keeps_nothing_of_size_t_by_t() -> None:
    def kept(length: int) -> int:
        case, _ = with_leaves(random_case(length, torch.float32))
        sizes: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out, _ = run(favor_chunkwise, case, chunk_size=16)
        assert out.requires_grad
        return sum(sizes.values())

    assert kept(2048) / kept(1024) < 2.1


def test_the_state_owns_no_more_memory_than_it_needs() -> None:
    for form, options in FORMS:
        for state in run(form, random_case(50), **options)[1]:
            assert state.untyped_storage().nbytes() == state.numel() * state.element_size()


def test_gradcheck() -> None:
    """Outputs depend on no maximum: its missing gradient is none."""
    case = random_case(5, rows=1)
    case["initial_state"] = run(favor_recurrent, case)[1]
    _, leaves = with_leaves(case)

    def function(*values: Tensor) -> Tensor:
        state = FavorState(values[-1], case["initial_state"].maximum)
        own = dict(zip(NAMES, values[:-1], strict=True)) | {"initial_state": state}
        return run(favor_chunkwise, case | own, chunk_size=2)[0][..., :2]

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def test_running_maximum() -> None:
    values = torch.tensor([[[1.0, 3.0, 2.0, 0.0, -1.0, 5.0, 4.0]]])
    resets = torch.tensor([[False, False, True, False, True, False, False]])
    start = torch.tensor([[2.0]])
    assert running_maximum(values, start, None).flatten().tolist() == [2, 3, 3, 3, 3, 5, 5]
    assert running_maximum(values, start, resets).flatten().tolist() == [2, 3, 2, 2, -1, 5, 5]


@pytest.mark.parametrize(("features", "key_dim"), [(44, 16), (16, 16), (5, 16), (3, 1)])
def test_projection(features: int, key_dim: int) -> None:
    """Orthogonal rows in blocks, of the lengths that Gaussian rows have."""
    rows = favor_projection(features, key_dim, seed=3)
    assert rows.shape == (features, key_dim) and rows.dtype == torch.float32
    for block in rows.split(key_dim):
        products = block @ block.T
        lengths = products.diagonal()
        assert (products - lengths.diag()).abs().max() < 1e-5
        assert lengths.unique().numel() == len(block)


def test_projection_depends_on_its_arguments_only() -> None:
    torch.manual_seed(0)
    first = favor_projection(8, 4, seed=1, layer=2, redraws=3)
    expected = torch.rand(1)
    torch.manual_seed(0)
    with torch.device("meta"):
        assert torch.equal(favor_projection(8, 4, seed=1, layer=2, redraws=3), first)
    assert torch.equal(torch.rand(1), expected)  # and takes nothing from the global generator
    others = [(1, 2, 4), (1, 3, 3), (2, 2, 3), (1, 23, 0), (12, 3, 0)]
    drawn = [favor_projection(8, 4, seed=s, layer=n, redraws=r) for s, n, r in others]
    assert len({x[0, 0].item() for x in [first, *drawn]}) == 6


def test_features_estimate_the_exponential() -> None:
    """The mean of phi(q) phi(k) is exp(q k / sqrt(D)): directions and lengths have no bias."""
    q, k = torch.tensor([[1.0, 0.5, -0.5, 0.2], [-0.4, 0.3, 0.9, 0.1]]).double()
    rows = favor_projection(100_000, 4, seed=0).double()
    assert rows.mean(0).abs().max() < 0.02 and (rows.square().mean(0) - 1).abs().max() < 0.02
    x, y = q * 4**-0.25, k * 4**-0.25
    mean = (rows @ (x + y) - (x @ x + y @ y) / 2).exp().mean()
    assert mean.item() == pytest.approx((q @ k / 2).exp().item(), rel=0.02)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": torch.zeros(2, 3, 5, 3)}, "must be"),
        ({"projection": torch.zeros(9, 3)}, "projection"),
        ({"initial_state": favor_state(2, 3, 9, 5)}, "initial_state.sums"),
        ({"initial_state": favor_state(2, 3, 9, 6)._replace(maximum=torch.zeros(2))}, "maximum"),
        ({"valid": torch.ones(2, 4, dtype=torch.bool)}, "valid"),
        ({x: torch.zeros(2, 3, 0, 4) for x in "qkv"}, "at least 1"),
    ],
)
def test_shapes_that_do_not_fit(change: dict, words: str) -> None:
    for form, options in FORMS:
        with pytest.raises(ValueError, match=words):
            run(form, random_case(5) | change, **options)
    with pytest.raises(ValueError, match="chunk_size"):
        run(favor_chunkwise, random_case(5), chunk_size=0)
