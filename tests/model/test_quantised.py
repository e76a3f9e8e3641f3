"""Quantised weights: what they stand for, how near that is, and the layers that have them."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from retnet.model.mixers import MIXERS
from retnet.model.models import PUBLIC
from retnet.model.quantised import (
    FORMATS,
    GROUP,
    QuantisedLinear,
    dequantise,
    quantise,
    quantised_format,
    replace_linears,
    stored_parts,
    type_and_device,
)
from tests.generation.builders import tiny_model
from tests.model.fast_decode.cases import random_ids

formats = pytest.mark.parametrize("weights", FORMATS)


def plain(weights: str, stored: dict[str, Tensor], inputs: int) -> Tensor:
    """The weight by the formats' definitions, number by number."""
    values = stored["values"].tolist()
    if weights == "bf16":
        return stored["values"].double()
    scale = stored["scale"].double()
    if weights == "int8":
        rows = [[scale[i].item() * x for x in row[:inputs]] for i, row in enumerate(values)]
        return torch.tensor(rows, dtype=torch.float64)
    zero, rows = stored["zero"].double(), []
    for i, row in enumerate(values):
        codes = [code for byte in row for code in (byte % 16, byte // 16)][:inputs]
        at = [(x, j // GROUP) for j, x in enumerate(codes)]
        rows.append([scale[i, g].item() * (x - 8) + zero[i, g].item() for x, g in at])
    return torch.tensor(rows, dtype=torch.float64)


@formats
@settings(max_examples=15, deadline=None)
@given(outputs=st.integers(1, 40), inputs=st.integers(1, 100), size=st.sampled_from([1e-3, 1, 50]))
def test_what_is_stored_is_near_the_weight(
    weights: str, outputs: int, inputs: int, size: float
) -> None:
    weight = torch.randn(outputs, inputs) * size
    stored = quantise(weight, weights)
    shapes = {name: (tuple(x.shape), x.dtype) for name, x in stored.items()}
    assert shapes == stored_parts(weights, outputs, inputs)
    found = dequantise(weights, stored, inputs, torch.float64)
    torch.testing.assert_close(found, plain(weights, stored, inputs), rtol=1e-14, atol=0)
    error = (found - weight.double()).abs()
    if weights == "bf16":  # 8 bits of each number
        assert (error <= weight.abs() * 2**-8).all()
    elif weights == "int8":  # half of a step, and what rounding of the scale cuts off at the end
        assert (error <= weight.abs().amax(dim=1, keepdim=True) * (0.51 / 127 + 2**-8)).all()
    else:  # no worse in a group's squares than the plain line from its lowest to its highest
        groups = F.pad(weight.double(), (0, -inputs % GROUP)).unflatten(1, (-1, GROUP))
        step = (groups.amax(dim=2) - groups.amin(dim=2)) / 15
        squares = F.pad(error, (0, -inputs % GROUP)).unflatten(1, (-1, GROUP)).square().sum(dim=2)
        assert (squares <= GROUP * (0.55 * step) ** 2 + 1e-12).all()


def test_int4_is_better_than_the_line_between_the_ends() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    groups = weight.unflatten(1, (-1, GROUP))
    low, high = groups.amin(dim=2, keepdim=True), groups.amax(dim=2, keepdim=True)
    step = (high - low) / 15
    simple = (((groups - low) / step).round() * step + low - groups).square().mean()
    stored = quantise(weight, "int4")
    error = (dequantise("int4", stored, 256, torch.float32) - weight).square().mean()
    assert error < 0.87 * simple


@formats
def test_constant_and_empty_rows(weights: str) -> None:
    weight = torch.stack([torch.zeros(32), torch.full((32,), 0.5), torch.arange(32.0)])
    found = dequantise(weights, quantise(weight, weights), 32, torch.float32)
    assert found[0].equal(weight[0])
    torch.testing.assert_close(found[1], weight[1], rtol=2**-8, atol=0)


@formats
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(weights: str, number: float) -> None:
    model = tiny_model("retention", dtype=torch.float32)
    model.model.layers[1].mixer.k_proj.weight.data[3, 4] = number
    with pytest.raises(ValueError, match=r"layers.1.mixer.k_proj.weight can't be quantised"):
        replace_linears(model, weights)


@formats
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_model_computes_with_what_is_stored(weights: str, mixer: str) -> None:
    """As the plain model whose weights are the dequantised ones; and it gets these back."""
    model: Any = tiny_model(mixer, dtype=torch.float32)
    before = copy.deepcopy(model)
    replace_linears(model, weights)
    assert quantised_format(model) == weights
    assert model.num_parameters() == before.num_parameters()
    trained = sum(x.numel() for x in model.parameters())
    assert model.num_parameters(only_trainable=True) == trained < model.num_parameters()
    for layer in (model.lm_head, model.model.layers[0].mixer.o_proj):
        assert type(layer) is QuantisedLinear
    ids = random_ids(2, 12)
    logits = model(ids).logits
    assert not logits.equal(before(ids).logits)
    replace_linears(model, None)
    assert quantised_format(model) is None
    assert model.state_dict().keys() == before.state_dict().keys()
    torch.testing.assert_close(model(ids).logits, logits, rtol=1e-4, atol=1e-4)


def test_layers_that_must_be_exact_stay() -> None:
    model: Any = tiny_model("gated_retention", dtype=torch.float32)
    replace_linears(model, "int4")
    assert type(model.model.layers[0].mixer.d_proj) is nn.Linear
    assert type(model.model.layers[0].mixer.q_proj) is QuantisedLinear


def test_a_tied_output_layer_becomes_one_of_its_own() -> None:
    kind: Any = next(kind for kind in PUBLIC if kind.config_class.mixer_class.name == "retention")
    model = kind(kind.config_class(vocab_size=9, hidden_size=8, num_heads=2,
                                   tie_word_embeddings=True)).eval()  # fmt: skip
    embedding = model.model.embed_tokens.weight.clone()
    expected = model(torch.tensor([[1, 2]])).logits
    replace_linears(model, "int8")
    model.tie_weights()
    assert not model.config.tie_word_embeddings
    assert model.model.embed_tokens.weight.equal(embedding)
    found = model(torch.tensor([[1, 2]])).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=0.1 * expected.abs().max().item())


def test_a_bias_is_refused_by_name() -> None:
    model: Any = tiny_model("retention", dtype=torch.float32)
    model.model.layers[0].ffn.up_proj.bias = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match=r"model.layers.0.ffn.up_proj has a bias"):
        replace_linears(model, "int8")


@formats
def test_casting_leaves_what_is_stored(weights: str) -> None:
    layer = QuantisedLinear(40, 3, weights)
    for name, tensor in quantise(torch.randn(3, 40), weights).items():
        layer.register_buffer(name, tensor)
    x, before = torch.randn(2, 40), {name: x.clone() for name, x in layer.stored.items()}
    wide = layer(x)
    assert wide.dtype == layer.dtype == torch.float32
    for dtype in (torch.float64, torch.bfloat16):
        layer.to(dtype)
        assert copy.deepcopy(layer).dtype == dtype
        assert all(layer.stored[name].equal(x) for name, x in before.items())
        assert all(layer.stored[name].dtype == x.dtype for name, x in before.items())
        torch.testing.assert_close(layer(x.to(dtype)).float(), wide, rtol=0.02, atol=0.05)
    assert weights in repr(layer)


def test_a_model_of_another_type_gets_its_weights_back_in_that() -> None:
    model: Any = tiny_model("retention", dtype=torch.bfloat16)
    replace_linears(model, "int8")
    assert type_and_device(model.lm_head) == (torch.bfloat16, torch.device("cpu"))
    replace_linears(model.double(), None)
    assert {x.dtype for x in model.parameters()} == {torch.float64}
    assert type_and_device(model.lm_head) == (torch.float64, torch.device("cpu"))
