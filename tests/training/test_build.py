"""Configurations become models of the promised sizes."""

import logging
from pathlib import Path

import pytest
import torch

from retnet.data import load_tokenizer
from retnet.errors import UserError
from retnet.training.build import build_model, load_initial_weights, model_config
from retnet.training.config import load_config
from retnet.training.spec import flatten
from retnet.training.summary import count_parameters
from tests.checkpoints.folders import change_config

CONFIGS = sorted(Path("configs").glob("*.yaml"))
SIZES = {"tiny": 1.3e6, "small": 25e6, "base": 125e6, "1.3b": 1.3e9, "2.7b": 2.7e9, "6.7b": 6.7e9}


def parameters(path: Path, mixer: str) -> dict[str, int]:
    config = load_config(path, [f"model.mixer={mixer}"])
    vocab = {"bytes": 259, "bpe": config.data.vocab_size}.get(config.data.tokenizer, 50257)
    with torch.device("meta"):
        return count_parameters(build_model(model_config(config, vocab)))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_both_models_of_a_recipe_have_the_same_size(path: Path) -> None:
    retention, attention = (parameters(path, m)["total"] for m in ("retention", "attention"))
    assert abs(retention - attention) < 0.01 * attention
    for name, size in SIZES.items():
        if path.stem.endswith(name):
            assert abs(retention - size) < 0.15 * size


def test_there_are_all_recipes() -> None:
    names = {p.stem for p in CONFIGS}
    assert {"tiny", "shakespeare-char", "wikitext2", "tinystories", "small", "base"} <= names
    assert {"retnet-1.3b", "retnet-2.7b", "retnet-6.7b"} <= names


def test_counts_by_part() -> None:
    config = load_config(None, ["model.hidden_size=32", "model.num_hidden_layers=2"])
    model = build_model(model_config(config, 100))
    parts = count_parameters(model)
    assert parts["total"] == sum(p.numel() for p in model.parameters())
    assert parts["embedding"] == parts["output"] == 3200
    assert parts["mixers"] == 2 * 8 * 32**2 and parts["feed-forward"] == 2 * 4 * 32**2
    assert parts["norms"] == 5 * 2 * 32
    tied = load_config(None, ["model.hidden_size=32", "model.tie_word_embeddings=true"])
    assert count_parameters(build_model(model_config(tied, 100)))["output"] == 0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", 64), ("num_hidden_layers", 2), ("num_heads", 2), ("intermediate_size", 99),
        ("norm", "rmsnorm"), ("ffn", "swiglu"), ("dropout", 0.25), ("tie_word_embeddings", True),
        ("rotary_layout", "half"), ("rotary_frequencies", "standard"), ("value_size", 256),
        ("head_norm", "none"), ("gate", False), ("decay", 0.75), ("chunk_size", 32),
        ("norm_eps", 1e-5), ("head_norm_eps", 1e-5), ("head_norm_affine", True),
        ("num_kv_heads", 2), ("scale_embedding", True),
    ],
)  # fmt: skip
def test_every_key_of_the_section_reaches_the_model(key: str, value: object) -> None:
    config = load_config(None, [f"model.{key}={str(value).lower()}"])
    assert getattr(model_config(config, 300), key) == value
    assert f"model.{key}" in flatten(config)


def test_the_mixers_own_rotation() -> None:
    for mixer, layout in (("retention", "interleaved"), ("attention", "half")):
        config = load_config(None, [f"model.mixer={mixer}"])
        assert model_config(config, 300).rotary_layout == layout


