"""A step's products with quantised weights are those with the numbers that they stand for."""

import copy
import gc
import shutil
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from retnet.generation import make_step, prefill
from retnet.model.fast_decode import quantised, quantised_operators
from retnet.model.fast_decode.products import make_products
from retnet.model.fast_decode.quantised import (
    MOST_DIRECT,
    Expanded,
    Int4,
    Int8,
    QuantisedProduct,
)
from retnet.model.fast_decode.step import DecodeStep, make_decode_step
from retnet.model.fast_decode.weights import (
    MOST_LEFT,
    Bfloat16Product,
    Product,
    lay_out_for_decoding,
    packs_bfloat16,
)
from retnet.model.quantised import FORMATS, QuantisedLinear, dequantise, quantise, replace_linears
from tests.generation.builders import tiny_model
from tests.model.fast_decode.cases import both_mixers, random_ids

# Of the largest activation times the largest sum of an output's weights, which bounds each product.
# int8 adds up activations of 15 bits exactly; the others round activations and outputs to bfloat16.
TOLERANCES = {"bf16": 2**-7, "int8": 2e-5, "int4": 2**-7}


needs_cpp = (
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
)


@pytest.fixture(autouse=True, scope="module")
def no_layer_is_small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantised, "SMALL", 0)
        yield


def make_layer(outputs: int, inputs: int, weights: str, seed: int = 0) -> QuantisedLinear:
    layer = QuantisedLinear(inputs, outputs, weights)
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))
    for name, tensor in quantise(weight, weights).items():
        layer.register_buffer(name, tensor)
    return layer


def expected_of(layers: list[QuantisedLinear], x: Tensor) -> Tensor:
    weights = [dequantise(y.weights, y.stored, y.in_features, torch.float64) for y in layers]
    return F.linear(x.double(), torch.cat(weights))


def check(product: Any, layers: list[QuantisedLinear], x: Tensor, tolerance: float) -> None:
    y, expected = product(x), expected_of(layers, x)
    assert y.dtype == x.dtype and y.shape == expected.shape
    whole = expected_of(layers, torch.eye(x.shape[1]))  # [in, out]
    assert (y - expected).abs().max() <= tolerance * x.abs().max() * whole.abs().sum(dim=0).max()


@settings(max_examples=60, deadline=None)
@given(
    weights=st.sampled_from(FORMATS),
    rows=st.integers(1, MOST_DIRECT + 6),
    inputs=st.integers(1, 100),
    outputs=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    packed=st.booleans(),
    size=st.sampled_from([1e-4, 1.0, 1e4]),
)
@example("int8", 1, 33, [1], False, 1.0)  # torch's operators read beyond such inputs
@example("int4", 3, 1, [17], False, 1.0)
def test_products(
    weights: str, rows: int, inputs: int, outputs: list[int], packed: bool, size: float
) -> None:
    layers = [make_layer(n, inputs, weights, seed) for seed, n in enumerate(outputs)]
    (product,) = make_products(layers)
    assert isinstance(product, QuantisedProduct) and not product.problem
    if packed:
        product.pack(rows)
    tolerance = TOLERANCES[weights] if product.packed is None else 2**-7
    check(product, layers, torch.randn(rows, inputs) * size, tolerance)
    # of a bfloat16 model, whose outputs are rounded too
    check(product, layers, torch.randn(rows, inputs).bfloat16(), 2**-6)


def test_inputs_of_zeros_and_those_that_are_not_finite() -> None:
    product = QuantisedProduct([make_layer(5, 40, "int8")])
    for number in (0.0, 1e-42):
        assert product(torch.full((2, 40), number)).equal(torch.zeros(2, 5))
    for number in (float("nan"), float("inf")):
        x = torch.ones(1, 40)
        x[0, 3] = number
        assert not product(x).isfinite().any()


