"""Folders of other programs' tiny models, and what those compute with them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from retnet import cli
from retnet.checkpoints.convert.__main__ import main

REFERENCE = Path("tests/model/reference")
INDEX = "model.safetensors.index.json"


def source_folder(case: str, folder: Path, **told: Any) -> Path:
    """The folder of a case, its configuration with other values."""
    folder.mkdir()
    shutil.copyfile(REFERENCE / f"{case}.model.safetensors", folder / "model.safetensors")
    stored = json.loads((REFERENCE / f"{case}.config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stored | told))
    return folder


def outputs_of(case: str) -> dict[str, Tensor]:
    return load_file(REFERENCE / f"{case}.outputs.safetensors")


def change_weights(
    folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], parts: int = 1
) -> None:
    """The weights of a folder, changed, in that many files."""
    weights = change(load_file(folder / "model.safetensors"))
    if parts == 1:
        save_file(weights, folder / "model.safetensors")
        return
    (folder / "model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    for i in range(parts):
        shard = dict(list(weights.items())[i::parts])
        save_file(shard, folder / f"part{i}.safetensors")
        weight_map |= dict.fromkeys(shard, f"part{i}.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def wider(weights: dict[str, Tensor], vocab: int = 259) -> dict[str, Tensor]:
    """With a vocabulary that the tokenizer of bytes fits into."""
    names = [name for name, x in weights.items() if x.shape[0] == 97]
    return weights | {name: weights[name].repeat(3, 1)[:vocab].clone() for name in names}


def convert(*arguments: object) -> int:
    return cli.run(main, [str(argument) for argument in arguments])


def largest(difference: Tensor) -> float:
    assert difference.dtype == torch.float64
    return float(difference.abs().max())
