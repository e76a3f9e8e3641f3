"""What a checkpoint is said to be, of every kind and damaged ones too."""

import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from retnet.checkpoints import Progress
from retnet.checkpoints.convert.recognise import FLA, RWKV, TORCHSCALE, recognise
from retnet.files import write_json
from tests.checkpoints.convert.references import (
    REFERENCE,
    change_weights,
    convert,
    source_folder,
)


def inspected(path: Path, capsys: pytest.CaptureFixture) -> dict[str, str]:
    assert convert("inspect", path) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = (line.split(maxsplit=1) for line in captured.out.splitlines())
    found = {(a if a != "read" else "read here"): b.removeprefix("here").strip() for a, b in lines}
    return found


def test_one_of_ours(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = tmp_path / "run"
    shutil.copytree(saved, run / "final")
    write_json(run / "final/training_state.json", asdict(Progress(1234, 8, 2.5, 1000)))
    found = inspected(run, capsys)
    weights = load_file(saved / "model.safetensors")
    kind = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    size = (saved / "model.safetensors").stat().st_size
    assert found == {
        "checkpoint": str(run / "final"),
        "format": "this package's (model_type retnet_lm)",
        "weights": f"{size:,} bytes in 1 file, {kind}",
        "parameters": f"{sum(x.numel() for x in weights.values()):,}, as stored in {len(weights)} "
        "tensors",
        "model": "retention, 2 layers of width 16, 2 heads, vocabulary 259",
        "tokenizer": "259 entries",
        "step": "1,234, best validation loss 2.5000",
        "read here": "yes",
    }


@pytest.mark.parametrize("damage", ["cut", "config", "tokenizer", "state", "other", "shape"])
def test_what_is_wrong_with_one_of_ours(copy: Path, damage: str, capsys) -> None:
    (copy / "manifest.json").unlink(missing_ok=True)
    file = copy / "model.safetensors"
    key, words = "read here", ""
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-9])
        words = "no: model.safetensors: Error"
    elif damage == "config":
        (copy / "config.json").write_text("{")
        words = f"no: {copy}/config.json is not readable JSON"
    elif damage == "tokenizer":
        (copy / "tokenizer.json").write_text("{")
        key, words = "tokenizer", "cannot be read ("
    elif damage == "state":
        (copy / "training_state.json").write_text("{}")
        key, words = "step", f"{copy}/training_state.json: "
    elif damage == "other":
        (copy / "config.json").write_text('{"model_type": "gpt2"}')
        words = f"no: {copy}/config.json: model_type (gpt2) is none of retnet_lm"
    else:
        save_file(load_file(file) | {"model.norm.weight": torch.ones(3)}, file)
        words = f"no: checkpoint ({copy}) is incomplete, model.norm.weight is of another shape"
    assert inspected(copy, capsys)[key].startswith(words)


def test_checkpoints_of_others(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """With the converter that reads them, or what keeps it from that."""
    convert_it = "no: make it ours by python -m retnet.checkpoints.convert"
    fla = source_folder("fla_unfused_tied_gqa", tmp_path / "fla")
    change_weights(fla, lambda w: {k: x.bfloat16() for k, x in w.items()}, parts=2)
    found = inspected(fla, capsys)
    assert found["format"] == "flash-linear-attention's format (model_type retnet)"
    assert found["weights"].endswith("bytes in 2 files, bfloat16")
    assert found["model"] == "retention, 2 layers of width 64, 4 heads, vocabulary 97"
    assert found["step"] == "not told" and found["tokenizer"].startswith("none")
    assert found["read here"] == f"{convert_it} from-fla {fla} TARGET"
    hybrid = source_folder("fla_fused_untied", tmp_path / "hybrid", attn={"layers": [0]})
    assert "config.json: attn (" in inspected(hybrid, capsys)["read here"]
    official = tmp_path / "official.pt"
    weights = load_file(REFERENCE / "torchscale_swish_tied.model.safetensors")
    torch.save(weights, official)
    found = inspected(official, capsys)
    assert found["format"].startswith("torchscale's format") and "step" not in found
    assert "add --activation swish|gelu|relu and --scale-embedding yes|no" in found["read here"]
    torch.save(weights | {"layers.0.ffn.fc1.bias": torch.ones(1)}, official)
    found = inspected(official, capsys)
    assert found["format"].startswith("torchscale's format of before September 2023")
    assert found["read here"].startswith("no: its layers have biases, which ours do not have, so")
    rwkv = inspected(REFERENCE / "rwkv_l3_d48_t37.model.safetensors", capsys)
    assert rwkv["model"] == "rwkv, 3 layers of width 48, 4 heads, vocabulary 61"
    torch.save({"h.0.attn.weight": torch.ones(2)}, official)
    found = inspected(official, capsys)
    assert found["format"] == "not known (model_type not told)"
    assert found["read here"].startswith("no: the names of its weights are those of no model")


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "notes.txt").write_text("x")
    for path in ("nothing", "notes.txt", "."):
        assert convert("inspect", tmp_path / path) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: checkpoint (") and error.count("\n") == 1


def test_an_adapter(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_json(tmp_path / "adapter_config.json", {"peft_type": "LORA"})
    save_file({"factor": torch.zeros(2, 3)}, tmp_path / "adapter_model.safetensors")
    found = inspected(tmp_path, capsys)
    assert found["format"] == "an adapter of PEFT"
    assert found["read here"].startswith("with its base model: generate.py and compare.py take it")


def test_a_command_for_another_format(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """One line names the right one; nothing is written, also not the folders above."""
    theirs = source_folder("fla_fused_untied", tmp_path / "theirs")
    shutil.copytree(saved, tmp_path / "run/final")
    for source, words in (
        (theirs, "is flash-linear-attention's format: make it ours by"),
        (tmp_path / "run", "is a run of this package: it needs no conversion"),
    ):
        assert convert("from-rwkv", source, tmp_path / "models/new") == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "models").exists()
    assert convert("from-fla", theirs, tmp_path / "models/new") == 0
    assert (tmp_path / "models/new/config.json").is_file()


def test_a_configuration_tells_what_is_beside_weights_that_are_not_read(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"model_type": "rwkv"})
    assert recognise(tmp_path) is RWKV
    assert recognise(tmp_path, {"model_type": "retnet"}) is FLA  # it was read before
    heads = {"decoder_retention_heads": 2}
    assert recognise(tmp_path, heads) is recognise(tmp_path, {"kwargs": heads}) is TORCHSCALE
    assert recognise(tmp_path, {"model_type": "other"} | heads) is None
