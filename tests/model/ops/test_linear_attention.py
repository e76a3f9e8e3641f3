"""Linear attention: the authors' numbers, and three forms that are one function."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from retnet.model.ops.linear_attention import (
    elu_features,
    linear_attention_chunkwise,
    linear_attention_parallel,
    linear_attention_recurrent,
    linear_attention_state,
)

REFERENCE = Path(__file__).parent / "reference" / "linear"
FORMS: list[tuple[Any, dict[str, int]]] = [
    (linear_attention_recurrent, {}),
    (linear_attention_parallel, {}),
    (linear_attention_chunkwise, {"chunk_size": 7}),
    (linear_attention_chunkwise, {"chunk_size": 64}),
]
EMPTY = dict.fromkeys(("initial_state", "valid", "resets"))


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference in units of the largest value, but at least of 1."""
    return ((a.double() - b).abs().max() / b.abs().max().clamp(min=1)).item()


def reference(name: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], list[Tensor]]:
    """All of a case, and q, k, v as [B, H, T, D]."""
    case = load_file(REFERENCE / f"{name}.safetensors")
    if name == "layer_t37":
        weights = load_file(REFERENCE / "layer_t37.model.safetensors")
        for x, projection in (("q", "query"), ("k", "key"), ("v", "value")):
            weight = weights[f"{projection}_projection.weight"].to(dtype)
            case[x] = (case["x"].to(dtype) @ weight.T).unflatten(-1, (3, -1))
        case["o_proj"] = weights["out_projection.weight"].to(dtype)
    return case, [case[x].transpose(1, 2).to(dtype).requires_grad_() for x in "qkv"]


@pytest.mark.parametrize(("form", "options"), FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["op_t37", "op_t300", "layer_t37", "hard_eps_t64"])
def test_the_authors_numbers(name: str, dtype: torch.dtype, form: Any, options: dict) -> None:
    """On ``hard_eps_t64`` elu(x) + 1 is off by 2e-4 in float32, an eps of 1e-10 by 0.33."""
    case, (q, k, v) = reference(name, dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    out, state = form(elu_features(q), elu_features(k), v, **options)
    mine = out.transpose(1, 2)
    if name == "layer_t37":
        mine = mine.flatten(2) @ case["o_proj"].T
    expected = case["out_every_10th"] if name == "op_t300" else case["out"]
    mine = mine[:, 9::10] if name == "op_t300" else mine
    assert relative(mine, expected) < tolerance
    if "state_s" in case:
        assert relative(state[..., :-1], case["state_s"]) < tolerance
        assert relative(state[..., -1], case["state_z"]) < tolerance
    if "grad_q" in case:
        found = torch.autograd.grad((mine * case["probe"].to(dtype)).sum(), (q, k, v))
        for grad, x in zip(found, "qkv", strict=True):
            assert relative(grad.transpose(1, 2), case[f"grad_{x}"]) < tolerance


def test_hand_over_after_20_tokens() -> None:
    case, (q, k, v) = reference("op_t37", torch.float64)
    q, k = elu_features(q), elu_features(k)
    _, state = linear_attention_chunkwise(q[:, :, :20], k[:, :, :20], v[:, :, :20], chunk_size=8)
    assert relative(state[..., :-1], case["state20_s"]) < 1e-12
    assert relative(state[..., -1], case["state20_z"]) < 1e-12
    rest = (x[:, :, 20:] for x in (q, k, v))
    out, _ = linear_attention_recurrent(*rest, initial_state=state)
    assert relative(out.transpose(1, 2), case["out"][:, 20:]) < 1e-12


def test_features() -> None:
    """exp(x) and x + 1 meet at 0 with slope 1; nothing is lost of what is far below."""
    x = torch.tensor([-80.0, -20.0, -1.0, 0.0, 1e-3, 3.0, 100.0], requires_grad=True)
    features = elu_features(x)
    expected = torch.where(x.double() > 0, x.double() + 1, x.double().exp())
    torch.testing.assert_close(features.double(), expected, rtol=1e-6, atol=0)
    (slope,) = torch.autograd.grad(features.sum(), x)
    torch.testing.assert_close(slope, x.exp().clamp(max=1).detach(), rtol=1e-6, atol=0)
    low = torch.tensor([-7.0], dtype=torch.bfloat16)
    assert elu_features(low).dtype == torch.float32 and elu_features(low).item() > 9e-4
    wide = torch.randn(9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(elu_features, wide)


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

    state = torch.cat((normal(batch, heads, key_dim, value_dim),
                       normal(batch, heads, key_dim, 1).exp()), dim=-1)  # fmt: skip
    return {
        "q": normal(batch, heads, length, key_dim),
        "k": normal(batch, heads, length, key_dim) * draw(st.sampled_from([1, 30])),
        "v": normal(batch, heads, length, value_dim),
        "initial_state": state if draw(st.booleans()) else None,
        "valid": flags(0.7) if draw(st.booleans()) else None,
        "resets": flags(0.2) if draw(st.booleans()) else None,
    }


def run(form: Any, case: dict, **options: int) -> tuple[Tensor, Tensor]:
    rest = {key: value for key, value in case.items() if key not in ("q", "k", "v")}
    return form(elu_features(case["q"]), elu_features(case["k"]), case["v"], **rest, **options)


def run_with_gradients(form: Any, case: dict, **options: int) -> list[Tensor]:
    """Outputs, state, and the gradients of a fixed function of both."""
    names = [n for n in ("q", "k", "v", "initial_state") if case[n] is not None]
    leaves = {name: case[name].clone().requires_grad_() for name in names}
    out, state = run(form, {**case, **leaves}, **options)
    real = 1 if case["valid"] is None else case["valid"][:, None, :, None]
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    loss = (real * out * weights).sum() + state.sin().sum()
    return [
        (real * out).detach(),
        state.detach(),
        *torch.autograd.grad(loss, list(leaves.values())),
    ]


@settings(max_examples=25, deadline=None)
@given(case=cases(), chunk_size=st.integers(1, 30))
def test_forms_agree_in_outputs_states_and_gradients(case: dict, chunk_size: int) -> None:
    expected = run_with_gradients(linear_attention_recurrent, case)
    parallel = run_with_gradients(linear_attention_parallel, case)
    chunkwise = run_with_gradients(linear_attention_chunkwise, case, chunk_size=chunk_size)
    for other in (parallel, chunkwise):
        for mine, definition in zip(other, expected, strict=True):
            assert torch.isfinite(mine).all()
            assert relative(mine, definition) < 1e-10


@settings(max_examples=25, deadline=None)
@given(case=cases(), data=st.data())
def test_any_split_with_any_form_gives_the_whole(case: dict, data: st.DataObject) -> None:
    length = case["q"].shape[2]
    split = data.draw(st.integers(1, length))
    out, state = run(linear_attention_recurrent, case)
    parts, carried = [], case["initial_state"]
    for cut in (slice(0, split), slice(split, length))[: 1 + (split < length)]:
        piece = {name: case[name][:, :, cut] for name in "qkv"} | {"initial_state": carried}
        for name in ("valid", "resets"):
            piece[name] = None if case[name] is None else case[name][:, cut]
        form, options = data.draw(st.sampled_from(FORMS))
        part, carried = run(form, piece, **options)
        parts.append(part)
    assert relative(torch.cat(parts, dim=2), out) < 1e-10
    assert relative(carried, state) < 1e-10


def random_case(length: int, dtype: torch.dtype = torch.float64, rows: int = 2) -> dict:
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, 3, length, d) for d in (4, 4, 6)]
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)
    return {"q": q, "k": k, "v": v, **EMPTY}


