"""Checkpoints with quantised weights: written, loaded, inspected, refused where they can't be."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from retnet.checkpoints import load_checkpoint
from retnet.checkpoints.convert.__main__ import convertible
from retnet.checkpoints.convert.fla import to_fla
from retnet.checkpoints.convert.inspect import inspect
from retnet.checkpoints.export import export_checkpoint
from retnet.checkpoints.push import files_to_push
from retnet.checkpoints.quantize import main, quantize_checkpoint
from retnet.errors import UserError
from retnet.model.mixers import MIXERS
from retnet.model.quantised import FORMATS, quantised_format
from tests.checkpoints.folders import change_config, shard
from tests.generation.builders import save_checkpoint
from tests.model.fast_decode.cases import random_ids


@pytest.fixture(scope="module")
def int8(saved: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("quantised") / "int8"
    quantize_checkpoint(saved, folder, "int8")
    return folder


@pytest.mark.parametrize(
    ("mixer", "weights"), [("retention", x) for x in FORMATS] + [(x, "int8") for x in MIXERS][1:]
)
def test_a_saved_one_is_that_of_loading(mixer: str, weights: str, tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "run" / "final", mixer)
    quantize_checkpoint(source.parent, tmp_path / "folder", weights)
    now = load_checkpoint(source, weights=weights)
    loaded = load_checkpoint(tmp_path / "folder")
    assert quantised_format(loaded.model) == quantised_format(now.model) == weights
    assert loaded.model.dtype == torch.float32 and not loaded.model.training
    own, other = loaded.model.state_dict(), now.model.state_dict()
    assert own.keys() == other.keys()
    assert all(x.equal(other[name]) and x.dtype == other[name].dtype for name, x in own.items())
    ids = random_ids(1, 8)
    assert loaded.model(ids).logits.equal(now.model(ids).logits)
    with pytest.raises(UserError, match="leave it out, or name the checkpoint that they were"):
        load_checkpoint(tmp_path / "folder", weights="int4" if weights != "int4" else "int8")


def test_the_command(saved: Path, tmp_path: Path, capsys) -> None:
    main([str(saved), str(tmp_path / "small"), "--weights", "int4"])
    said = capsys.readouterr().out
    sizes = [(x / "model.safetensors").stat().st_size for x in (saved, tmp_path / "small")]
    assert said == (
        f"{saved} as int4: {tmp_path / 'small'}\n"
        f"weights: {sizes[1]:,} bytes, {sizes[1] / sizes[0]:.2f} of {sizes[0]:,}\n"
    )
    names = {file.name for file in (tmp_path / "small").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "data.json",
                     "manifest.json", "tokenizer.json", "tokenizer_config.json"}  # fmt: skip
    config = json.loads((tmp_path / "small/config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "retnet", "weights": "int4"}
    tensors = load_file(tmp_path / "small/model.safetensors")
    assert tensors["model.layers.0.mixer.q_proj.values"].dtype == torch.uint8
    modes = {file.stat().st_mode for file in (tmp_path / "small").iterdir()}
    assert len(modes) == 1


def test_weights_in_several_files_become_one(copy: Path, tmp_path: Path) -> None:
    shard(copy)
    quantize_checkpoint(copy, tmp_path / "new", "int8")
    assert [x.name for x in (tmp_path / "new").glob("model*")] == ["model.safetensors"]
    assert load_checkpoint(tmp_path / "new").model is not None


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_plain_weights_again(stored: str, copy: Path, int8: Path) -> None:
    loaded: Any = load_checkpoint(int8, weights="fp32").model
    assert quantised_format(loaded) is None
    quantised: Any = load_checkpoint(int8).model
    assert loaded.lm_head.weight.equal(quantised.lm_head.weight)
    if stored == "bfloat16":  # "fp32" is what it says, for plain checkpoints too
        change_config(copy, dtype="bfloat16")
        assert load_checkpoint(copy).model.dtype == torch.bfloat16
        assert load_checkpoint(copy, weights="fp32").model.dtype == torch.float32
        assert load_checkpoint(copy, weights="int8").model.dtype == torch.float32


def test_a_tied_output_layer_is_stored_beside_the_embedding(copy: Path, tmp_path: Path) -> None:
    model: Any = load_checkpoint(copy).model
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    model.save_pretrained(copy)
    quantize_checkpoint(copy, tmp_path / "new", "int8")
    loaded: Any = load_checkpoint(tmp_path / "new").model
    assert loaded.model.embed_tokens.weight.equal(model.model.embed_tokens.weight)
    difference = loaded.lm_head.weight - model.model.embed_tokens.weight
    assert 0 < difference.abs().max() < 0.01 * loaded.lm_head.weight.abs().max()


def test_what_inspect_says(int8: Path, copy: Path) -> None:
    lines = dict(line.split(maxsplit=1) for line in inspect(int8, convertible))
    assert lines["quantised"] == "int8 weights, to generate and to compare"
    assert lines["read"] == "here    yes"
    assert "parameters" not in lines
    change_config(copy, quantization_config=None)
    lines = dict(line.split(maxsplit=1) for line in inspect(copy, convertible))
    assert "quantised" not in lines and "parameters" in lines
    change_config(copy, quantization_config={"quant_method": "gptq"})
    lines = dict(line.split(maxsplit=1) for line in inspect(copy, convertible))
    assert lines["quantised"] == "in a format that is not read here"
    assert "quantization_config is of weights in a format that is not read here" in lines["read"]


def test_it_can_be_pushed(int8: Path) -> None:
    names = {file.name for file in files_to_push(int8)[0]}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names


def test_who_can_not_read_it_says_so(int8: Path, tmp_path: Path) -> None:
    of, new = r"has quantised weights \(int8\), ", tmp_path / "new"
    with pytest.raises(UserError, match=of + "which transformers can't load: name the checkpoint"):
        export_checkpoint(int8, new)
    with pytest.raises(UserError, match=of + "which flash-linear-attention can't load"):
        to_fla(str(int8), new)
    with pytest.raises(UserError, match=of + "and quantising them again loses more"):
        quantize_checkpoint(int8, new, "int8")
    assert not new.exists()
    with pytest.raises(ValueError, match=r"quantization_config \(int8\) is of quantised weights"):
        AutoModelForCausalLM.from_pretrained(int8)


def test_what_save_pretrained_writes(int8: Path, tmp_path: Path) -> None:
    """It says that it is quantised, so that transformers does not fill it at random."""
    model: Any = load_checkpoint(int8).model
    model.save_pretrained(tmp_path / "model")
    for kind in (AutoModelForCausalLM, type(model)):
        with pytest.raises(
            ValueError, match=r"quantization_config \(int8\) is of quantised weights"
        ):
            kind.from_pretrained(tmp_path / "model")
    ids = random_ids(1, 8)
    for file in int8.glob("tokenizer*.json"):
        shutil.copy(file, tmp_path / "model")
    again: Any = load_checkpoint(tmp_path / "model").model
    assert again(ids).logits.equal(model(ids).logits)
    plain: Any = load_checkpoint(int8, weights="fp32").model
    plain.save_pretrained(tmp_path / "plain")
    again = type(plain).from_pretrained(tmp_path / "plain")
    assert again(ids).logits.equal(plain(ids).logits)


def test_where_it_may_be_written(saved: Path, copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"folder \(.*\) exists: name one that does not"):
        quantize_checkpoint(saved, copy, "int8")
    with pytest.raises(UserError, match="lies in the checkpoint"):
        quantize_checkpoint(copy, copy / "inside", "int8")
    with pytest.raises(UserError, match="cannot be written"):
        quantize_checkpoint(saved, copy / "config.json" / "inside", "int8")


def test_a_base_of_an_adapter(int8: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"base \(.*\) has quantised weights \(int8\), into which"):
        load_checkpoint(tmp_path, base=int8)


def test_numbers_that_are_not_finite(copy: Path) -> None:
    model: Any = load_checkpoint(copy).model
    model.model.layers[0].mixer.q_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(copy)
    with pytest.raises(UserError, match=r"--weights \(int8\): .*q_proj.weight can't be quantised"):
        load_checkpoint(copy, weights="int8")


def test_a_word_that_is_no_format(saved: Path) -> None:
    with pytest.raises(UserError, match=r"--weights \(int3\) must be one of auto, fp32, bf16, int"):
        load_checkpoint(saved, weights="int3")
