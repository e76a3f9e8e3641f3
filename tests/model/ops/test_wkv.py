"""Both forms of WKV are one function, that of public implementations; token shift."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from retnet.model.ops.wkv import (
    WKVState,
    token_shift,
    wkv_chunkwise,
    wkv_init_state,
    wkv_recurrent,
)
from tests.model.ops.wkv_cases import (
    FORMS,
    INPUTS,
    agree,
    cases,
    cost,
    in_units_of,
    leaves_of,
    random_case,
    relative,
    run,
    run_with_gradients,
    with_leaves,
)

REFERENCE = Path(__file__).parent / "reference" / "wkv"


@settings(max_examples=60, deadline=None)
@given(case=cases(), chunk_size=st.integers(2, 20))
def test_forms_agree_in_outputs_states_and_gradients(case: dict, chunk_size: int) -> None:
    expected = run_with_gradients(wkv_recurrent, case)
    agree(run_with_gradients(wkv_chunkwise, case, chunk_size=chunk_size), expected)


@settings(max_examples=30, deadline=None)
@given(case=cases(), data=st.data())
def test_any_split_with_any_form_gives_the_whole(case: dict, data: st.DataObject) -> None:
    length = case["k"].shape[1]
    split = data.draw(st.integers(0, length))
    out, state = run(wkv_recurrent, case)
    parts, carried = [], case["initial_state"]
    for cut in (slice(0, split), slice(split, length)):
        if cut.start == cut.stop:
            continue
        names = ("k", "v", "valid", "resets")
        piece = {n: None if case[n] is None else case[n][:, cut] for n in names}
        form, options = data.draw(st.sampled_from(FORMS))
        part, carried = run(form, case | piece | {"initial_state": carried}, **options)
        parts.append(part)
    agree([torch.cat(parts, dim=1), *carried], [out, *state])


@pytest.mark.parametrize("form_options", FORMS)
@pytest.mark.parametrize("name", ["wkv_t37", "wkv_strong_decay_t300", "wkv_hard_spikes_t64"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_reference(name: str, dtype: torch.dtype, form_options: tuple) -> None:
    form, options = form_options
    data = load_file(REFERENCE / f"{name}.safetensors")
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5 if "hard" in name else 2e-6}[dtype]
    leaves = [data[n].to(dtype).requires_grad_() for n in INPUTS]
    out, state = form(*leaves, **options)
    final = [data[f"state_{n}"] for n in state._fields]
    agree([out, *in_units_of(state, final[2])], [data["out"], *final], tolerance)
    if "probe" in data:
        grads = torch.autograd.grad((out * data["probe"]).sum(), leaves)
        agree(list(grads), [data[f"grad_{n}"] for n in INPUTS], tolerance)
    k, v, decay, bonus = leaves
    _, early = form(k[:, :20], v[:, :20], decay, bonus, **options)
    expected = [data[f"state20_{n}"] for n in early._fields]
    agree(in_units_of(early, expected[2]), expected, tolerance)
    out, state = form(k[:, 20:], v[:, 20:], decay, bonus, initial_state=early, **options)
    agree([out, *in_units_of(state, final[2])], [data["out"][:, 20:], *final], tolerance)


def test_equation_by_hand() -> None:
    """Three tokens with e^k = 1, 2, 3, decay 1/2 and a bonus that triples."""
    k, v, ln3, half = (torch.tensor(x, dtype=torch.float64) for x in
                       ([1.0, 2.0, 3.0], [1.0, 3.0, 5.0], [3.0], [0.5]))  # fmt: skip
    out, state = wkv_recurrent(
        k.log().view(1, 3, 1), v.view(1, 3, 1), half.log().neg().log(), ln3.log()
    )
    assert out.flatten().tolist() == pytest.approx(
        [1, (1 + 6 * 3) / (1 + 6), (0.5 + 2 * 3 + 9 * 5) / (0.5 + 2 + 9)]
    )
    true = [x * state.max.exp() for x in (state.num, state.den)]
    assert torch.cat(true).flatten().tolist() == pytest.approx([0.25 + 3 + 15, 0.25 + 1 + 3])


@pytest.mark.parametrize("flags", [(), ("valid",), ("resets",), ("valid", "resets")])
def test_gradcheck(flags: tuple[str, ...]) -> None:
    """Against finite differences, through three levels of chunks; the state by its true sums."""
    case = random_case(23, rows=1, width=1)
    for seed, name in enumerate(flags):
        generator = torch.Generator().manual_seed(seed)
        case[name] = torch.rand(1, 23, generator=generator) < {"valid": 0.7, "resets": 0.1}[name]
    case["initial_state"] = WKVState(*torch.tensor([0.3, 1.2, 0.5]).double().view(3, 1, 1))

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        out, state = run(wkv_chunkwise, with_leaves(case, list(leaves)), chunk_size=2)
        # max is a constant to autograd, so in finite differences too the sums have to be true ones
        return out, state.num * state.max.exp(), state.den * state.max.exp()

    assert torch.autograd.gradcheck(function, leaves_of(case))


@settings(max_examples=20, deadline=None)
@given(case=cases(), chunk_size=st.integers(2, 9))
def test_gradients_of_gradients_agree(case: dict, chunk_size: int) -> None:
    def second(form, **options) -> list[Tensor]:
        leaves = leaves_of(case)
        total, _ = cost(form, case, leaves, power=2, **options)
        first = torch.autograd.grad(total, leaves, create_graph=True)
        again = torch.autograd.grad(sum(x.square().sum() for x in first), leaves)
        return [x.detach() for x in (*first, *again)]

    for a, b in zip(
        second(wkv_chunkwise, chunk_size=chunk_size), second(wkv_recurrent), strict=True
    ):
        assert torch.isfinite(a).all() and relative(a, b) < 1e-9


@pytest.mark.parametrize("name", ["grad", "vmap of grad", "hessian"])
def test_transforms_of_torch_func(name: str) -> None:
    transform = {
        "grad": lambda f: torch.func.grad(f, argnums=(0, 1, 2, 3)),
        "vmap of grad": lambda f: torch.func.vmap(torch.func.grad(f, argnums=(0, 1, 2, 3))),
        "hessian": lambda f: torch.func.jacrev(torch.func.jacrev(f)),
    }[name]
    inputs = [random_case(7, width=2)[n] for n in INPUTS]
    if name == "vmap of grad":
        inputs = [torch.stack((x, x.flip(-1))) for x in inputs]
    results = []
    for form, options in ((wkv_chunkwise, {"chunk_size": 2}), (wkv_recurrent, {})):
        results.append(
            transform(lambda *x, form=form, o=options: form(*x, **o)[0].pow(3).sum())(*inputs)
        )
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form_options", FORMS)
@pytest.mark.parametrize("decay", [-60.0, -2.0, 4.0])
def test_causal_with_loud_late_keys(form_options: tuple, decay: float) -> None:
    """Not by a digit; and finite, with its gradients."""
    form, options = form_options
    case = random_case(60, dtype=torch.float32)
    case["time_decay"] = torch.full_like(case["time_decay"], decay)
    out, _ = run(form, case, **options)
    for loud in (80.0, 100.0, -100.0):
        changed = case | {"k": case["k"].clone(), "v": case["v"].clone()}
        changed["k"][:, 41:] = loud
        changed["v"][:, 41:] += 100
        other, *rest = run_with_gradients(form, changed, **options)
        assert torch.equal(out[:, :41], other[:, :41])
        assert not torch.allclose(out[:, 41:], other[:, 41:])
        assert all(torch.isfinite(x).all() for x in (other, *rest))


@pytest.mark.parametrize("keys", ["rising", "falling", "spikes"])
@pytest.mark.parametrize("decay", [-30.0, 4.0])
def test_hard_keys_in_float32(keys: str, decay: float) -> None:
    case = random_case(70)
    ramp = torch.linspace(-100, 100, 70, dtype=torch.float64)[:, None].expand_as(case["k"][0])
    spikes = 100 * (case["k"] / case["k"].abs().max())
    case["k"] = {"rising": case["k"] + ramp, "falling": case["k"] - ramp, "spikes": spikes}[keys]
    case["time_decay"] = torch.full_like(case["time_decay"], decay)
    narrow = {n: case[n].float() if n in INPUTS else case[n] for n in case}
    wide = narrow | {n: narrow[n].double() for n in INPUTS}
    expected = run_with_gradients(wkv_recurrent, wide)
    for form, options in FORMS:
        agree(run_with_gradients(form, narrow, **options), expected, 5e-5)


@pytest.mark.parametrize("calls", [1, 1000])
def test_a_decay_below_the_spacing_of_float32_is_not_lost(calls: int) -> None:
    """3e-6 does not move a maximum of 100; a thousand times it moves the last output by 7e-4."""
    k, v = torch.zeros(1, 1001, 1), torch.ones(1, 1001, 1)
    k[:, [0, -1]], v[:, -1] = 100.0, 2.0
    decay, bonus = torch.full((1,), 3e-6).log(), torch.zeros(1)
    expected, _ = wkv_recurrent(k.double(), v.double(), decay, bonus)
    for form, options in FORMS if calls == 1 else FORMS[:1]:
        state, outputs = None, []
        for keys, values in zip(k.split(1001 // calls, 1), v.split(1001 // calls, 1), strict=True):
            out, state = form(keys, values, decay, bonus, initial_state=state, **options)
            outputs.append(out)
        assert relative(outputs[-1][:, -1], expected[:, -1]) < 1e-5


@pytest.mark.parametrize("form_options", FORMS)
def test_padding_may_hold_anything(form_options: tuple) -> None:
    """Its numbers are selected away, not multiplied by 0; time counts only valid tokens."""
    form, options = form_options
    case = random_case(12)
    alone = run(form, case, **options)
    valid = torch.zeros(2, 20, dtype=torch.bool)
    valid[:, [1, 2, 3, 5, 6, 9, 10, 11, 12, 15, 16, 18]] = True
    padded = case | {"valid": valid}
    for name, garbage in (("k", torch.inf), ("v", torch.nan)):
        padded[name] = torch.full((2, 20, 3), garbage, dtype=torch.float64)
        padded[name][valid] = case[name].flatten(0, 1)
    leaves = leaves_of(padded)
    out, state = run(form, with_leaves(padded, leaves), **options)
    assert torch.isfinite(out).all()
    agree([out[valid], *state], [alone[0].flatten(0, 1), *alone[1]])
    grads = torch.autograd.grad(out[valid].sum(), leaves)
    assert all(torch.isfinite(x).all() for x in grads)


@pytest.mark.parametrize("form_options", FORMS)
def test_nothing_valid_leaves_the_state_alone(form_options: tuple) -> None:
    form, options = form_options
    case = random_case(9, dtype=torch.float32) | {"valid": torch.zeros(2, 9, dtype=torch.bool)}
    out, state = run(form, case, **options)
    assert torch.isfinite(out).all()
    assert all(map(torch.equal, state, wkv_init_state(2, 3)))
    filled = WKVState(*torch.rand(3, 2, 3).unbind())
    _, state = run(form, case | {"initial_state": filled}, **options)
    assert all(map(torch.equal, state, filled))


def test_the_backward_pass_keeps_five_tensors_of_the_texts_size() -> None:
    """Keys, values and the states that tokens meet: linear in T, whatever the chunk size."""

    def kept(length: int, chunk_size: int) -> int:
        case = random_case(length, rows=1, width=8, dtype=torch.float32)
        sizes: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        leaves = leaves_of(case)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            run(wkv_chunkwise, with_leaves(case, leaves), chunk_size=chunk_size)
        return sum(sizes.values())

    for chunk_size in (4, 64):
        assert kept(1024, chunk_size) < 5.2 * 1024 * 8 * 4


def test_low_precision_and_autocast_are_computed_in_float32() -> None:
    case = random_case(40, dtype=torch.bfloat16)
    decay = {n: case[n].float() for n in ("time_decay", "time_first")}
    wide = {n: case[n].float() if n in INPUTS else case[n] for n in case}
    expected = run_with_gradients(wkv_recurrent, wide)
    for form, options in FORMS:
        out, state = run(form, case | decay, **options)
        assert {x.dtype for x in (out, *state)} == {torch.float32}
        assert relative(out, expected[0]) < 2e-6
        with torch.autocast("cpu", dtype=torch.bfloat16):
            agree(run_with_gradients(form, wide, **options), expected, 1e-5)


def test_the_state_owns_no_more_memory_than_it_needs_and_is_not_written_to() -> None:
    case = random_case(50)
    state = WKVState(*torch.rand(3, 2, 3, dtype=torch.float64).unbind())
    kept = [x.clone() for x in state]
    for chunk_size in (2, 7, 16, 64):
        _, last = run(wkv_chunkwise, case | {"initial_state": state}, chunk_size=chunk_size)
        assert all(map(torch.equal, state, kept))
        for x in last:
            assert x.is_contiguous()
            assert x.untyped_storage().nbytes() == x.numel() * x.element_size()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"v": torch.zeros(2, 5, 4)}, "must both be"),
        ({"k": torch.zeros(2, 0, 3), "v": torch.zeros(2, 0, 3)}, "at least 1"),
        ({"time_decay": torch.zeros(4)}, "time_decay"),
        ({"time_first": torch.zeros(1)}, "time_first"),
        ({"initial_state": wkv_init_state(1, 3)}, "initial_state"),
        ({"valid": torch.ones(2, 4, dtype=torch.bool)}, "valid"),
        ({"resets": torch.ones(1, 5, dtype=torch.bool)}, "resets"),
    ],
)
def test_shapes_that_do_not_fit(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        run(wkv_recurrent, {**random_case(5), **change})
    with pytest.raises(ValueError, match="chunk_size"):
        run(wkv_chunkwise, random_case(5), chunk_size=1)


@settings(max_examples=40, deadline=None)
@given(case=cases(), data=st.data())
def test_token_shift_is_the_last_valid_token_of_the_document(
    case: dict, data: st.DataObject
) -> None:
    x, valid, resets = case["k"], case["valid"], case["resets"]
    batch, length, width = x.shape
    present = torch.ones(batch, length, dtype=torch.bool) if valid is None else valid
    new = torch.zeros_like(present) if resets is None else resets & present
    previous = torch.full((batch, width), 7.0, dtype=torch.float64)
    shifted, last = token_shift(x, previous, valid, resets)
    for row in range(batch):
        before = previous[row]
        for t in range(length):
            if present[row, t]:
                before = torch.zeros_like(before) if new[row, t] else before
                assert torch.equal(shifted[row, t], before)
                before = x[row, t]
        assert torch.equal(last[row], before)
    split = data.draw(st.integers(0, length))
    carried, parts = previous, []
    for cut in (slice(0, split), slice(split, length)):
        if cut.start < cut.stop:
            flags = (None if f is None else f[:, cut] for f in (valid, resets))
            part, carried = token_shift(x[:, cut], carried, *flags)
            parts.append(part)
    assert torch.equal(torch.cat(parts, dim=1)[present], shifted[present])
    assert torch.equal(carried, last)


def test_token_shift_reads_no_padding() -> None:
    x = torch.tensor([[torch.nan, 1, torch.inf, 2, torch.nan]]).unsqueeze(-1)
    valid = torch.tensor([[False, True, False, True, False]])
    shifted, last = token_shift(x, None, valid)
    assert shifted.flatten().tolist() == [0, 0, 1, 1, 2] and last.item() == 2
    assert token_shift(x.bfloat16(), torch.ones(1, 1))[0].dtype == torch.bfloat16
