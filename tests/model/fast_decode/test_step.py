"""The lean decode step against the model's own forward pass."""

import copy
import functools
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retnet import RetNetConfig, RetNetForCausalLM
from retnet.generation import decode_one, make_step, prefill
from retnet.model.fast_decode.step import MOST_PACKED, DecodeStep, make_decode_step
from retnet.model.fast_decode.weights import MOST_LEFT, PackedWeight, lay_out_for_decoding
from retnet.model.mixers import MIXERS
from retnet.model.models import model_class
from tests.generation.builders import fill_zeros, tiny_model
from tests.model.fast_decode.cases import GREEDY, both_mixers, random_ids

SHARED: dict[str, Any] = {
    "norm": st.sampled_from(["layernorm", "rmsnorm"]),
    "ffn": st.sampled_from(["gelu", "swiglu", "geglu", "reglu"]),
    "scale_embedding": st.booleans(),
    "rotary_layout": st.sampled_from(["interleaved", "half"]),
    "rotary_frequencies": st.sampled_from(["linspace", "standard"]),
    "num_heads": st.sampled_from([1, 2, 4]),
    "vocab_size": st.integers(3, 70),
    "tie_word_embeddings": st.booleans(),
}
OWN: dict[str, Any] = {
    "head_norm": st.sampled_from(["groupnorm", "rmsnorm", "none"]),
    "head_norm_affine": st.booleans(),
    "num_kv_heads": st.sampled_from([None, 1]),
    "decay": st.sampled_from(["paper", "log_linear", 0.9, 1.0]),
    "gate": st.booleans(),
    "value_size": st.sampled_from([12, 24, 36]),
    "num_features": st.sampled_from([1, 7, 16]),
}


def draw_model(draw: st.DataObject, mixer: str) -> Any:
    kind: Any = model_class(mixer)
    keys = kind.config_class.__dataclass_fields__
    fields = SHARED | {key: strategy for key, strategy in OWN.items() if key in keys}
    values = {key: draw.draw(strategy, label=key) for key, strategy in fields.items()}
    values |= {"hidden_size": 24, "num_hidden_layers": 2, "dropout": 0.5}
    if values.get("head_norm") == "none":
        values["head_norm_affine"] = False
    if MIXERS[mixer].positions == "learned":
        values["max_position_embeddings"] = 64
    values |= {"aft_rank": 2} if "aft_rank" in keys else {}
    torch.manual_seed(0)
    model = kind(kind.config_class(**values))
    for weight in model.parameters():
        weight.data.mul_(torch.rand_like(weight) if weight.dim() == 1 else 3.0)
    fill_zeros(model)
    return model.double().eval()


@both_mixers
@settings(max_examples=15, deadline=None)
@given(draw=st.data())
def test_the_step_is_the_forward_pass(mixer: str, draw: st.DataObject) -> None:
    """Every variant of the model, whether its weights are laid out for it or not."""
    model, rows = draw_model(draw, mixer), draw.draw(st.integers(1, 3), label="rows")
    ids = random_ids(rows, 12, model.config.vocab_size)
    plain_cache = model.new_cache()
    prefill(model, ids[:, :7], plain_cache)
    lean_cache = copy.deepcopy(plain_cache)
    if draw.draw(st.booleans(), label="laid out"):
        lay_out_for_decoding(model)
    step, reason = make_decode_step(model)
    assert step is not None and not reason
    with torch.inference_mode():
        for t in range(7, 12):
            logits = step(ids[:, t], lean_cache)
            expected = decode_one(model, ids[:, t], plain_cache)
            torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-10)
        # and either cache goes on in the other way
        logits = decode_one(model, ids[:, 0], lean_cache)
        torch.testing.assert_close(logits, step(ids[:, 0], plain_cache), rtol=1e-9, atol=1e-10)
    assert lean_cache.length == plain_cache.length == 13
    assert lean_cache.record.equal(plain_cache.record)


@both_mixers
@pytest.mark.parametrize(("rows", "packs"), [(MOST_LEFT, False), (MOST_LEFT + 1, True)])
def test_weights_are_packed_for_many_rows(
    mixer: str, rows: int, packs: bool, fast_products: None
) -> None:
    """Then the step is right for any number of rows."""
    model = tiny_model(mixer, dtype=torch.float32)
    step = DecodeStep(model)
    with torch.inference_mode():
        for count in (rows, 2 * rows, 1):
            ids = random_ids(count, 9)
            cache = model.new_cache()
            prefill(model, ids[:, :8], cache)
            expected = decode_one(model, ids[:, 8], copy.deepcopy(cache))
            logits = step(ids[:, 8], cache)
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
            if count == rows:
                weights = [product.packed for product in step._products()]
                assert len(weights) > 4
                assert all(isinstance(weight, PackedWeight) == packs for weight in weights)


