"""train.lora_rank: only the factors are trained, and what is written is a whole model."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from retnet import cli
from retnet.checkpoints import load_checkpoint, write_manifest
from retnet.commands import compare, generate
from retnet.model.fast_decode.step import make_decode_step
from tests.training.test_train import metrics, run, weights

pytest.importorskip("peft")


@pytest.fixture
def lora(options: list[str], whole: Path) -> list[str]:
    return [*options, f"model.init_from={whole}", "train.lora_rank=2", "train.learning_rate=3e-2"]


def test_a_run(lora, whole: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """Linear layers move by matrices of that rank, all else stays; checkpoints are whole."""
    monkeypatch.setattr("retnet.training.summary._size", lambda count: f"{count} bytes")
    assert run(lora) == 0
    said = capsys.readouterr().err
    number = 2 * sum(
        sum(x.shape) for name, x in weights(whole / "final").items() if is_adapted(name)
    )
    assert f"lora        rank 2: {number:,} of these parameters are trained" in said
    assert f"gradients {4 * number} bytes, optimizer {8 * number} bytes" in said
    rows, first = metrics(tmp_path / "run"), metrics(whole)
    assert rows[-1]["val/loss"] < first[-1]["val/loss"] - 0.02
    before = weights(whole / "final")
    for folder in ("final", "best", "checkpoints/step_4", "checkpoints/step_6"):
        after = weights(tmp_path / "run" / folder)
        assert after.keys() == before.keys()
        for name, weight in after.items():
            moved = weight - before[name]
            rank = torch.linalg.matrix_rank(moved, tol=1e-5).item() if moved.dim() == 2 else 0
            assert rank == (2 if is_adapted(name) else 0), (folder, name)
    files = {"final": False, "best": False, "checkpoints/step_6": True}
    for folder, there in files.items():
        assert (tmp_path / "run" / folder / "lora.safetensors").exists() == there
    found = load_checkpoint(tmp_path / "run")
    assert make_decode_step(found.model)[0] is not None
    last = str(tmp_path / "run/checkpoints/step_6")
    assert cli.run(generate.main, [last, "--max-new-tokens", "2"]) == 0
    assert cli.run(compare.main, [str(tmp_path / "run"), last, "--no-speed"]) == 0
    row = [line for line in capsys.readouterr().out.splitlines() if line.startswith("2 ")]
    assert "+0.0000" in row[1]


def is_adapted(name: str) -> bool:
    return name.endswith("_proj.weight")


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["retention", "performer"])
def test_going_on_is_exact(options, tmp_path: Path, mixer: str) -> None:
    """Weights, factors, moments and metrics, bit for bit; also where features are drawn anew."""
    own = [f"model.mixer={mixer}"]
    own += ["model.feature_redraw_interval=2"] if mixer == "performer" else []
    assert run([*options, *own], train__out_dir=tmp_path / "base", train__max_steps=2) == 0
    lora = [*options, *own, f"model.init_from={tmp_path / 'base'}", "train.lora_rank=2"]
    parts = [*lora, f"train.out_dir={tmp_path / 'parts'}", "train.schedule=constant"]
    assert run([*lora, "train.schedule=constant"], train__out_dir=tmp_path / "one") == 0
    assert run(parts, train__max_steps=4) == 0
    shutil.rmtree(tmp_path / "parts/final")
    assert run(parts) == 0
    one, two = tmp_path / "one/checkpoints/step_6", tmp_path / "parts/checkpoints/step_6"
    for name in ("model.safetensors", "lora.safetensors", "optimizer.safetensors"):
        a, b = load_file(one / name), load_file(two / name)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), name
    late = [row["train/loss"] for row in metrics(tmp_path / "one")[4:]]
    assert late == [row["train/loss"] for row in metrics(tmp_path / "parts")[4:]]


@pytest.mark.slow
def test_what_is_refused(lora, options, whole: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    source = shutil.copytree(whole, tmp_path / "source")
    lora = [*lora[:-3], f"model.init_from={source}", *lora[-2:]]
    assert run(lora, train__max_steps=4) == 0
    file = source / "final/model.safetensors"
    content = load_file(file)
    content["model.layers.0.mixer.q_proj.weight"] += 0.01
    save_file(content, file, metadata={"format": "pt"})
    write_manifest(source / "final")
    capsys.readouterr()

    def said() -> str:
        return capsys.readouterr().err.splitlines()[-1]

    assert run(lora) == 2
    words = (
        f"model.init_from is not the base that checkpoint ({tmp_path / 'run/checkpoints/step_4'}"
    )
    assert words in said()
    assert run(lora, train__lora_rank=3) == 2
    assert "it differs in train.lora_rank (2 -> 3)" in said()
    named = {"train__resume": whole / "checkpoints/step_4", "train__out_dir": tmp_path / "b"}
    assert run(lora, **named) == 2
    assert "step_4) has no lora.safetensors: go on from one in checkpoints/" in said()
    assert run(options, train__lora_rank=2, train__out_dir=tmp_path / "b") == 2
    assert said() == "error: train.lora_rank (2) needs weights to adapt: set model.init_from"
    assert run(lora, train__lora_rank=-1, train__out_dir=tmp_path / "b") == 2
    assert said() == "error: train.lora_rank (-1) must be at least 0"
    monkeypatch.setitem(sys.modules, "peft", None)
    assert run(lora, train__out_dir=tmp_path / "b") == 2
    assert "train.lora_rank (2) needs the package peft (" in said()
    assert not (tmp_path / "b").exists()
