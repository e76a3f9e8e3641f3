"""Layers of attention in a RetNet, and attention over a window: keys, sizes, state, fast step."""

import copy
from typing import Any

import pytest
import torch

from retnet.generation import decode_one, make_step, prefill
from retnet.model.mixers.attention import CausalAttention, WindowAttention
from retnet.model.mixers.retention import MultiScaleRetention
from retnet.model.models import GatedRetNetConfig, RetNetConfig, TransformerConfig
from tests.model.conftest import ROW_BYTES, make_model, random_ids
from tests.model.recorders import LargestTensor

WINDOWED = ("hybrid-window", "attention-window")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"attention_layers": [4]}, "attention_layers ([4]) must be among the layers 0 to 3"),
        ({"attention_layers": [-1]}, "attention_layers ([-1]) must be among"),
        ({"attention_layers": [1, 1]}, "attention_layers ([1, 1]) names a layer twice"),
        ({"attention_layers": [True]}, "attention_layers ([True]) must be a list of whole numbers"),
        ({"attention_layers": 1}, "attention_layers (1) must be a list of whole numbers"),
        ({"attention_window": 8}, "attention_window (8) needs layers that are attention"),
        ({"attention_layers": [], "attention_window": 8}, "needs layers that are attention"),
        ({"attention_layers": [1], "attention_window": 0}, "attention_window (0) must be"),
        ({"attention_layers": [1], "value_size": 5000}, "value_size (5000) leaves less than"),
    ],
)
@pytest.mark.parametrize("kind", [RetNetConfig, GatedRetNetConfig])
def test_values_that_make_no_hybrid(kind: Any, values: dict, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        kind(**values)
    assert words in str(caught.value)


@pytest.mark.parametrize("window", [0, 1.5, True])
def test_values_that_make_no_window(window: Any) -> None:
    with pytest.raises(ValueError, match=r"attention_window \(.*\) must be a whole number"):
        TransformerConfig(attention_window=window)


def test_each_layer_has_12_d_squared_parameters_by_itself() -> None:
    model = make_model("retention", num_hidden_layers=3, attention_layers=[2, 0])
    config = model.config
    assert config.intermediate_size is None and config.attention_layers == [0, 2]
    kinds = [type(layer.mixer) for layer in model.model.layers]
    assert kinds == [CausalAttention, MultiScaleRetention, CausalAttention]
    for layer in model.model.layers:
        assert sum(p.numel() for p in layer.parameters() if p.dim() == 2) == 12 * 32**2
    widths = [layer.ffn.up_proj.out_features for layer in model.model.layers]
    assert widths == [128, 64, 128]
    fixed = make_model("retention", attention_layers=[0], intermediate_size=48)
    assert {layer.ffn.up_proj.out_features for layer in fixed.model.layers} == {48}
    assert type(config)(**config.to_dict()).to_dict() == config.to_dict()


def test_attention_layers_turn_and_begin_as_the_transformers() -> None:
    values = {"hidden_size": 256, "num_heads": 4, "num_hidden_layers": 8, "attention_layers": [0]}
    model = make_model("retention", torch.float32, rotary_layout="interleaved", **values)
    mixer = model.model.layers[0].mixer
    assert mixer.config.rotary_layout == "half" and mixer.config.rotary_frequencies == "standard"
    assert model.config.rotary_layout == "interleaved"
    assert mixer.q_proj.weight.std().item() == pytest.approx(0.04, rel=0.02)  # doubled there
    assert mixer.o_proj.weight.std().item() == pytest.approx(0.04 / 4, rel=0.02)


@pytest.mark.parametrize("name", WINDOWED)
def test_the_state_of_a_window_is_reserved_at_once_and_stays(name: str) -> None:
    model = make_model(name, torch.float32)
    assert not model.grows and model.bytes_per_token == 0
    sizes, largest = set(), set()
    for length in (2, 16, 700):
        cache = model.new_cache()
        with torch.no_grad():
            model(random_ids(1, length), past_key_values=cache)
            with LargestTensor() as recorder:
                model(random_ids(1, 1), past_key_values=cache)
        sizes.add(cache.num_bytes())
        largest.add(recorder.bytes)
    ring = 2 * 5 * 32 * 4 + 8  # keys and values of the window, and how many there are
    retained = 2 * 16 * 16 * 4
    assert sizes == {(ring + retained if name == "hybrid-window" else 2 * ring) + ROW_BYTES}
    assert len(largest) == 1


def test_what_a_hybrid_over_everything_adds_with_each_token() -> None:
    model = make_model("hybrid", torch.float32)
    assert model.grows and model.bytes_per_token == 2 * 32 * 4
    cache = model.new_cache(max_length=50)
    model(random_ids(1, 9), past_key_values=cache)
    assert cache.num_bytes() == 2 * 16 * 32 * 4 + 9 * 2 * 32 * 4 + ROW_BYTES


def test_a_window_that_reaches_over_the_text_is_plain_attention() -> None:
    ids = random_ids(2, 12)
    wide, narrow = (make_model("attention", attention_window=n) for n in (12, 4))
    whole = make_model("attention")(ids).logits
    assert (wide(ids).logits - whole).abs().max() < 1e-12
    assert (narrow(ids).logits - whole)[:, 4:].abs().max() > 1e-3
    assert type(wide.model.layers[0].mixer) is WindowAttention


@pytest.mark.parametrize("name", WINDOWED)
def test_memory_of_a_long_text_is_linear(name: str) -> None:
    model, sizes = make_model(name, torch.float32), []
    for length in (1024, 4096):
        ids = random_ids(1, length)
        with LargestTensor() as recorder:
            model.train()(ids, labels=ids, return_logits=False).loss.backward()
        sizes.append(recorder.bytes)
    assert sizes[1] <= 4.2 * sizes[0] and sizes[1] < 4096 * 4096 / 2


@pytest.mark.parametrize("name", ["hybrid", *WINDOWED])
@pytest.mark.parametrize("rows", [1, 3])
def test_the_fast_step_is_the_forward_pass(name: str, rows: int) -> None:
    """Windows also after padding: the ring knows how much is in it."""
    model, ids = make_model(name), random_ids(rows, 20)
    mask = torch.ones(rows, 7, dtype=torch.int64)
    if name in WINDOWED:
        mask[-1, :4] = 0
    cache = model.new_cache()
    with torch.inference_mode():
        if mask.all():
            prefill(model, ids[:, :7], cache)
        else:
            model(ids[:, :7], attention_mask=mask, past_key_values=cache)
    plain, step = copy.deepcopy(cache), make_step(model)
    for t in range(7, 20):
        expected = decode_one(model, ids[:, t], plain)
        torch.testing.assert_close(step(ids[:, t], cache), expected, rtol=1e-9, atol=1e-10)
        assert step.path == "fast step"
    assert cache.num_bytes() == plain.num_bytes()
    expected = decode_one(model, ids[:, 0], plain)  # and either way goes on from the other
    torch.testing.assert_close(decode_one(model, ids[:, 0], cache), expected)
