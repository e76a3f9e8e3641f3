"""Whole models of flash-linear-attention, converted, compute what it does; and back again."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from retnet import RetNetConfig, RetNetForCausalLM, cli
from retnet.checkpoints.convert import fla
from retnet.checkpoints.convert import target as writing
from retnet.checkpoints.convert.fla import DEFAULTS, FIXED, from_fla
from retnet.checkpoints.export import export_checkpoint
from retnet.commands import generate, train
from tests.checkpoints.convert.references import (
    INDEX,
    change_weights,
    convert,
    largest,
    outputs_of,
    source_folder,
    wider,
)
from tests.training.conftest import as_options, corpus  # noqa: F401

CASES = ("fla_fused_untied", "fla_unfused_tied_gqa")
TRAINING = {
    "max_steps": 2, "batch_size": 1, "warmup_steps": 1, "eval_every": 2, "save_every": 2,
    "eval_max_tokens": 64, "sample_tokens": 0,
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_logits(case: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """In float64 to 1e-9 and in float32 to 1e-4, padded rows too, in all forms and split."""
    source = source_folder(case, tmp_path / "theirs")
    assert convert("from-fla", source, tmp_path / "ours") == 0
    assert "has no tokenizer, which generate.py needs" in capsys.readouterr().err
    model: Any = RetNetForCausalLM.from_pretrained(tmp_path / "ours").eval()
    outputs, ids = outputs_of(case), outputs_of(case)["input_ids"]
    padded, mask = outputs["padded_input_ids"], outputs["attention_mask"]
    real = mask.bool()
    with torch.no_grad():
        out = model(ids).logits.double()
        assert largest(out - outputs["logits"]) < 1e-4
        out = model(padded, attention_mask=mask).logits.double()
        assert largest((out - outputs["padded_logits"])[real]) < 1e-4
        model.double()
        for mode in model.config.mixer_class.modes:
            assert largest(model(ids, mode=mode).logits - outputs["logits_float64"]) < 1e-9
            out = model(padded, attention_mask=mask, mode=mode).logits
            assert largest((out - outputs["padded_logits_float64"])[real]) < 1e-9
        cache = model.new_cache()
        parts = [model(ids[:, part], cache=cache).logits for part in (slice(7), slice(7, None))]
    assert largest(torch.cat(parts, dim=1) - outputs["logits_float64"]) < 1e-9


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_is_exact(
    case: str, dtype: torch.dtype, tmp_path: Path, monkeypatch
) -> None:
    """Every weight bit for bit and every key of the configuration, in one file or in many."""
    name = str(dtype).removeprefix("torch.")
    source = source_folder(case, tmp_path / "theirs", dtype=name, use_l2warp=True, odd=[1])
    change_weights(source, lambda w: {name: x.to(dtype) for name, x in w.items()}, parts=3)
    monkeypatch.setattr(writing, "MOST_BYTES", 100_000)
    assert convert("from-fla", source, tmp_path / "ours") == 0
    assert (tmp_path / "ours" / INDEX).is_file()
    loaded: Any = RetNetForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert loaded.dtype == dtype
    assert convert("to-fla", tmp_path / "ours", tmp_path / "back") == 0
    told = [
        json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "back")
    ]
    assert told[0] == told[1]
    theirs, back = (
        {k: x for file in folder.glob("*.safetensors") for k, x in load_file(file).items()}
        for folder in (source, tmp_path / "back")
    )
    assert theirs.keys() == back.keys()
    assert all(x.dtype == back[k].dtype and torch.equal(x, back[k]) for k, x in theirs.items())


def test_the_default_width_is_theirs() -> None:
    """Of the published checkpoints of 1.3 and 2.7 billion weights."""
    for width, ratio, expected in ((2048, 2, 2816), (2560, 2, 3584), (2048, None, 5632)):
        assert fla._default_width({"hidden_size": width, "hidden_ratio": ratio}) == expected


def test_what_was_changed_since_is_told_on_the_way_back(tmp_path: Path) -> None:
    """A key that training changed here is the new one there; the others stay as they were."""
    source = source_folder(CASES[0], tmp_path / "theirs", intermediate_size=None, hidden_ratio=1)
    change_weights(source, lambda w: {k: _wide_ffn(k, x) for k, x in w.items()})
    assert convert("from-fla", source, tmp_path / "ours") == 0
    config = tmp_path / "ours/config.json"
    stored = json.loads(config.read_text())
    assert stored["intermediate_size"] == 256  # 2/3 of the width, up to a multiple of 256
    config.write_text(json.dumps(stored | {"max_position_embeddings": 77}))
    assert convert("to-fla", tmp_path / "ours", tmp_path / "back") == 0
    before, after = (
        json.loads((f / "config.json").read_text()) for f in (source, tmp_path / "back")
    )
    assert after == before | {"max_position_embeddings": 77}


def _wide_ffn(name: str, x: torch.Tensor) -> torch.Tensor:
    if ".mlp." not in name:
        return x
    dim = 1 if "down" in name else 0
    return torch.cat([x, x, x], dim=dim).narrow(dim, 0, 256).contiguous()


def test_both_branches_in_one_matrix(tmp_path: Path) -> None:
    """As before February 2025: the activated branch is the first half."""
    new = source_folder(CASES[0], tmp_path / "new")
    old = source_folder(CASES[0], tmp_path / "old")

    def join(weights: dict) -> dict:
        for i in range(2):
            mlp = f"model.layers.{i}.mlp"
            up = weights.pop(f"{mlp}.up_proj.weight")
            gate = weights[f"{mlp}.gate_proj.weight"]
            weights[f"{mlp}.gate_proj.weight"] = torch.cat((gate, up))
        return weights

    change_weights(old, join)
    expected, found = dict(from_fla(new).weights), dict(from_fla(old).weights)
    assert expected.keys() == found.keys()
    assert all(torch.equal(x, found[name]) for name, x in expected.items())
    assert convert("from-fla", old, tmp_path / "ours") == 0


def test_a_gate_and_weights_of_the_head_norm_may_be_absent(tmp_path: Path) -> None:
    """Then the norm has its unfused name, and nothing of it is stored."""
    told = {"use_output_gate": False, "elementwise_affine": False}
    source = source_folder(CASES[0], tmp_path / "theirs", **told)
    gone = ("g_proj", "g_norm")
    change_weights(source, lambda w: {k: x for k, x in w.items() if not any(g in k for g in gone)})
    config = from_fla(source).config
    assert (config.gate, config.head_norm_affine) == (False, False)
    affine = source_folder(CASES[1], tmp_path / "affine", use_output_gate=False)
    change_weights(affine, lambda w: {k: x for k, x in w.items() if "g_proj" not in k})
    assert convert("from-fla", affine, tmp_path / "ours") == 0
    assert convert("to-fla", tmp_path / "ours", tmp_path / "back") == 0
    assert (
        load_file(tmp_path / "back/model.safetensors").keys()
        == load_file(affine / "model.safetensors").keys()
    )


def test_one_of_ours_for_them(tmp_path: Path) -> None:
    """A model made here: their defaults for what means nothing to us, and it comes back equal."""
    torch.manual_seed(0)
    config = RetNetConfig(vocab_size=61, hidden_size=24, num_heads=3, num_hidden_layers=1, **FIXED)
    RetNetForCausalLM(config).save_pretrained(tmp_path / "ours")
    assert convert("to-fla", tmp_path / "ours", tmp_path / "theirs") == 0
    told = json.loads((tmp_path / "theirs/config.json").read_text())
    assert told["model_type"] == "retnet" and told["elementwise_affine"] is False
    assert DEFAULTS.keys() <= told.keys() and told["dtype"] == "float32"
    assert convert("from-fla", tmp_path / "theirs", tmp_path / "again") == 0
    ours, again = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "again"))
    assert ours.keys() == again.keys() and all(torch.equal(ours[k], again[k]) for k in ours)
    assert RetNetConfig.from_pretrained(tmp_path / "again").to_diff_dict() == (
        RetNetConfig.from_pretrained(tmp_path / "ours").to_diff_dict()
    )


def test_a_converted_model_generates(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """By the fast step; the tokenizer of the source's folder comes along, without new entries."""
    source = source_folder(CASES[1], tmp_path / "theirs", vocab_size=259)
    change_weights(source, wider)
    assert convert("from-fla", source, tmp_path / "ours", "--tokenizer", "bytes") == 0
    ids = RetNetConfig.from_pretrained(tmp_path / "ours")
    assert (ids.bos_token_id, ids.eos_token_id, ids.pad_token_id) == (256, 257, 258)
    argv = [str(tmp_path / "ours"), "--prompt", "a", "--max-new-tokens", "4", "--greedy"]
    assert cli.run(generate.main, argv) == 0
    assert "fast step" in capsys.readouterr().err
    assert convert("to-fla", tmp_path / "ours", tmp_path / "back") == 0
    assert (tmp_path / "back/tokenizer.json").is_file()
    assert convert("from-fla", tmp_path / "back", tmp_path / "again") == 0
    assert (tmp_path / "again/tokenizer.json").is_file()


