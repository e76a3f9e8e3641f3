"""The mixer: its forms are one function, with its rotations, head norm and gate around them."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from retnet import MultiScaleRetention, RetNetConfig
from retnet.model.documents import describe_tokens

NORMS = st.sampled_from(
    [
        {"head_norm": kind, "head_norm_affine": affine}
        for kind, affine in (("groupnorm", False), ("rmsnorm", True), ("none", False))
    ]
)
SHAPES = {"hidden_size": 24, "num_heads": 3, "value_size": 36, "num_hidden_layers": 1}


def mixer_and_inputs(draw: Any, length: int, dtype: torch.dtype) -> tuple[MultiScaleRetention, Any]:
    config = RetNetConfig(
        **SHAPES,
        vocab_size=8,
        chunk_size=draw(st.integers(1, 6)),
        gate=draw(st.booleans()),
        **draw(NORMS),
        num_kv_heads=draw(st.sampled_from([None, 1, 3])),
        rotary_layout=draw(st.sampled_from(["interleaved", "half"])),
        decay=draw(st.sampled_from(["paper", "log_linear", 0.9, 1.0])),
    )
    torch.manual_seed(draw(st.integers(0, 99)))
    mixer = MultiScaleRetention(config).to(dtype)
    if mixer.head_norm_weight is not None:
        mixer.head_norm_weight.data.normal_()
    mask = torch.rand(2, length) < 0.7 if draw(st.booleans()) else None
    documents = torch.randint(3, (2, length)).sort().values if draw(st.booleans()) else None
    hidden = torch.randn(2, length, 24, dtype=dtype)
    tokens = describe_tokens(hidden, attention_mask=mask, segment_ids=documents)
    return mixer, mixer.shared(tokens, {})[0]


def everything(
    mixer: MultiScaleRetention, hidden: Tensor, shared: Any, state: Tensor | None, mode: str
) -> list[Tensor]:
    """Outputs, the last state, and the gradients of all there is."""
    leaves = [hidden.clone().requires_grad_(), *mixer.parameters()]
    memory = None
    if state is not None:
        memory = {"state": state.clone().requires_grad_()}
        leaves.append(memory["state"])
    out, last = mixer(leaves[0], shared, memory, mode)
    generator = torch.Generator().manual_seed(1)
    cost = sum(
        (x * torch.randn(x.shape, generator=generator, dtype=torch.float64)).sum()
        for x in (out, last["state"])
    )
    return [out, last["state"], *torch.autograd.grad(cost, leaves)]


@settings(max_examples=40, deadline=None)
@given(data=st.data(), length=st.integers(1, 20), carried=st.booleans())
def test_the_modes_agree_in_outputs_states_and_gradients(
    data: Any, length: int, carried: bool
) -> None:
    mixer, shared = mixer_and_inputs(data.draw, length, torch.float64)
    hidden = torch.randn(2, length, 24, dtype=torch.float64)
    state = torch.randn(2, 3, 8, 12, dtype=torch.float64) if carried else None
    expected = everything(mixer, hidden, shared, state, "recurrent")
    for mode in ("chunkwise", "parallel"):
        for own, definition in zip(
            everything(mixer, hidden, shared, state, mode), expected, strict=True
        ):
            torch.testing.assert_close(own, definition, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm", ["groupnorm", "rmsnorm", "none"])
def test_gradcheck(norm: str) -> None:
    config = RetNetConfig(**SHAPES, vocab_size=8, chunk_size=3, head_norm=norm)
    torch.manual_seed(0)
    mixer = MultiScaleRetention(config).double()
    hidden = torch.randn(1, 7, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: mixer(x, mode="chunkwise")[0], hidden)


def test_alone_its_rows_begin_at_position_zero() -> None:
    torch.manual_seed(0)
    mixer = MultiScaleRetention(RetNetConfig(**SHAPES, vocab_size=8))
    hidden = torch.randn(2, 9, 24)
    positions = torch.arange(9).expand(2, -1)
    shared, memory = mixer.shared(describe_tokens(hidden, position_ids=positions), {})
    assert memory == {}
    torch.testing.assert_close(mixer(hidden), mixer(hidden, shared))
    assert mixer(hidden)[1].keys() == mixer.init_state(2, hidden.device, hidden.dtype).keys()


def test_mode_none_is_the_form_that_suits_the_length() -> None:
    """One token a step; up to a chunk or twice a head's width at once; then in chunks."""
    for chunk in (3, 40):
        mixer = MultiScaleRetention(RetNetConfig(**SHAPES, vocab_size=8, chunk_size=chunk))
        few = max(chunk, 2 * mixer.config.head_dim)
        lengths = {1: "recurrent", 2: "parallel", few: "parallel", few + 1: "chunkwise"}
        assert {length: mixer.choose_mode(length) for length in lengths} == lengths


