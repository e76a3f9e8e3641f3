"""Attention over a window against its definition: softmax over the last n tokens of a document."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from retnet.model.ops import window_attention as module
from retnet.model.ops.window_attention import (
    band,
    empty_ring,
    window_attention,
    window_attention_step,
)
from tests.model.recorders import LargestTensor

TOLERANCE = 1e-10
WIDTH = 4


def qkv(rows: int, length: int, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shape = (3, rows, 2, length, WIDTH)
    return torch.randn(shape, dtype=torch.float64, generator=generator).mul(2).unbind()


def definition(
    q: Tensor, k: Tensor, v: Tensor, window: int, valid: Tensor, resets: Tensor
) -> Tensor:
    """Each token by itself: which tokens it sees, then softmax."""
    out = torch.zeros_like(q)
    for row, documents in enumerate(resets.cumsum(1).tolist()):
        shown = valid[row].nonzero().flatten().tolist()
        for t in shown:
            seen = [s for s in shown if s <= t and documents[s] == documents[t]][-window:]
            scores = torch.einsum("hk,hsk->hs", q[row, :, t], k[row][:, seen])
            weights = (scores / math.sqrt(WIDTH)).softmax(-1)
            out[row, :, t] = torch.einsum("hs,hsk->hk", weights, v[row][:, seen])
    return out


def new_ring(rows: int, window: int) -> dict[str, Tensor]:
    return empty_ring(rows, 2, window, WIDTH, torch.float64, torch.device("cpu"))


@pytest.mark.parametrize("least", [1, 5, 64])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_definition_at_every_split(least: int, data: st.DataObject) -> None:
    """Outputs and gradients, with padding anywhere and documents, whatever the blocks."""
    rows, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 24))
    window = data.draw(st.integers(1, 9) | st.sampled_from([length, 3 * length]))
    q, k, v = (x.requires_grad_() for x in qkv(rows, length, data.draw(st.integers(0, 99))))

    def drawn(share: int) -> Tensor:
        numbers = st.lists(st.integers(0, 3), min_size=rows * length, max_size=rows * length)
        return torch.tensor(data.draw(numbers)).view(rows, length) < share

    valid = drawn(3) if data.draw(st.booleans(), label="padding") else None
    resets = drawn(1) if data.draw(st.booleans(), label="documents") else None
    keep = torch.ones(rows, length, dtype=torch.bool) if valid is None else valid
    begins = torch.zeros_like(keep) if resets is None else resets & keep
    resets = None if resets is None else begins
    expected = definition(q, k, v, window, keep, begins)

    splits = sorted(data.draw(st.sets(st.integers(1, length), max_size=3)) - {length})
    state, parts = None, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LEAST_BLOCK", least)
        for begin, end in itertools.pairwise([0, *splits, length]):
            cut = slice(begin, end)
            out, state = window_attention(
                *(x[:, :, cut] for x in (q, k, v)),
                window,
                initial_state=state,
                valid=None if valid is None else valid[:, cut],
                resets=None if resets is None else resets[:, cut],
            )
            parts.append(out)
    out = torch.cat(parts, 2)
    assert out.isfinite().all()
    shown = keep[:, None, :, None].expand_as(out)
    assert torch.where(shown, out - expected, 0).abs().max() < TOLERANCE
    if keep.any():
        weights = qkv(rows, length, 100)[0] * shown
        mine = torch.autograd.grad((out * weights).sum(), (q, k, v))
        theirs = torch.autograd.grad((expected * weights).sum(), (q, k, v))
        for a, b in zip(mine, theirs, strict=True):
            assert (a - b).abs().max() < TOLERANCE
    last = [row.nonzero().flatten().tolist() for row in keep]
    documents = begins.cumsum(1)
    counts = [int((documents[b, c] == documents[b, c[-1]]).sum()) if c else 0
              for b, c in enumerate(last)]  # fmt: skip
    assert state["count"].tolist() == counts


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 3), window=st.integers(1, 6), first=st.integers(0, 9), data=st.data())
def test_the_step_writes_the_same_ring(
    rows: int, window: int, first: int, data: st.DataObject
) -> None:
    """One token after another in place, after a prefill with padding or from the start."""
    q, k, v = qkv(rows, first + 8)
    kept = [data.draw(st.integers(0, first)) for _ in range(rows)]
    valid = torch.arange(first + 8) >= first - torch.tensor(kept)[:, None]
    none = torch.zeros_like(valid)
    expected = definition(q, k, v, window, valid, none)
    state = new_ring(rows, window)
    if first:
        start = (x[:, :, :first] for x in (q, k, v))
        _, state = window_attention(*start, window, initial_state=state, valid=valid[:, :first])
    other = copy.deepcopy(state)
    places = {name: x.data_ptr() for name, x in state.items()}
    for t in range(first, first + 8):
        token = [x[:, :, t : t + 1] for x in (q, k, v)]
        out = window_attention_step(*token, state)
        assert (out - expected[:, :, t : t + 1]).abs().max() < TOLERANCE
        _, other = window_attention(*token, window, initial_state=other)
        for name, x in state.items():
            assert torch.equal(x, other[name]), name
    assert places == {name: x.data_ptr() for name, x in state.items()}


@pytest.mark.parametrize("window", [1, 3, 70])
def test_causal_with_loud_late_keys(window: int) -> None:
    """And what left the window is not seen either, however loud it was."""
    q, k, v = qkv(1, 200)
    plain, _ = window_attention(q, k, v, window)
    loud_k, loud_v = k.clone(), v.clone()
    loud_k[:, :, 120:] *= 1000
    loud_v[:, :, 120:] *= 1000
    out, _ = window_attention(q, loud_k, loud_v, window)
    assert torch.equal(out[:, :, :120], plain[:, :, :120])
    loud_k, loud_v = k.clone(), v.clone()
    loud_k[:, :, :100] *= 1000
    loud_v[:, :, :100] *= 1000
    out, _ = window_attention(q, loud_k, loud_v, window)
    assert (out - plain)[:, :, 99 + window :].abs().max() < 1e-12
    assert (out - plain)[:, :, 98 + window].abs().max() > 1e-6


@pytest.mark.parametrize("given_state", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_no_tensor_grows_with_the_square_of_the_text(given_state: bool, padded: bool) -> None:
    """Forward and backward; [T, T] bools of the long text would have 16 MiB."""
    sizes = []
    for length in (1024, 4096):
        q, k, v = (x.requires_grad_() for x in qkv(1, length))
        valid = torch.arange(length)[None] > 9 if padded else None
        state = new_ring(1, 8) if given_state else None
        with LargestTensor() as recorder:
            out, _ = window_attention(q, k, v, 8, initial_state=state, valid=valid)
            out.sum().backward()
        sizes.append(recorder.bytes)
    assert sizes[1] <= 4.2 * sizes[0] and sizes[1] < 4096 * 4096 / 2


def test_a_window_at_least_as_long_as_the_text_is_plain_attention() -> None:
    q, k, v = qkv(2, 12)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    for window in (12, 13, 10_000):
        out, state = window_attention(q, k, v, window, keep=False)
        assert torch.equal(out, expected) and state == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_types(dtype: torch.dtype) -> None:
    """The ring has the type of the keys; one of another type is read as theirs."""
    q, k, v = qkv(2, 90)
    exact, _ = window_attention(q, k, v, 5)
    narrow = [x.to(dtype) for x in (q, k, v)]
    state = {n: x.float() if n != "count" else x for n, x in new_ring(2, 5).items()}
    out, state = window_attention(*narrow, 5, initial_state=state)
    assert out.dtype == state["keys"].dtype == dtype
    error = (out.double() - exact).pow(2).mean().sqrt()
    assert error < (1e-6 if dtype == torch.float32 else 0.03)


def test_the_band() -> None:
    seen = band(3, 2, 2, torch.device("cpu")).int().tolist()
    assert seen == [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