@pytest.mark.parametrize(("form", "options"), FORMS)
def test_loud_late_tokens_change_nothing_before_them(form: Any, options: dict) -> None:
    case = random_case(20, torch.float32)
    out, _ = run(form, case, **options)
    loud = {**case, "k": case["k"].clone(), "v": case["v"].clone()}
    loud["k"][:, :, 13:] = 1e4
    loud["v"][:, :, 13:] = -1e4
    other, _ = run(form, loud, **options)
    assert torch.equal(out[:, :, :13], other[:, :, :13])
    assert not torch.allclose(out[:, :, 13:], other[:, :, 13:])


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
        out, after = run(form, {**EMPTY, **padded, "valid": valid}, **options)
        assert torch.isfinite(out).all()
        assert relative(out[:, :, list(keep)], alone) < 1e-12
        assert relative(after, state) < 1e-12
    twice = {name: torch.cat((case[name] * 3, case[name]), dim=2) for name in "qkv"}
    resets = torch.arange(24)[None] == 12
    out, after = run(form, {**EMPTY, **twice, "resets": resets}, **options)
    assert relative(out[:, :, 12:], alone) < 1e-12
    assert relative(after, state) < 1e-12


@pytest.mark.parametrize(("form", "options"), FORMS)
def test_sums_are_wide_whatever_the_inputs(form: Any, options: dict) -> None:
    """A bfloat16 sum of ones sticks at 256, a float16 one ends at 65504. No autocast either."""
    ones = torch.ones(1, 1, 600, 1, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, state = form(ones, ones, 300 * ones, **options)
    assert out.dtype == state.dtype == torch.float32
    assert state.flatten().tolist() == [180_000, 600]
    assert (out - 300).abs().max() < 1e-3


def test_chunkwise_keeps_nothing_of_size_t_by_t() -> None:
    def kept(length: int) -> int:
        case = random_case(length, torch.float32)
        sizes: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        leaves = {n: case[n].clone().requires_grad_() for n in "qkv"}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out, _ = run(linear_attention_chunkwise, {**case, **leaves}, chunk_size=16)
        assert out.requires_grad
        return sum(sizes.values())

    assert kept(2048) / kept(1024) < 2.1


def test_second_derivatives() -> None:
    names = ("q", "k", "v", "initial_state")
    case = random_case(5, rows=1)
    case["initial_state"] = torch.rand(1, 3, 4, 7, dtype=torch.float64)
    found = []
    for form, options in (FORMS[0], (linear_attention_chunkwise, {"chunk_size": 2})):
        leaves = {n: case[n].clone().requires_grad_() for n in names}
        out, state = run(form, case | leaves, **options)
        cost = out.pow(3).sum() + state.pow(3).sum()
        first = torch.autograd.grad(cost, list(leaves.values()), create_graph=True)
        total = torch.stack([grad.square().sum() for grad in first]).sum()
        found.append(torch.autograd.grad(total, list(leaves.values())))
    for mine, definition in zip(*reversed(found), strict=True):
        assert relative(mine, definition) < 1e-10


def test_the_initial_state() -> None:
    state = linear_attention_state(2, 3, 4, 6, dtype=torch.bfloat16)
    assert state.dtype == torch.float32 and state.shape == (2, 3, 4, 7)
    case = random_case(5)
    given = run(linear_attention_recurrent, case | {"initial_state": state.double()})
    for a, b in zip(given, run(linear_attention_recurrent, case), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="initial_state"):
        run(linear_attention_parallel, case | {"initial_state": state[..., :-1]})