def test_keys_of_another_mixer(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """In a recipe they are left out, and named where they say something; by hand a mistake."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model:\n  decay: 0.9\n  gate: true\n")
    with caplog.at_level(logging.WARNING):
        config = load_config(recipe, ["model.mixer=attention"])
    assert [record.getMessage() for record in caplog.records] == [
        "model.decay: no effect with model.mixer=attention"
    ]
    assert config.model.decay is None and config.model.gate is None
    with pytest.raises(UserError, match=r"model.gate \(True\) has no meaning with .*=attention"):
        load_config(None, ["model.mixer=attention", "model.gate=true"])


def test_a_mixers_own_values_are_written_down() -> None:
    """So that a run goes on where a recipe gave them, or an older one had no such key."""
    model = load_config(None, []).model
    assert (model.ffn, model.positions, model.embedding_norm) == ("gelu", "rotary", False)
    assert load_config(None, ["model.ffn=gelu", "model.positions=rotary"]).model == model


def test_values_that_make_no_model_name_the_key() -> None:
    with pytest.raises(UserError, match=r"model\.hidden_size \(250\) must be divisible"):
        model_config(load_config(None, ["model.hidden_size=250"]), 300)


def test_weights_of_another_model(tmp_path: Path) -> None:
    config = load_config(None, ["model.hidden_size=16", "model.num_hidden_layers=1"])
    torch.manual_seed(0)
    first = build_model(model_config(config, 300))
    tokenizer = load_tokenizer("bytes")
    first.save_pretrained(tmp_path / "a")
    tokenizer.save_pretrained(tmp_path / "a")
    second = build_model(model_config(config, 300))
    load_initial_weights(second, str(tmp_path / "a"), tokenizer)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    wider = load_config(None, ["model.hidden_size=32", "model.num_hidden_layers=1"])
    with pytest.raises(UserError, match=r"model\.init_from .* is another model"):
        load_initial_weights(build_model(model_config(wider, 300)), str(tmp_path / "a"), tokenizer)
    with pytest.raises(UserError, match="does not exist"):
        load_initial_weights(second, str(tmp_path / "nothing"), tokenizer)
    first.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    third = build_model(model_config(config, 300))
    load_initial_weights(third, str(tmp_path / "shards"), tokenizer)
    for a, b in zip(first.parameters(), third.parameters(), strict=True):
        assert torch.equal(a, b)
    (tmp_path / "a" / "model.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match="can't be read"):
        load_initial_weights(second, str(tmp_path / "a"), tokenizer)


def test_positions_are_those_of_the_initial_weights(tmp_path: Path) -> None:
    """Where they are weights: a shorter seq_len uses the first of them, a longer one is refused."""
    sizes = ["model.hidden_size=32", "model.num_hidden_layers=1", "model.aft_rank=4"]
    sizes += ["model.mixer=aft", "data.seq_len=24", "model.aft_window=20"]
    first = build_model(model_config(load_config(None, sizes), 300))
    tokenizer = load_tokenizer("bytes")
    first.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = [*sizes, f"model.init_from={tmp_path}"]
    shorter = build_model(model_config(load_config(None, [*again, "data.seq_len=16"]), 300))
    assert shorter.config.max_position_embeddings == 24
    load_initial_weights(shorter, str(tmp_path), tokenizer)
    assert torch.equal(first.model.embed_positions.weight, shorter.model.embed_positions.weight)
    with pytest.raises(UserError, match=r"data\.seq_len \(25\) is beyond the 24 positions"):
        model_config(load_config(None, [*again, "data.seq_len=25"]), 300)
    change_config(tmp_path, max_position_embeddings=-5)
    with pytest.raises(UserError, match=r"json: max_position_embeddings \(-5\) must be a whole"):
        model_config(load_config(None, again), 300)


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    """The run would have been made, and have diverged at its first step."""
    config = load_config(None, ["model.hidden_size=16", "model.num_hidden_layers=1"])
    model, tokenizer = build_model(model_config(config, 259)), load_tokenizer("bytes")
    model.model.norm.weight.data[3] = torch.nan
    model.save_pretrained(tmp_path)
    words = r"model\.init_from .* has values that are not finite \(model\.norm\.weight\)"
    with pytest.raises(UserError, match=words):
        load_initial_weights(model, str(tmp_path), tokenizer)


def test_a_damaged_tokenizer_beside_initial_weights_is_not_the_runs(tmp_path: Path) -> None:
    config = load_config(None, ["model.hidden_size=16", "model.num_hidden_layers=1"])
    model, tokenizer = build_model(model_config(config, 259)), load_tokenizer("bytes")
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"^tokenizer of model\.init_from \(.*\) is a folder witho"):
        load_initial_weights(model, str(tmp_path), tokenizer)
