"""Products with a step's weights, by whichever way, are those of linear layers."""

import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from retnet.model.fast_decode.weights import (
    MOST_LEFT,
    MOST_ROWS,
    PackedWeight,
    Product,
    joint_layers,
    joint_weights,
    lay_out_for_decoding,
    takes_onednn,
)
from tests.generation.builders import MIXERS, tiny_model


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, MOST_ROWS + 6),
    inputs=st.integers(1, 40),
    outputs=st.integers(1, 70),
    transposed=st.booleans(),
)
def test_products_of_few_rows(rows: int, inputs: int, outputs: int, transposed: bool) -> None:
    x = torch.randn(rows, inputs, dtype=torch.float64)
    weight = torch.randn(outputs, inputs, dtype=torch.float64)
    if transposed:
        weight = weight.t().contiguous().t()
    y = Product(weight)(x)
    assert y.is_contiguous()
    torch.testing.assert_close(y, F.linear(x, weight))


@pytest.mark.parametrize("rows", [1, MOST_LEFT, MOST_LEFT + 1, MOST_ROWS, MOST_ROWS + 1])
@pytest.mark.parametrize("outputs", [15, 32, 37])
@pytest.mark.parametrize("pack", [False, True])
def test_products_by_onednn(rows: int, outputs: int, pack: bool, fast_products: None) -> None:
    x, weight = torch.randn(rows, 8), torch.randn(outputs, 8)
    product = Product(weight)
    if pack:
        product.pack(rows)
        assert product.packed is not None
    torch.testing.assert_close(product(x), F.linear(x, weight), rtol=1e-4, atol=1e-4)


def test_where_onednn_is_taken(fast_products: None) -> None:
    """Plain float32 on a CPU, while the process has the switch set."""
    weight = torch.randn(32, 8)
    assert takes_onednn(weight)
    assert not takes_onednn(weight.double())
    assert not takes_onednn(weight.bfloat16())
    assert not takes_onednn(weight.to("meta"))
    assert Product(weight).most_in_blocks == MOST_LEFT
    assert Product(weight.double()).most_in_blocks == MOST_ROWS
    torch.backends.mkldnn.matmul.fp32_precision = "ieee"
    assert not takes_onednn(weight)
    product = Product(weight)
    product.pack(MOST_ROWS)
    assert product.packed is None and product.most_in_blocks == MOST_ROWS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_and_autocast(dtype: torch.dtype) -> None:
    x, weight = torch.randn(2, 8), torch.randn(32, 8)
    torch.testing.assert_close(
        Product(weight.to(dtype))(x.to(dtype)), F.linear(x.to(dtype), weight.to(dtype))
    )
    with torch.autocast("cpu", dtype=dtype):
        found, expected = Product(weight)(x), F.linear(x, weight)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected)


def test_no_rows() -> None:
    assert Product(torch.ones(32, 8))(torch.empty(0, 8)).shape == (0, 32)


def test_packed_weights_compiled_and_not(fast_products: None) -> None:
    weight = torch.randn(32, 8)
    packed = PackedWeight(weight, 6)
    compiled = torch.compile(lambda x: packed(x) + 1, backend="aot_eager", fullgraph=True)
    for rows in (6, 9, 1):
        x = torch.randn(rows, 8)
        expected = x @ weight.T
        with torch.inference_mode():
            torch.testing.assert_close(packed(x), expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(compiled(x), expected + 1, rtol=1e-4, atol=1e-4)
    arguments = (torch.randn(6, 8), packed.key, 32)
    torch.library.opcheck(packed.operator, arguments, test_utils="test_faketensor")


def test_packed_weights_go_with_their_last_user(fast_products: None) -> None:
    product = Product(torch.randn(32, 8))
    product.pack(MOST_LEFT + 1)
    packed = product.packed
    assert packed is not None
    key, x, gone = packed.key, torch.randn(6, 8), weakref.ref(packed)
    operator = packed.operator
    assert operator(x, key, 32).shape == (6, 32)
    del packed, product
    assert gone() is None
    with pytest.raises(KeyError):
        operator(x, key, 32)


@pytest.mark.parametrize("mixer", MIXERS)
def test_weights_laid_out_once_are_one_matrix_and_can_be_saved(mixer: str, tmp_path: Path) -> None:
    model = tiny_model(mixer)
    values = {name: weight.clone() for name, weight in model.state_dict().items()}
    layers = joint_layers(model.model.layers[0].mixer)
    assert len(joint_weights(layers)) == len(layers) > 1
    for _ in range(2):
        lay_out_for_decoding(model)
        (shared,) = joint_weights(layers)
        assert shared.data_ptr() == layers[0].weight.data_ptr()
        assert shared.equal(torch.cat([layer.weight for layer in layers]))
    assert all(weight.equal(values[name]) for name, weight in model.state_dict().items())
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    assert all(weight.equal(values[name]) for name, weight in again.state_dict().items())


def test_modules_without_joint_layers_have_none() -> None:
    assert joint_layers(nn.Linear(2, 2)) == []
