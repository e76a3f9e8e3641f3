"""What the tests make of a checkpoint folder."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file


def change_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def shard(folder: Path) -> dict:
    """Spread the weights over two files; returns the index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = ("model-1.safetensors", "model-2.safetensors")
    weight_map = {name: names[number % 2] for number, name in enumerate(tensors)}
    for file in names:
        own = {name: tensors[name] for name in tensors if weight_map[name] == file}
        save_file(own, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a file was unpickled",))
