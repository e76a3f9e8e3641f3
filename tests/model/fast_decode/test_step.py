"""The lean decode step against the model's own forward pass."""

import copy
import functools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from retnet.model.linear import MOST_LEFT, PackedWeight
from retnet.model.step import MOST_PACKED, DecodeStep, is_plain

from retnet import RetNetConfig, RetNetForCausalLM, TransformerConfig, TransformerForCausalLM
from retnet.generation import (
    decode_one,
    generate,
    make_step,
    prefill,
)
from retnet.model import products
from retnet.model import step as step_module
from retnet.model.fast_decode.weights import lay_out_for_decoding
from tests.generation.builders import MIXERS, VOCAB, tiny_model

both_mixers = pytest.mark.parametrize("mixer", MIXERS)


def random_ids(rows: int, length: int, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(1))


SHARED: dict[str, Any] = {
    "norm": st.sampled_from(["layernorm", "rmsnorm"]),
    "ffn": st.sampled_from(["gelu", "swiglu"]),
    "rotary_layout": st.sampled_from(["interleaved", "half"]),
    "rotary_frequencies": st.sampled_from(["linspace", "standard"]),
    "num_heads": st.sampled_from([1, 2, 4]),
    "vocab_size": st.integers(3, 70),
    "tie_word_embeddings": st.booleans(),
}
RETENTION: dict[str, Any] = {
    "head_norm": st.sampled_from(["groupnorm", "rmsnorm", "none"]),
    "decay": st.sampled_from(["paper", "log_linear", 0.9, 1.0]),
    "gate": st.booleans(),
    "value_size": st.sampled_from([12, 24, 36]),
}


def draw_model(draw: st.DataObject, mixer: str) -> Any:
    fields = SHARED | (RETENTION if mixer == "retention" else {})
    values = {key: draw.draw(strategy, label=key) for key, strategy in fields.items()}
    values |= {"hidden_size": 24, "num_hidden_layers": 2, "dropout": 0.5}
    torch.manual_seed(0)
    if mixer == "retention":
        model: Any = RetNetForCausalLM(RetNetConfig(**values))
    else:
        model = TransformerForCausalLM(TransformerConfig(**values))
    for weight in model.parameters():
        weight.data.mul_(1.0 if weight.dim() == 1 else 3.0)
    return model.double().eval()


@both_mixers
@settings(max_examples=30, deadline=None)
@given(draw=st.data())
def test_the_step_is_the_forward_pass(mixer: str, draw: st.DataObject) -> None:
    """Every variant of the model, whether its weights are laid out for it or not."""
    model, rows = draw_model(draw, mixer), draw.draw(st.integers(1, 3), label="rows")
    assert is_plain(model)
    ids = random_ids(rows, 12, model.config.vocab_size)
    plain_cache = model.new_cache()
    prefill(model, ids[:, :7], plain_cache)
    lean_cache = copy.deepcopy(plain_cache)
    if draw.draw(st.booleans(), label="laid out"):
        lay_out_for_decoding(model)
    step = DecodeStep(model)
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
@pytest.mark.parametrize(
    ("rows", "most", "packs"),
    [(MOST_LEFT, MOST_PACKED, False), (MOST_LEFT + 1, MOST_PACKED, True), (70, 1, False)],
)
def test_weights_are_packed_for_many_rows(
    mixer: str, rows: int, most: int, packs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to so many bytes; then the step is right for any number of rows."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch without oneDNN")
    monkeypatch.setattr(products, "_HAS_KERNELS", True)  # right on every CPU, if not faster
    if not products._is_exact():
        pytest.skip("a CPU whose products round to bfloat16 when they may")
    monkeypatch.setattr(step_module, "MOST_PACKED", most)
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
                assert isinstance(step.output, PackedWeight) == packs
                weights = [w for part in step._parts() for w in (*part.inputs, part.output)]
                assert all(isinstance(weight, PackedWeight) == packs for weight in weights)


@both_mixers
def test_rows_that_began_with_padding(mixer: str) -> None:
    model = tiny_model(mixer)
    ids, mask = random_ids(2, 9), torch.ones(2, 8, dtype=torch.int64)
    mask[1, :3] = 0
    cache = model.new_cache()
    with torch.inference_mode():
        model(ids[:, :8], attention_mask=mask, past_key_values=cache)
        expected = decode_one(model, ids[:, 8], copy.deepcopy(cache))
        assert DecodeStep(model).fits(cache) == (mixer == "retention")
        torch.testing.assert_close(make_step(model)(ids[:, 8], cache), expected)