@pytest.mark.slow
def test_a_converted_model_is_trained_on_and_exported(corpus: Path, tmp_path: Path) -> None:  # noqa: F811
    """Grouped heads, weights of the head norm and sharded weights, through train.py."""
    source = source_folder(CASES[1], tmp_path / "theirs", vocab_size=259)
    change_weights(source, wider, parts=2)
    assert convert("from-fla", source, tmp_path / "ours", "--tokenizer", "bytes") == 0
    keys = {
        "hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "num_hidden_layers": 2,
        "intermediate_size": 128, "norm": "rmsnorm", "ffn": "swiglu", "head_norm": "rmsnorm",
        "head_norm_affine": True, "rotary_layout": "half", "rotary_frequencies": "standard",
        "tie_word_embeddings": True, "init_from": tmp_path / "ours",
    }  # fmt: skip
    options = ["configs/tiny.yaml"]
    options += [f"model.{key}={str(value).lower()}" for key, value in keys.items()]
    options += [f"train.{key}={value}" for key, value in TRAINING.items()]
    options += [f"data.source={corpus}", "data.tokenizer=bytes", "data.seq_len=32"]
    options += [f"train.out_dir={tmp_path / 'run'}", f"data.cache_dir={tmp_path / 'cache'}"]
    assert cli.run(train.main, options) == 0
    assert convert("to-fla", tmp_path / "run", tmp_path / "back") == 0
    weights = load_file(tmp_path / "back/model.safetensors")
    assert "model.layers.0.attn.g_norm_swish_gate.weight" in weights
    export_checkpoint(tmp_path / "run", tmp_path / "exported")
    ids = torch.arange(9)[None]
    loaded = [
        RetNetForCausalLM.from_pretrained(folder).eval()
        for folder in (tmp_path / "run/final", tmp_path / "exported")
    ]
    with torch.no_grad():
        assert torch.equal(*[model(ids).logits for model in loaded])


