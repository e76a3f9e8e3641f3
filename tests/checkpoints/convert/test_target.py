"""Weights are written file by file, and no more than one file's are held."""

import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from retnet.checkpoints.convert import target
from retnet.checkpoints.weights import read_weights


def test_memory_is_that_of_one_file(tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(target, "MOST_BYTES", 1000)
    held: list[weakref.ref] = []

    def weights() -> Iterator[tuple[str, Tensor]]:
        for i in range(10):
            x = torch.full((100,), float(i))
            held.append(weakref.ref(x))
            assert sum(ref() is not None for ref in held) <= 4
            yield f"w{i}", x

    seconds = iter(range(0, 100, 2))
    monkeypatch.setattr(target, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    with caplog.at_level("INFO"):
        target.write_weights(tmp_path, weights(), 4000)
    assert sorted(file.name for file in tmp_path.glob("*.safetensors")) == [
        f"model-{i:05d}-of-00005.safetensors" for i in range(1, 6)
    ]
    assert {k: x[0].item() for k, x in read_weights(tmp_path, tied=False).items()} == {
        f"w{i}": i for i in range(10)
    }
    assert caplog.messages == [f"0.0 of 0.0 GB, {left} s left" for left in (8, 6, 4, 2)]


def test_a_single_file_has_no_index(tmp_path: Path) -> None:
    target.write_weights(tmp_path, [("w", torch.ones(3))], 12)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    assert load_file(tmp_path / "model.safetensors")["w"].tolist() == [1, 1, 1]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(target, "save_file", full)
    words = r"target \(.*new\) cannot be written \(No space left"
    with pytest.raises(ValueError, match=words), target.new_folder(tmp_path / "a/b/new") as new:
        target.write_weights(new, [("w", torch.ones(3))], 12)
    assert not list(tmp_path.iterdir())
