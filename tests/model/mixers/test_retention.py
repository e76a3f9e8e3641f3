"""Gated retention in one pass against its parts."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from retnet import RetNetConfig
from retnet.model import MultiScaleRetention, chunkwise, gated, layers
from retnet.model.cache import RetentionLayer
from retnet.model.documents import describe_tokens
from tests.model.conftest import make_model, random_ids

SHAPES = {"hidden_size": 24, "num_heads": 3, "value_size": 36, "num_hidden_layers": 1}


@contextmanager
def in_parts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "takes_one_pass", lambda *tensors: False)
        patch.setattr(gated.GatedPlan, "__init__", None)
        yield


def mixer_and_inputs(draw: Any, length: int, dtype: torch.dtype) -> tuple[MultiScaleRetention, Any]:
    config = RetNetConfig(
        **SHAPES,
        vocab_size=8,
        chunk_size=draw(st.integers(1, 6)),
        gate=draw(st.booleans()),
        head_norm=draw(st.sampled_from(["groupnorm", "rmsnorm", "none"])),
        rotary_layout=draw(st.sampled_from(["interleaved", "half"])),
        decay=draw(st.sampled_from(["paper", "log_linear", 0.9, 1.0])),
    )
    torch.manual_seed(draw(st.integers(0, 99)))
    mixer = MultiScaleRetention(config).to(dtype)
    mask = torch.rand(2, length) < 0.7 if draw(st.booleans()) else None
    documents = torch.randint(3, (2, length)).sort().values if draw(st.booleans()) else None
    tokens = describe_tokens(
        2, length, torch.device("cpu"), attention_mask=mask, segment_ids=documents
    )
    hidden = torch.randn(2, length, 24, dtype=dtype)
    return mixer, MultiScaleRetention.shared_inputs(config, tokens, hidden)


def everything(mixer: MultiScaleRetention, hidden: Tensor, inputs: Any, state: Tensor | None):
    """Outputs, the last state, and the gradients of all there is."""
    leaves = [hidden.clone().requires_grad_(), *mixer.parameters()]
    memory = None
    if state is not None:
        memory = RetentionLayer()
        memory.state = state.clone().requires_grad_()
        leaves.append(memory.state)
    out, last = mixer(leaves[0], inputs, memory, mode="chunkwise")
    generator = torch.Generator().manual_seed(1)
    cost = sum(
        (x * torch.randn(x.shape, generator=generator, dtype=torch.float64)).sum()
        for x in (out, last)
    )
    return [out, last, *torch.autograd.grad(cost, leaves)]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), length=st.integers(1, 20), carried=st.booleans(), spans=st.integers(1, 3))
def test_the_same_outputs_states_and_gradients(
    data: Any, length: int, carried: bool, spans: int
) -> None:
    mixer, inputs = mixer_and_inputs(data.draw, length, torch.float64)
    hidden = torch.randn(2, length, 24, dtype=torch.float64)
    state = torch.randn(2, 3, 8, 12, dtype=torch.float64) if carried else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunkwise, "CHUNKS_PER_SPAN", spans)
        patch.setattr(chunkwise, "MOST_CHUNKS_PER_SPAN", spans)
        mine = everything(mixer, hidden, inputs, state)
        assert inputs.plans  # they are of the one pass
        with in_parts():
            parts = everything(mixer, hidden, inputs, state)
    for own, expected in zip(mine, parts, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm", ["groupnorm", "rmsnorm", "none"])
def test_gradcheck(norm: str) -> None:
    config = RetNetConfig(**SHAPES, vocab_size=8, chunk_size=3, head_norm=norm)
    torch.manual_seed(0)
    mixer = MultiScaleRetention(config).double()
    hidden = torch.randn(1, 7, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: mixer(x, mode="chunkwise"), hidden)


def test_layers_share_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    real = gated.GatedPlan.__init__
    monkeypatch.setattr(
        gated.GatedPlan, "__init__", lambda *a, **k: made.append(1) or real(*a, **k)
    )
    model = make_model("retention", num_hidden_layers=3)
    model(random_ids(2, 40), mode="chunkwise")
    model(random_ids(2, 40), mode="chunkwise")
    assert len(made) == 2


def test_where_the_parts_are_taken() -> None:
    """Other devices, narrow types and compilers."""
    x = torch.ones(1)
    assert gated.takes_one_pass(x, x, None, x.double())
    assert not gated.takes_one_pass(x, x.bfloat16())
    assert not gated.takes_one_pass(x.clone().requires_grad_(), x)
    assert not gated.takes_one_pass(None, x.to("meta"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not gated.takes_one_pass(x, x)
    model, ids = make_model("retention", torch.float32), random_ids(1, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.MonkeyPatch.context() as patch:
        patch.setattr(gated.GatedPlan, "__init__", None)
        assert model(ids, mode="chunkwise").logits.isfinite().all()


def test_it_keeps_less() -> None:
    """Bytes that a layer's backward pass needs, beside its weights."""

    def kept() -> int:
        sizes: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out, _ = mixer(hidden, mode="chunkwise")
        assert out.requires_grad
        return sum(sizes.values())

    config = RetNetConfig(hidden_size=64, num_heads=2, num_hidden_layers=1, vocab_size=8)
    mixer, hidden = MultiScaleRetention(config), torch.randn(1, 1024, 64, requires_grad=True)
    mine = kept()
    with in_parts():
        assert mine < 0.8 * kept()