@both_mixers
def test_an_empty_cache_takes_the_plain_way(mixer: str) -> None:
    model, ids = tiny_model(mixer), random_ids(2, 2)
    cache = model.new_cache()
    step = make_step(model)
    parts = [step(ids[:, t], cache) for t in (0, 1)]
    torch.testing.assert_close(torch.stack(parts, 1), model(ids, use_cache=False).logits)


@both_mixers
def test_decoding_calls_no_module_and_the_state_stays_where_it_is(mixer: str) -> None:
    model, ids = tiny_model(mixer), random_ids(1, 9)
    cache, step = model.new_cache(max_length=9), make_step(model)
    prefill(model, ids[:, :8], cache)
    held = [getattr(layer, name) for layer in cache.layers for name in layer.tensors()]
    places = [tensor.data_ptr() for tensor in held]
    for module in model.modules():
        module.forward = None  # calling it would raise
    step(ids[:, 8], cache)
    after = [getattr(layer, name) for layer in cache.layers for name in layer.tensors()]
    assert places == [tensor.data_ptr() for tensor in after]


@both_mixers
def test_what_is_not_plain_takes_the_plain_way(mixer: str) -> None:
    """Hooks are called, adapters and training's dropout have their effect."""

    class Adapted(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    ids = random_ids(1, 9)
    hooked, adapted, training = (tiny_model(mixer) for _ in range(3))
    seen: list[int] = []
    hooked.lm_head.register_forward_hook(lambda *_: seen.append(1))
    adapted.model.layers[0].mixer.o_proj.__class__ = Adapted
    training.train()
    for model in (hooked, adapted, training):
        assert not is_plain(model)
        cache, plain = model.new_cache(), model.new_cache()
        prefill(model, ids[:, :8], cache)
        prefill(model, ids[:, :8], plain)
        logits = make_step(model)(ids[:, 8], cache)
        torch.testing.assert_close(logits, decode_one(model, ids[:, 8], plain))
    assert len(seen) == 4


@both_mixers
def test_weights_laid_out_once_are_one_matrix_and_can_be_saved(mixer: str, tmp_path: Path) -> None:
    model = tiny_model(mixer)
    values = {name: weight.clone() for name, weight in model.state_dict().items()}
    first = model.model.layers[0].mixer.q_proj.weight
    assert len(DecodeStep(model).layers[0][1].inputs) > 1
    for _ in range(2):
        lay_out_for_decoding(model)
        (shared,) = DecodeStep(model).layers[0][1].inputs
        assert shared.data_ptr() == first.data_ptr()
    assert all(weight.equal(values[name]) for name, weight in model.state_dict().items())
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    assert all(weight.equal(values[name]) for name, weight in again.state_dict().items())


@both_mixers
def test_low_precision_weights(mixer: str) -> None:
    model, ids = tiny_model(mixer, dtype=torch.bfloat16), random_ids(2, 9)
    cache = model.new_cache()
    prefill(model, ids[:, :8], cache)
    expected = decode_one(model, ids[:, 8], copy.deepcopy(cache))
    logits = make_step(model)(ids[:, 8], cache)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=0.05, atol=0.05 * expected.std().item())


