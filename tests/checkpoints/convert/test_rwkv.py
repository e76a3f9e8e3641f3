"""Whole RWKV-4 models of other programs, converted, compute what those do."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from retnet import cli
from retnet.checkpoints.convert.__main__ import main
from retnet.checkpoints.convert.rwkv import TRANSFORMERS, renamed
from retnet.commands import generate
from retnet.model import RWKVForCausalLM

REFERENCE = Path("tests/model/reference")
CASES = ("rwkv_l3_d48_t37", "rwkv_l2_d24_t300")
STATES = {"att_x": ("mixer", "shift"), "num": ("mixer", "num"), "den": ("mixer", "den"),
          "max": ("mixer", "max"), "ffn_x": ("ffn", "shift")}  # fmt: skip


def model_file(case: str = CASES[0]) -> Path:
    return REFERENCE / f"{case}.model.safetensors"


def build(case: str) -> tuple[RWKVForCausalLM, dict[str, Tensor]]:
    empty, weights = renamed(model_file(case))
    model = RWKVForCausalLM(empty.config).double()
    model.load_state_dict(weights)
    return model.eval(), load_file(REFERENCE / f"{case}.outputs.safetensors")


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1))


def check_states(layers: Sequence, outputs: dict[str, Tensor], prefix: str) -> None:
    for name, (part, entry) in STATES.items():
        found = torch.stack([getattr(layer, part)[entry] for layer in layers])
        assert difference(found, outputs[f"{prefix}_{name}"]) < 1e-12


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode", RWKVForCausalLM.config_class.mixer_class.modes)
def test_logits_and_states(case: str, mode: str) -> None:
    """Float64, whole and handed over after 20 tokens."""
    model, outputs = build(case)
    ids, cache = outputs["input_ids"], model.new_cache()
    with torch.no_grad():
        assert difference(model(ids, mode=mode).logits, outputs["logits"]) < 1e-12
        first = model(ids[:, :20], past_key_values=cache, mode=mode).logits
        check_states(cache.layers, outputs, "state20")
        parts = [first, model(ids[:, 20:], past_key_values=cache).logits]
    check_states(cache.layers, outputs, "state")
    assert difference(torch.cat(parts, dim=1), outputs["logits"]) < 1e-12
    with torch.no_grad():
        assert difference(model.float()(ids, mode=mode).logits, outputs["logits"]) < 1e-5


@pytest.mark.parametrize("mode", RWKVForCausalLM.config_class.mixer_class.modes)
def test_loss_and_gradients(mode: str) -> None:
    model, outputs = build(CASES[0])
    loss = model(outputs["input_ids"], labels=outputs["input_ids"], mode=mode).loss
    assert difference(loss, outputs["loss"]) < 1e-12
    loss.backward()
    grads = {n.removeprefix("grad."): x for n, x in outputs.items() if n.startswith("grad.")}
    assert len(grads) == 44
    _, order = renamed(model_file())
    theirs = dict(zip(load_file(model_file()), order, strict=True))
    for name, expected in grads.items():
        found = model.get_parameter(theirs[name]).grad
        assert found is not None and difference(found, expected.reshape(found.shape)) < 1e-12


def rwkv_lm_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """As RWKV-LM and ChatRWKV have them."""
    renamed = {}
    for name, x in weights.items():
        for pattern, new in TRANSFORMERS.items():
            name = re.sub(pattern, new, name)
        renamed[name] = x
    assert "blocks.0.att.time_mix_k" in renamed and "emb.weight" in renamed
    return renamed


def convert(source: Path, target: Path, *more: str) -> int:
    return cli.run(main, ["from-rwkv", str(source), str(target), *more])


@pytest.mark.parametrize("kind", ["folder", "shards", "pth", "bin in a folder", "safetensors"])
def test_every_kind_of_source_makes_the_same_model(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    weights, folder = load_file(model_file()), tmp_path / "source"
    folder.mkdir()
    source = folder
    if kind == "folder":
        save_file(weights, folder / "model.safetensors")
        told = {"model_type": "rwkv", "layer_norm_epsilon": 1e-5, "context_length": 64}
        (folder / "config.json").write_text(json.dumps(told))
    elif kind == "shards":
        names, weight_map = list(weights), {}
        for i, part in enumerate((names[:20], names[20:])):
            save_file({n: weights[n] for n in part}, folder / f"part{i}.safetensors")
            weight_map |= dict.fromkeys(part, f"part{i}.safetensors")
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
    elif kind == "pth":
        source = folder / "rwkv.pth"
        torch.save(rwkv_lm_names(weights), source)
    elif kind == "safetensors":
        source = model_file()
    else:
        torch.save(weights, folder / "pytorch_model.bin")
    assert convert(source, tmp_path / "ours") == 0
    assert "has no tokenizer, which generate.py needs" in capsys.readouterr().err
    model = RWKVForCausalLM.from_pretrained(tmp_path / "ours").double().eval()
    outputs = load_file(REFERENCE / f"{CASES[0]}.outputs.safetensors")
    with torch.no_grad():
        assert difference(model(outputs["input_ids"]).logits, outputs["logits"]) < 1e-12
    assert model.config.norm_eps == 1e-5 and model.config.intermediate_size == 168
    assert model.config.max_position_embeddings == (64 if kind == "folder" else 2048)


def wider(weights: dict[str, Tensor], vocab: int = 300) -> dict[str, Tensor]:
    """With a vocabulary that the tokenizer of bytes fits into."""
    for name in ("emb.weight", "head.weight"):
        weights[name] = weights[name].repeat(vocab // 61 + 1, 1)[:vocab].clone()
    return weights


def test_bfloat16_with_a_tokenizer_generates(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    weights = wider(rwkv_lm_names(load_file(model_file())))
    narrow = {n: x if "time_" in n else x.bfloat16() for n, x in weights.items()}
    torch.save(narrow, tmp_path / "rwkv.pth")
    assert convert(tmp_path / "rwkv.pth", tmp_path / "ours", "--tokenizer", "bytes") == 0
    stored = load_file(tmp_path / "ours/model.safetensors")
    kept = {name.split(".")[-1] for name, x in stored.items() if x.dtype == torch.float32}
    assert kept == {"time_decay", "time_first"}
    name = "blocks.1.att.time_decay"
    assert stored["model.layers.1.mixer.time_decay"].equal(weights[name])
    argv = [str(tmp_path / "ours"), "--prompt", "a", "--max-new-tokens", "4", "--greedy"]
    assert cli.run(generate.main, argv) == 0
    assert "fast step" in capsys.readouterr().err


class Needs:
    def __reduce__(self) -> tuple:
        return print, ("code ran",)


@pytest.mark.parametrize("kind", ["meta", "one number"])
def test_weights_that_are_not_stored(tmp_path: Path, capsys, kind: str) -> None:
    """A small file could say that it has terabytes."""
    weights = {"emb.weight": torch.zeros(1, 1).expand(2**40, 48)}
    if kind == "meta":
        weights = {"emb.weight": torch.zeros(61, 48, device="meta")}
    torch.save(weights, tmp_path / "rwkv.pth")
    assert convert(tmp_path / "rwkv.pth", tmp_path / "ours") == 2
    words = f"error: source ({tmp_path}/rwkv.pth): emb.weight has "
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(words) and "are stored: save the weights as they are" in line
    assert not (tmp_path / "ours").exists()


def test_mistakes_are_one_line_each(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    weights = rwkv_lm_names(load_file(model_file()))
    there = tmp_path / "there"
    there.mkdir()
    odd = {
        "more": weights | {"blocks.0.att.time_maa_x": torch.ones(48)},
        "less": {n: x for n, x in weights.items() if n != "blocks.1.att.key.weight"},
        "block": {n.replace("blocks.2.", "blocks.90000."): x for n, x in weights.items()},
        "shape": weights | {"blocks.1.att.key.weight": torch.ones(32, 48)},
        "code": {"emb.weight": Needs()},
        "nested": {"model": weights},
        "whole": weights | {"emb.weight": torch.ones(61, 48, dtype=torch.int8)},
        "list": [1],
    }
    for name, content in odd.items():
        torch.save(content, tmp_path / f"{name}.pth")
    torch.save(weights, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "cut.pth").write_bytes((tmp_path / "less.pth").read_bytes()[:9000])
    (tmp_path / "cut.safetensors").write_bytes(model_file().read_bytes()[:9000])
    (tmp_path / "notes.txt").write_text("x")
    new = tmp_path / "new"
    for source, fragment in {
        "nothing": "does not exist: name a folder, or a file that ends with .pth",
        "notes.txt": "is of no kind that is read here",
        "there": "must have model.safetensors or one file of weights, and has none",
        "more.pth": "has blocks.0.att.time_maa_x which RWKV-4 does not have",
        "less.pth": "what is model.layers.1.mixer.k_proj.weight here is missing (1 such)",
        "block.pth": "lacks whole blocks",
        "shape.pth": "blocks.1.att.key.weight is [32, 48] and must be [48, 48]",
        "code.pth": "needs print, which could run code, and is not read",
        "nested.pth": "'model' is a dict and no weight: save the model's state_dict() alone",
        "whole.pth": "emb.weight is of type torch.int8",
        "list.pth": "holds a list and no weights by name",
        "old.pth": "is in torch's format of before 2020",
        "cut.pth": "can't be read",
        "cut.safetensors": "is damaged",
    }.items():
        assert convert(tmp_path / source, new) == 2, source
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1, error
        assert fragment in error
    assert convert(model_file(), there) == 2
    assert f"target ({there}) exists" in capsys.readouterr().err
    assert convert(model_file(), new, "--tokenizer", "bytes") == 2
    assert "--tokenizer (bytes) has ids up to 258, beyond" in capsys.readouterr().err
    assert convert(model_file(), new, "--tokenizer", "./nothing") == 2
    assert "--tokenizer (./nothing) is not a folder" in capsys.readouterr().err
    (there / "config.json").write_text('{"model_type": "rwkv5"}')
    assert convert(there, new) == 2
    assert "model_type (rwkv5) is not rwkv" in capsys.readouterr().err
    assert not new.exists() and not list(tmp_path.glob(".unfinished*"))