def test_small_layers_of_int8_are_expanded(monkeypatch) -> None:
    """To float32's product with the same weight, whose activations nothing rounds."""
    layers = [make_layer(20, 33, "int8", seed) for seed in (0, 1)]
    monkeypatch.setattr(quantised, "SMALL", 40 * 33)
    small = QuantisedProduct(layers)
    assert isinstance(small.operator, Expanded) and not small.problem
    for rows in (1, 3):
        check(small, layers, torch.randn(rows, 33), 1e-6)
    monkeypatch.setattr(quantised, "SMALL", 40 * 33 - 1)
    kinds = {w: type(QuantisedProduct([make_layer(2, 32, w)]).operator) for w in FORMATS}
    assert isinstance(QuantisedProduct(layers).operator, Int8)
    assert kinds["int8"] is Expanded and kinds["int4"] is Int4


def test_rows_do_not_depend_on_each_other() -> None:
    layer = make_layer(40, 96, "int8")
    product, x = QuantisedProduct([layer]), torch.randn(4, 96)
    alone = [product(row[None]) for row in x]
    beside = x.clone()
    beside[0, 5], beside[1], beside[3] = float("nan"), 0.0, x[3] * 2**20
    found = product(beside)
    assert found[0].isnan().all() and found[1].equal(torch.zeros(40))
    torch.testing.assert_close(found[2:3], alone[2], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[3:] / 2**20, alone[3], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("answer", ["absent", "wrong"])
def test_plain_products_take_over(weights: str, answer: str, monkeypatch) -> None:
    def refuse(stored: dict[str, Tensor]) -> Any:
        if answer == "absent":
            raise AttributeError("module 'torch' has no such operator\nsecond line")
        return lambda x: x.new_full((len(x), 48), 9.0)

    monkeypatch.setitem(quantised.FASTEST, (weights, "cpu"), (refuse,))
    quantised._choose.cache_clear()
    try:
        model: Any = tiny_model("retention", dtype=torch.float32)
        replace_linears(model, weights)
        layer, x = model.model.layers[0].ffn.up_proj, torch.randn(3, 16)
        product = QuantisedProduct([layer])
        check(product, [layer], x, 1e-6)
        step, cache = make_step(model), model.new_cache()
        prefill(model, torch.tensor([[1, 2]]), cache)
        step(torch.tensor([3]), cache)
        said = {"absent": "fails (module 'torch' has no such operator)", "wrong": "answers wrongly"}
        assert step.path == (
            f"fast step, {weights} weights by plain products: torch's {weights} product for cpu "
            f"{said[answer]}"
        )
    finally:
        quantised._choose.cache_clear()


def test_an_operator_that_is_not_exact_for_the_largest_numbers_is_found_out(monkeypatch) -> None:
    """As FBGEMM's, which adds two products in 16 bits where the processor lacks VNNI."""

    class Saturating(Int8):
        def multiply(self, x: Tensor) -> Tensor:
            y = super().multiply(x)
            return y.clamp(-50 * 127, 50 * 127) if (x[0] == 127).all() else y

    assert quantised._problem(Int8, "int8", "cpu") == ""
    assert "answers wrongly" in quantised._problem(Saturating, "int8", "cpu")


def test_the_next_operator_is_taken(monkeypatch) -> None:
    def absent(stored: dict[str, Tensor]) -> Any:
        raise RuntimeError("it is not there")

    second = quantised.Int8Bfloat16
    monkeypatch.setitem(quantised.FASTEST, ("int8", "cpu"), (absent, second))
    assert quantised._choose.__wrapped__("int8", "cpu") == (second, "")
    layer, x = make_layer(33, 64, "int8"), torch.randn(2, 64)
    check(second(layer.stored), [layer], x.bfloat16(), 2**-7)
    assert quantised._choose.__wrapped__("int8", "tpu")[1] == "torch has no int8 product for tpu"


@pytest.mark.parametrize("compiler", ["absent", "stand-in", pytest.param("own", marks=needs_cpp)])
def test_int8_on_a_gpu_takes_no_product_that_is_slow_there(compiler: str, monkeypatch) -> None:
    def refuse(x: Tensor, *rest: Any) -> Tensor:
        raise RuntimeError("there is no compiler")

    if compiler != "own":
        made = {"absent": lambda function: refuse, "stand-in": lambda function: function}
        monkeypatch.setattr(torch, "compile", lambda function, **o: made[compiler](function))
        monkeypatch.delattr(torch, "_weight_int8pack_mm")  # which torch's own compiler looks for
    kinds = quantised.FASTEST["int8", "cuda"]
    quantised_operators._compiled.cache_clear()
    problems = [quantised._problem(kind, "int8", "cpu") for kind in kinds]
    assert [bool(problem) for problem in problems] == [compiler == "absent", False]
    kind = kinds[problems.index("")]
    layer = make_layer(33, 64, "int8")
    for rows in (1, 2):
        y = kind(layer.stored)(x := torch.randn(rows, 64))
        assert y.dtype == torch.float32
        exact = rows == 1 and compiler != "absent"  # no activation is rounded
        check(lambda x, y=y: y, [layer], x, 1e-6 if exact else 2**-7)
    quantised_operators._compiled.cache_clear()


@both_mixers
@pytest.mark.parametrize("weights", FORMATS)
def test_the_step_is_the_forward_pass(mixer: str, weights: str) -> None:
    model: Any = tiny_model(mixer, dtype=torch.float32)
    replace_linears(model, weights)
    lay_out_for_decoding(model)
    step, reason = make_decode_step(model)
    assert step is not None and not reason and step.weights == weights and not step.problem
    for rows in (1, 3):
        ids = random_ids(rows, 9)
        with torch.inference_mode():
            expected = model(ids).logits
            cache = model.new_cache()
            prefill(model, ids[:, :6], cache)
            logits = torch.stack([step(ids[:, t], cache) for t in range(6, 9)], dim=1)
        error = (logits - expected[:, 6:]).abs().max() / expected.abs().max()
        assert error < (2e-3 if weights == "int8" else 0.05)


@both_mixers
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_of_another_type(mixer: str, dtype: torch.dtype, monkeypatch) -> None:
    """And no weight is expanded to learn that type."""
    model: Any = tiny_model(mixer, dtype=torch.float32)
    replace_linears(model, "int8")
    model.to(dtype)
    ids, cache = random_ids(2, 9), model.new_cache()
    with torch.inference_mode():
        expected = model(ids).logits
        prefill(model, ids[:, :8], cache)
        monkeypatch.delattr(QuantisedLinear, "weight")
        logits = DecodeStep(model)(ids[:, 8], cache)
    assert logits.dtype == expected.dtype == dtype
    error = (logits - expected[:, 8]).abs().max() / expected.abs().max()
    assert error < (2e-3 if dtype == torch.float64 else 0.1)


@pytest.mark.parametrize("weights", FORMATS)
def test_joint_weights_are_stored_once(weights: str) -> None:
    model: Any = tiny_model("retention", dtype=torch.float32)
    replace_linears(model, weights)
    before = copy.deepcopy(model.state_dict())
    lay_out_for_decoding(model)
    assert all(before[name].equal(x) for name, x in model.state_dict().items())
    mixer = model.model.layers[0].mixer
    (product,) = make_products([mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.g_proj])
    for name, tensor in product.stored.items():
        assert tensor.data_ptr() == mixer.q_proj.stored[name].data_ptr()


def test_a_layer_between_that_is_exact_has_a_product_of_its_own() -> None:
    model: Any = tiny_model("gated_retention", dtype=torch.float32)
    replace_linears(model, "int8")
    step = DecodeStep(model)
    assert [type(x) for x in step.parts[0][1].inputs] == [QuantisedProduct, Product]


def test_many_rows_are_packed_once(monkeypatch) -> None:
    model: Any = tiny_model("retention", dtype=torch.float32)
    replace_linears(model, "int8")
    step, cache, ids = DecodeStep(model), model.new_cache(), random_ids(MOST_LEFT + 1, 8)
    with torch.inference_mode():
        prefill(model, ids[:, :7], cache)
        logits = step(ids[:, 7], cache)
        expected = model(ids).logits[:, 7]
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max()
    packed = [product.packed is not None for product in step._products()]
    assert all(packed) == any(packed) == packs_bfloat16(torch.device("cpu"))
    assert step.output.packed_bytes == 2 * model.lm_head.in_features * model.lm_head.out_features


def count(kind: type, monkeypatch) -> list[Any]:
    made: list[Any] = []
    before = kind.__init__

    def init(self: Any, stored: dict[str, Tensor]) -> None:
        made.append(weakref.ref(self))
        before(self, stored)

    monkeypatch.setattr(kind, "__init__", init)
    return made


@pytest.mark.parametrize(("weights", "kind"), [("int8", Int8), ("int4", Int4)])
def test_a_models_steps_share_what_was_made_of_its_weights(
    weights: str, kind: type, monkeypatch
) -> None:
    model: Any = tiny_model("retention", dtype=torch.float32)
    replace_linears(model, weights)
    lay_out_for_decoding(model)
    names = set(model.state_dict())
    quantised._choose(weights, "cpu")  # which makes one to try it
    made = count(kind, monkeypatch)
    with torch.inference_mode():
        steps = [DecodeStep(model)]
    first = len(made)
    steps += [DecodeStep(model), DecodeStep(model)]
    assert len(made) == first > 0 and set(model.state_dict()) == names
    other = copy.deepcopy(model)
    DecodeStep(other)
    assert len(made) == 2 * first
    del steps, other, model
    gc.collect()
    assert not any(operator() for operator in made)


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("change", ["in place", "another", "data", "inference"])
def test_changed_weights_are_made_anew(weights: str, change: str) -> None:
    layers = [make_layer(20, 64, weights, seed) for seed in (0, 1)]
    x, new = torch.randn(2, 64), make_layer(20, 64, weights, seed=2)
    with torch.inference_mode(change == "inference"):
        if change == "inference":
            for layer in layers:
                for name, tensor in layer.stored.items():
                    layer.register_buffer(name, tensor.clone())
        for some in (layers[:1], layers):  # of rows that begin with the same layer
            QuantisedProduct(some)
        for name, tensor in new.stored.items():
            if change == "another":
                layers[1].register_buffer(name, tensor)
            elif change == "data":
                layers[1].stored[name].data = tensor
            else:
                layers[1].stored[name].copy_(tensor)
        for some in (layers, layers[:1]):
            check(QuantisedProduct(some), some, x, TOLERANCES[weights])


def test_packed_int8_goes_with_its_last_user() -> None:
    product = QuantisedProduct([make_layer(8, 32, "int8")])
    gone = weakref.ref(product.operator)
    del product
    assert gone() is None


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 6), inputs=st.integers(1, 70), outputs=st.integers(1, 70))
def test_bfloat16_products(rows: int, inputs: int, outputs: int) -> None:
    x, weight = torch.randn(rows, inputs).bfloat16(), torch.randn(outputs, inputs).bfloat16()
    expected = F.linear(x.double(), weight.double())
    y = Bfloat16Product(weight)(x).double()
    assert y.shape == expected.shape
    bound = x.abs().max() * weight.abs().sum(dim=1).max()
    assert (y - expected).abs().max() <= 2**-7 * bound
    assert torch.backends.mkldnn.enabled
    with torch.backends.mkldnn.flags(enabled=False):
        Bfloat16Product(weight)(x)
        assert not torch.backends.mkldnn.enabled


@pytest.mark.slow
@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("rows", [1, MOST_LEFT + 1])
def test_a_compiled_step(weights: str, rows: int) -> None:
    model: Any = tiny_model("retention", dtype=torch.float32)
    replace_linears(model, weights)
    lay_out_for_decoding(model)
    step, compiled = DecodeStep(model), DecodeStep(model).compile()
    cache, ids = model.new_cache(), random_ids(rows, 8)
    with torch.inference_mode():
        prefill(model, ids[:, :5], cache)
        other = copy.deepcopy(cache)
        for t in range(5, 8):
            expected, logits = step(ids[:, t], cache), compiled(ids[:, t], other)
            assert (logits - expected).abs().max() <= 0.02 * expected.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("weights", FORMATS)
def test_products_on_a_gpu(weights: str) -> None:
    layer = make_layer(100, 96, weights)
    product = QuantisedProduct([copy.deepcopy(layer).cuda()])
    for rows in (1, 5, MOST_DIRECT + 1):
        x = torch.randn(rows, 96)
        y, expected = product(x.cuda()).cpu(), expected_of([layer], x)
        assert (y - expected).abs().max() <= 2**-6 * expected.abs().max()
