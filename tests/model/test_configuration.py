"""Configurations: balance of parameters, errors that name key, value and fix."""

import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retnet import RetNetConfig, TransformerConfig


@given(
    heads=st.integers(1, 8),
    half=st.integers(2, 64),
    ffn=st.sampled_from(["gelu", "swiglu", "geglu", "reglu"]),
    gate=st.booleans(),
    grouped=st.booleans(),
)
def test_a_layer_has_12_d_squared_matrix_parameters(heads, half, ffn, gate, grouped) -> None:
    width, own = 2 * heads * half, {"num_kv_heads": 1} if grouped else {}
    for config in (
        RetNetConfig(hidden_size=width, num_heads=heads, ffn=ffn, gate=gate, **own),
        TransformerConfig(hidden_size=width, num_heads=heads, ffn=ffn),
    ):
        matrices = 2 if ffn == "gelu" else 3
        total = config.mixer_parameters + matrices * width * config.intermediate_size
        assert abs(total - 12 * width**2) <= matrices * width / 2


def test_the_papers_sizes() -> None:
    config = RetNetConfig(hidden_size=2048, num_heads=8)
    assert (config.intermediate_size, config.value_size, config.head_dim) == (4096, 4096, 256)
    assert TransformerConfig(hidden_size=2048, num_heads=16).intermediate_size == 8192


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"hidden_size": 0}, "hidden_size (0) must be a whole number of at least 1"),
        ({"hidden_size": "256"}, "hidden_size ('256') must be a whole number"),
        ({"num_heads": -1}, "num_heads (-1)"),
        ({"num_hidden_layers": True}, "num_hidden_layers (True)"),
        ({"vocab_size": 1.5}, "vocab_size (1.5)"),
        ({"intermediate_size": 0}, "intermediate_size (0)"),
        ({"max_position_embeddings": 0}, "max_position_embeddings (0)"),
        (
            {"hidden_size": 250, "num_heads": 4},
            "hidden_size (250) must be divisible by num_heads (4): take 248",
        ),
        ({"hidden_size": 12, "num_heads": 4}, "rotation turns pairs of channels"),
        ({"norm": "layer"}, "norm ('layer') must be one of layernorm, rmsnorm; did you mean"),
        ({"ffn": "relu"}, "ffn ('relu') must be one of gelu, swiglu, geglu, reglu"),
        ({"scale_embedding": 16.0}, "scale_embedding (16.0) must be true or false"),
        ({"rotary_layout": "x"}, "rotary_layout ('x')"),
        ({"rotary_frequencies": "x"}, "rotary_frequencies ('x')"),
        ({"rotary_base": 0}, "rotary_base (0) must be finite and at least 1"),
        ({"rotary_base": 1e-320}, "rotary_base (1e-320) must be finite and at least 1"),
        ({"rotary_base": float("inf")}, "rotary_base (inf) must be finite and at least 1"),
        ({"bos_token_id": -7}, "bos_token_id (-7) must be in the vocabulary, from 0 to vocab_size"),
        ({"eos_token_id": [1, 4096]}, "eos_token_id ([1, 4096]) must be in the vocabulary, from 0"),
        ({"vocab_size": 9, "pad_token_id": 9}, "pad_token_id (9) must be in the vocabulary, from"),
        ({"bos_token_id": "1"}, "bos_token_id ('1') must be a whole number or null"),
        ({"pad_token_id": [1]}, "pad_token_id ([1]) must be a whole number or null"),
        ({"eos_token_id": [[2], 3.5]}, "eos_token_id ([[2], 3.5]) must be a whole number, a list"),
        ({"norm_eps": "small"}, "norm_eps ('small') must be a number"),
        ({"dropout": 1}, "dropout (1) drops everything"),
        ({"dropout": -0.1}, "dropout (-0.1) must be between 0 and 1"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings (1) must be true or false"),
    ],
)
@pytest.mark.parametrize("kind", [RetNetConfig, TransformerConfig])
def test_values_that_make_no_model(kind, values: dict, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        kind(**values)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"head_norm": "group"}, "head_norm ('group') must be one of groupnorm, rmsnorm, none"),
        ({"head_norm": "none", "head_norm_affine": True}, "head_norm_affine (True) needs a head_n"),
        ({"head_norm_affine": "yes"}, "head_norm_affine ('yes') must be true or false"),
        ({"head_norm_eps": -1}, "head_norm_eps (-1) must be between 0 and 1"),
        ({"num_kv_heads": 0}, "num_kv_heads (0) must be a whole number of at least 1"),
        ({"num_kv_heads": 3}, "num_heads (4) must be divisible by num_kv_heads (3): take 3"),
        ({"head_norm_eps": -1}, "head_norm_eps (-1)"),
        (
            {"decay": "papr"},
            "decay ('papr') must be a number in (0, 1] or one of paper, log_linear",
        ),
        ({"decay": 0}, "decay (0) must be above 0 and at most 1"),
        ({"decay": 1.5}, "decay (1.5)"),
        ({"decay": True}, "decay (True)"),
        ({"gate": "yes"}, "gate ('yes')"),
        ({"chunk_size": 0}, "chunk_size (0)"),
        ({"value_size": 510}, "value_size (510) must be divisible by num_heads (4): take 512"),
        ({"value_size": 5000}, "value_size (5000) leaves less than hidden_size (256)"),
        ({"value_size": 10**12, "chunk_size": 8}, "value_size (1000000000000) leaves less than"),
    ],
)
def test_values_that_make_no_retention(values: dict, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        RetNetConfig(**values)
    assert words in str(caught.value)


def test_all_problems_at_once() -> None:
    with pytest.raises(ValueError, match=r"hidden_size \(0\).*ffn \('x'\)"):
        RetNetConfig(hidden_size=0, ffn="x")


def test_round_trip_and_common_names(tmp_path) -> None:
    config = RetNetConfig(hidden_size=64, decay=0.9, bos_token_id=1, value_size=96)
    config.save_pretrained(tmp_path)
    again = RetNetConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert again.num_attention_heads == config.num_heads == 4
    assert RetNetConfig(num_attention_heads=2).num_heads == 2
    assert (again.bos_token_id, again.eos_token_id, again.pad_token_id) == (1, None, None)


def test_unknown_keys_of_a_checkpoint_are_warned_of(tmp_path, caplog) -> None:
    RetNetConfig().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    with caplog.at_level(logging.WARNING):
        RetNetConfig.from_pretrained(tmp_path)
    assert not caplog.records
    file.write_text(json.dumps(json.loads(file.read_text()) | {"hiden_size": 3}))
    with caplog.at_level(logging.WARNING):
        RetNetConfig.from_pretrained(tmp_path)
    assert "'hiden_size'" in caplog.text
    assert "did you mean hidden_size" in caplog.text


@pytest.mark.parametrize(("heads", "chunk_size"), [(8, 64), (4, 128), (2, 128)])
def test_the_chunk_follows_the_width_of_a_head(heads: int, chunk_size: int) -> None:
    config = RetNetConfig(vocab_size=8, hidden_size=512, num_heads=heads)
    assert config.chunk_size == chunk_size
    assert RetNetConfig(vocab_size=8, chunk_size=7).chunk_size == 7