@both_mixers
def test_generate_decodes_by_the_step(mixer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = DecodeStep.__call__

    def counted(self: DecodeStep, *args: Any) -> torch.Tensor:
        calls.append(1)
        return real(self, *args)

    monkeypatch.setattr(DecodeStep, "__call__", counted)
    assert len(list(generate(tiny_model(mixer), random_ids(2, 5), max_new_tokens=6))) == 6
    assert len(calls) == 5


class Counted:
    """How often the lean step ran, and the model's own forward pass."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps = self.passes = 0
        step, whole = DecodeStep.__call__, type(model.model).forward

        def count_step(own: DecodeStep, *args: Any) -> torch.Tensor:
            self.steps += 1
            return step(own, *args)

        def count_pass(own: Any, *args: Any, **kwargs: Any) -> Any:
            self.passes += 1
            return whole(own, *args, **kwargs)

        monkeypatch.setattr(DecodeStep, "__call__", count_step)
        monkeypatch.setattr(type(model.model), "forward", count_pass)


GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}


@both_mixers
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"return_dict_in_generate": True}])
def test_transformers_generate_takes_the_step(mixer: str, options: dict, monkeypatch) -> None:
    model, ids = tiny_model(mixer), random_ids(2, 5)
    options = GREEDY | {"pad_token_id": 0} | options
    expected = model.generate(ids, **options, use_cache=False)
    counted = Counted(model, monkeypatch)
    made = model.generate(ids, **options)
    if "return_dict_in_generate" in options:
        expected, made = expected.sequences, made.sequences
    assert made.equal(expected)
    assert counted.steps == 7 and counted.passes == 1
    assert "forward" not in vars(model)


@both_mixers
def test_transformers_generate_without_the_step(mixer: str, monkeypatch) -> None:
    """Padding needs a mask, hidden states the whole pass, hooks their calls."""
    model, ids = tiny_model(mixer), random_ids(2, 5)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    counted = Counted(model, monkeypatch)
    for options in (
        {"attention_mask": mask},
        {"output_hidden_states": True, "return_dict_in_generate": True},
        {"use_cache": False},
    ):
        model.generate(ids, **GREEDY, pad_token_id=0, **options)
    model.lm_head.register_forward_hook(lambda *_: None)
    model.generate(ids, **GREEDY, pad_token_id=0)
    assert counted.steps == 0 and counted.passes == 32


@both_mixers
def test_generate_that_fails_leaves_the_model_as_it_was(mixer: str) -> None:
    model = tiny_model(mixer)
    with pytest.raises(ValueError, match="max_new_tokens"):
        model.generate(random_ids(1, 3), max_new_tokens=0)
    assert "forward" not in vars(model)


def test_an_odd_width_of_all_projections() -> None:
    """Rotated pairs begin at even places of the memory only."""
    torch.manual_seed(0)
    config = RetNetConfig(vocab_size=50, hidden_size=24, num_hidden_layers=1, num_heads=3,
                          value_size=27, gate=False)  # fmt: skip
    model, ids = RetNetForCausalLM(config).double().eval(), random_ids(2, 6, 50)
    made = model.generate(ids, **GREEDY, pad_token_id=0)
    assert made.equal(model.generate(ids, **GREEDY, pad_token_id=0, use_cache=False))


@both_mixers
def test_a_cache_of_our_prefill_is_gone_on_with_by_generate(mixer: str) -> None:
    """It was made in inference mode, where generate is not."""
    model, ids = tiny_model(mixer), random_ids(1, 8)
    cache = model.new_cache()
    prefill(model, ids[:, :-1], cache)
    made = model.generate(ids, past_key_values=cache, **GREEDY, pad_token_id=0)
    assert made.equal(model.generate(ids, **GREEDY, pad_token_id=0))


@both_mixers
def test_two_threads_may_generate_with_one_model(mixer: str) -> None:
    model, ids = tiny_model(mixer), [random_ids(1, length) for length in (3, 5, 7, 9)]
    expected = [model.generate(one, **GREEDY, pad_token_id=0) for one in ids]
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda one: model.generate(one, **GREEDY, pad_token_id=0), ids))
    assert all(a.equal(b) for a, b in zip(made, expected, strict=True))
    assert "forward" not in vars(model)


def test_what_asks_for_something_else_gets_it() -> None:
    """False is an answer too: the step gives none but the default output."""
    model, ids = tiny_model("retention"), random_ids(1, 4)
    cache = model.new_cache()
    with torch.no_grad(), model._single_tokens_by_the_step():
        model(input_ids=ids, past_key_values=cache)
        assert isinstance(
            model(input_ids=ids[:, :1], past_key_values=cache, return_dict=False), tuple
        )


@both_mixers
def test_compiled_and_subclassed_parts_are_not_plain(mixer: str) -> None:
    class Quantised(torch.nn.Parameter):
        pass

    compiled, quantised = tiny_model(mixer), tiny_model(mixer)
    compiled.compile()
    weight = quantised.lm_head.weight
    quantised.lm_head.weight = Quantised(weight.detach())
    assert not is_plain(compiled) and not is_plain(quantised)


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


@both_mixers
def test_steps_are_compiled_for_any_number_of_row_counts(mixer: str, monkeypatch) -> None:
    """More than the compiler's limit of a function, with packed weights and without."""
    real = torch.compile
    traced = functools.partial(real, backend="eager")  # traces like the others, compiles nothing
    monkeypatch.setattr(torch, "compile", traced)
    monkeypatch.setattr(products, "_HAS_KERNELS", True)
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