REFUSED: dict[str, Any] = {
    "use_short_conv": True, "feature_map": "relu", "attn": {"layers": [1], "num_heads": 2},
    "hidden_act": "gelu", "expand_k": 0.5, "attnres_block_size": 2,
}  # fmt: skip


@pytest.mark.parametrize("key", REFUSED)
def test_what_ours_does_not_compute_is_refused_by_its_key(key: str, tmp_path: Path, capsys) -> None:
    source = source_folder(CASES[0], tmp_path / "theirs", **{key: REFUSED[key]})
    assert convert("from-fla", source, tmp_path / "ours") == 2
    (line,) = capsys.readouterr().err.splitlines()
    words = f"error: {source}/config.json: {key} ({REFUSED[key]}) is of a model that ours does not"
    assert line.startswith(words) and not (tmp_path / "ours").exists()


def test_mistakes_are_one_line_each(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    there = source_folder(CASES[0], tmp_path / "there")
    weights = load_file(there / "model.safetensors")
    odd = {
        "conv": weights | {"model.layers.0.attn.q_conv1d.weight": torch.ones(64, 1, 4)},
        "less": {n: x for n, x in weights.items() if n != "model.layers.1.mlp.down_proj.weight"},
        "shape": weights | {"model.layers.1.attn.k_proj.weight": torch.ones(32, 64)},
    }
    for name, content in odd.items():
        save_file(content, source_folder(CASES[0], tmp_path / name) / "model.safetensors")
    for name, told in {
        "other": {"model_type": "llama"}, "port": {"decoder_embed_dim": 64},
        "width": {"num_heads": 3}, "type": {"hidden_size": "wide"},
        "deep": {"num_hidden_layers": 10**9}, "number": {"vocab_size": 10**30},
        "endless": {"expand_v": math.inf},
        "ratio": {"hidden_ratio": 1e308, "intermediate_size": None},
    }.items():  # fmt: skip
        source_folder(CASES[0], tmp_path / name, **told)
    cut = source_folder(CASES[0], tmp_path / "cut")
    change_weights(cut, dict, parts=2)
    shard = cut / "part1.safetensors"
    shard.write_bytes(shard.read_bytes()[:-99])
    lost = source_folder(CASES[0], tmp_path / "lost")
    change_weights(lost, dict, parts=2)
    (lost / "part1.safetensors").unlink()
    bare = source_folder(CASES[0], tmp_path / "bare")
    (bare / "config.json").unlink()
    pickled = source_folder(CASES[0], tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    torch.save(weights, pickled / "pytorch_model.bin")
    new = tmp_path / "new"
    for source, fragment in {
        "nothing": "does not exist: name the folder with its config.json",
        "there/config.json": "is no folder: name the folder with its config.json",
        "conv": "has model.layers.0.attn.q_conv1d.weight, which a model of its configuration does",
        "less": "what is model.layers.1.ffn.down_proj.weight here is missing (1 such)",
        "shape": "model.layers.1.attn.k_proj.weight is [32, 64] and must be [64, 64]",
        "other": "model_type (llama) is not flash-linear-attention's retnet",
        "port": "model_type (retnet) is not flash-linear-attention's retnet: look at it with",
        "width": "config.json: hidden_size (64) must be divisible by num_heads (3)",
        "type": "config.json: ",
        "deep": "lacks whole blocks",
        "number": "vocab_size (10000000000000000000000000000",
        "endless": "endless/config.json: cannot convert float infinity to integer",
        "ratio": "ratio/config.json: cannot convert float infinity to integer",
        "cut": "is damaged (part1.safetensors: ",
        "lost": "is incomplete, part1.safetensors is missing",
        "bare": "has no config.json, which says what its weights are of",
        "pickled": "has pickled weights (pytorch_model.bin), which can run code",
    }.items():
        assert convert("from-fla", tmp_path / source, new) == 2, source
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1, error
        assert fragment in error
    assert convert("from-fla", there, bare) == 2
    assert f"target ({bare}) exists" in capsys.readouterr().err
    assert convert("from-fla", there, new, "--tokenizer", "bytes") == 2
    assert "--tokenizer (bytes) has ids up to 258, beyond" in capsys.readouterr().err
    assert not new.exists() and not list(tmp_path.glob(".unfinished*"))


def test_ours_that_are_none_of_theirs(saved: Path, tmp_path: Path, capsys) -> None:
    assert convert("to-fla", saved, tmp_path / "new") == 2
    error = capsys.readouterr().err
    assert (
        "RetNet has no norm (layernorm), ffn (gelu), head_norm (groupnorm), rotary_layout" in error
    )
    assert "only a model trained with norm rmsnorm, ffn swiglu" in error
    assert convert("to-fla", source_folder(CASES[0], tmp_path / "theirs"), tmp_path / "new") == 2
    assert (
        "make it ours by python -m retnet.checkpoints.convert from-fla" in capsys.readouterr().err
    )
    assert not (tmp_path / "new").exists()