@pytest.mark.parametrize("layers", [1, 30])
def test_large_weights_are_not_packed(layers: int) -> None:
    """They would be in memory twice."""
    config = RetNetConfig(vocab_size=8, hidden_size=1024, num_hidden_layers=layers)
    with torch.device("meta"):
        model = RetNetForCausalLM(config).eval()
    step, _ = make_decode_step(model)
    assert step is not None
    assert step.may_pack == (4 * model.num_parameters() <= MOST_PACKED) == (layers == 1)


@both_mixers
def test_rows_that_began_with_padding(mixer: str) -> None:
    model = tiny_model(mixer)
    ids, mask = random_ids(2, 9), torch.ones(2, 8, dtype=torch.int64)
    mask[1, :3] = 0
    cache = model.new_cache()
    with torch.inference_mode():
        model(ids[:, :8], attention_mask=mask, past_key_values=cache)
        expected = decode_one(model, ids[:, 8], copy.deepcopy(cache))
        step = make_step(model)
        torch.testing.assert_close(step(ids[:, 8], cache), expected)
    plain = "plain step: the cache needs a mask"
    assert step.path == (plain if model.grows else "fast step")


@both_mixers
def test_decoding_calls_no_module_and_the_state_stays_where_it_is(mixer: str) -> None:
    model, ids = tiny_model(mixer), random_ids(1, 9)
    cache, step = model.new_cache(max_length=9), make_step(model)
    prefill(model, ids[:, :8], cache)
    places = {name: x.data_ptr() for name, x in cache.tensors().items()}
    for module in model.modules():
        module.forward = None  # calling it would raise
    step(ids[:, 8], cache)
    assert step.path == "fast step"
    assert places == {name: x.data_ptr() for name, x in cache.tensors().items()}


@both_mixers
def test_low_precision_weights(mixer: str) -> None:
    model, ids = tiny_model(mixer, dtype=torch.bfloat16), random_ids(2, 9)
    cache = model.new_cache()
    prefill(model, ids[:, :8], cache)
    expected = decode_one(model, ids[:, 8], copy.deepcopy(cache))
    logits = make_step(model)(ids[:, 8], cache)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=0.05, atol=0.05 * expected.std().item())


def test_an_odd_width_of_all_projections() -> None:
    """Rotated pairs begin at even places of the memory only."""
    torch.manual_seed(0)
    config = RetNetConfig(vocab_size=50, hidden_size=24, num_hidden_layers=1, num_heads=3,
                          value_size=27, gate=False)  # fmt: skip
    model, ids = RetNetForCausalLM(config).double().eval(), random_ids(2, 6, 50)
    made = model.generate(ids, **GREEDY, pad_token_id=0)
    assert made.equal(model.generate(ids, **GREEDY, pad_token_id=0, use_cache=False))


@both_mixers
def test_two_threads_may_generate_with_one_model(mixer: str) -> None:
    model, ids = tiny_model(mixer), [random_ids(1, length) for length in (2, 4, 6, 8)]
    expected = [model.generate(one, **GREEDY, pad_token_id=0) for one in ids]
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda one: model.generate(one, **GREEDY, pad_token_id=0), ids))
    assert all(a.equal(b) for a, b in zip(made, expected, strict=True))


@both_mixers
def test_the_step_holds_the_weights_of_its_making(mixer: str) -> None:
    """All of them alike: in-place updates are seen, other storage is not."""
    model, ids = tiny_model(mixer), random_ids(1, 9)
    cache = model.new_cache()
    prefill(model, ids[:, :8], cache)
    step = DecodeStep(model)
    with torch.inference_mode():
        before = step(ids[:, 8], copy.deepcopy(cache))
        for weight in model.parameters():
            weight.data = torch.zeros_like(weight)
        assert step(ids[:, 8], copy.deepcopy(cache)).equal(before)


@pytest.mark.parametrize("mixer", ["retention", pytest.param("attention", marks=pytest.mark.slow)])
def test_steps_are_compiled_for_any_number_of_row_counts(
    mixer: str, fast_products: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than the compiler's limit of a function, with packed weights and without."""
    real = torch.compile
    traced = functools.partial(real, backend="eager")  # traces like the others, compiles nothing
    monkeypatch.setattr(torch, "compile", traced)
    torch._dynamo.reset()
    model = tiny_model(mixer, dtype=torch.float32)
    with torch._dynamo.config.patch(recompile_limit=2):
        step = DecodeStep(model).compile()
        for count in (1, 5, 2):
            ids, cache = random_ids(count, 9), model.new_cache()
            with torch.inference_mode():
                prefill(model, ids[:, :8], cache)
                expected = decode_one(model, ids[:, 8], copy.deepcopy(cache))
                logits = step(ids[:, 8], cache)
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_a_step_that_is_dropped_leaves_nothing_in_memory() -> None:
    """At once: it holds the weights, and the next model may need their place."""
    step = make_decode_step(tiny_model("retention"))[0]
    assert step is not None
    weight = weakref.ref(step.embedding)
    gc.collect()
    gc.disable()
    try:
        del step
        assert weight() is None
    finally:
        gc.enable()