def test_what_its_backward_pass_keeps_is_of_the_activations_size() -> None:
    """The chunkwise form, in activations [T, d]: no scores, no state of every token."""

    def kept(mode: str, length: int = 1024) -> float:
        sizes: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        hidden = torch.randn(1, length, 64, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out, _ = mixer(hidden, mode=mode)
        assert out.requires_grad
        return sum(sizes.values()) / hidden.nbytes

    config = RetNetConfig(hidden_size=64, num_heads=2, num_hidden_layers=1, vocab_size=8)
    mixer = MultiScaleRetention(config)
    assert kept("chunkwise") < 20
    assert kept("chunkwise", 2048) < 1.05 * kept("chunkwise")
    assert kept("chunkwise") < kept("parallel") / 4


def test_grouped_keys_and_values_are_the_same_ones_for_several_queries() -> None:
    """With each head's rows written out as many times the model is the same: repeated in place."""
    config = RetNetConfig(hidden_size=24, num_heads=6, num_kv_heads=2, vocab_size=8)
    torch.manual_seed(0)
    few = MultiScaleRetention(config).double()
    whole = MultiScaleRetention(RetNetConfig(hidden_size=24, num_heads=6, vocab_size=8)).double()
    weights = few.state_dict()
    for name in ("k_proj.weight", "v_proj.weight"):
        assert weights[name].shape[0] == whole.state_dict()[name].shape[0] // 3
        rows = weights[name].unflatten(0, (2, -1)).repeat_interleave(3, dim=0)
        weights[name] = rows.flatten(0, 1)
    whole.load_state_dict(weights)
    hidden = torch.randn(2, 9, 24, dtype=torch.float64)
    torch.testing.assert_close(few(hidden), whole(hidden), rtol=1e-12, atol=1e-12)
    shared, _ = few.shared(describe_tokens(hidden), {})
    expected = whole.token_weights(hidden, shared)
    torch.testing.assert_close(few.token_weights(hidden, shared), expected)


def test_weights_after_the_head_norm_are_one_a_channel_for_all_heads() -> None:
    """As if they had gone into the output projection; they begin at one."""
    keys = {**SHAPES, "vocab_size": 8, "head_norm": "rmsnorm"}
    torch.manual_seed(0)
    affine = MultiScaleRetention(RetNetConfig(**keys, head_norm_affine=True)).double()
    plain = MultiScaleRetention(RetNetConfig(**keys)).double()
    assert affine.head_norm_weight is not None and affine.head_norm_weight.eq(1).all()
    affine.head_norm_weight.data.normal_()
    weights = {name: x.clone() for name, x in affine.state_dict().items()}
    weights["o_proj.weight"] *= weights.pop("head_norm_weight").repeat(3)
    plain.load_state_dict(weights)
    hidden = torch.randn(2, 9, 24, dtype=torch.float64)
    torch.testing.assert_close(affine(hidden), plain(hidden), rtol=1e-10, atol=1e-12)
