"""Which files are weights; nothing pickled is among them, and a part of them is not all."""

import json
import os
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from retnet.checkpoints import load_checkpoint, save
from retnet.checkpoints.convert import sources
from retnet.checkpoints.weights import check_size, read_file, read_weights, weight_files
from retnet.errors import UserError
from retnet.training import carry
from tests.checkpoints.folders import Bomb, shard
from tests.generation.builders import save_checkpoint


def test_one_file_or_shards(copy: Path, saved: Path) -> None:
    assert weight_files(copy) == ["model.safetensors"]
    shard(copy)
    assert weight_files(copy) == ["model-1.safetensors", "model-2.safetensors"]
    weights, expected = load_checkpoint(copy).model.state_dict(), load_checkpoint(saved).model
    assert all(torch.equal(weights[key], own) for key, own in expected.state_dict().items())


def test_no_weights_and_pickled_ones(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    for look in (weight_files, load_checkpoint):
        with pytest.raises(UserError, match=r"incomplete, model\.safetensors is missing: copy it"):
            look(copy)
    (copy / "pytorch_model.bin").write_bytes(b"")
    for look in (weight_files, load_checkpoint):
        with pytest.raises(UserError, match=r"pickled weights \(pytorch_model\.bin\)"):
            look(copy)


def test_a_missing_shard(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-1.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"model-1\.safetensors is missing"):
        load_checkpoint(copy)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
         r"/model-2\.safetensors is a Git LFS pointer.* fetch it with git lfs pull"),
        (b"<!DOCTYPE html>\n<title>Sign in</title>", r"model-2\.safetensors: .*header too large"),
        (b"", r"model-2\.safetensors: .*header too small"),
    ],
)  # fmt: skip
def test_what_lies_in_place_of_weights(copy: Path, content: bytes, words: str) -> None:
    """The file is named, of shards too, and by all that read weights."""
    shard(copy)
    (copy / "model-2.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=words):
        load_checkpoint(copy)
    with pytest.raises((UserError, SafetensorError), match=words):
        read_weights(copy, tied=False)


def test_a_file_that_no_memory_takes(copy: Path) -> None:
    """Mapping it failed, and config.json was blamed."""
    file, more = copy / "model.safetensors", 1 << 42
    content = file.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    head = json.loads(content[8 : 8 + size])
    end = len(content) - 8 - size
    own = {"dtype": "F32", "shape": [more // 4], "data_offsets": [end, end + more]}
    text = json.dumps(head | {"huge": own}).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text + content[8 + size :])
        stream.truncate(8 + len(text) + end + more)  # all of it a hole
    words = r"safetensors has [0-9,]+ bytes, which memory does not take|huge is in the weights but"
    with pytest.raises(UserError, match=words):
        load_checkpoint(copy)


def test_a_weight_in_two_files(copy: Path) -> None:
    """The one of the later name was taken, whatever the index said."""
    shard(copy)
    name, weight = next(iter(load_file(copy / "model-1.safetensors").items()))
    more = load_file(copy / "model-2.safetensors") | {name: weight * 0}
    save_file(more, copy / "model-2.safetensors", metadata={"format": "pt"})
    for load in (load_checkpoint, lambda folder: read_weights(folder, tied=False)):
        with pytest.raises(UserError, match=rf"model-2\.safetensors: {name} is in another file"):
            load(copy)


@pytest.mark.parametrize("where", ["shard.bin", "../shard.safetensors", "", None, 3, ["x"]])
def test_an_index_names_safetensors_files_of_its_folder_only(copy: Path, where: object) -> None:
    """transformers would unpickle shard.bin."""
    index = shard(copy)
    torch.save(Bomb(), copy / "shard.bin")
    torch.save(Bomb(), copy.parent / "shard.safetensors")
    weight_map = index["weight_map"] | {next(iter(index["weight_map"])): where}
    (copy / "model.safetensors.index.json").write_text(
        json.dumps(index | {"weight_map": weight_map})
    )
    with pytest.raises(UserError, match=r"is no \.safetensors file of the folder"):
        load_checkpoint(copy)


@pytest.mark.parametrize("weight_map", [[], ["shard.bin"], {}, None, "shard.bin"])
def test_an_index_that_is_none(copy: Path, weight_map: object) -> None:
    shard(copy)
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match="weight_map must name a file for each weight"):
        load_checkpoint(copy)


def sizes(**changes: int) -> SimpleNamespace:
    """A model of 2 * 8 + 3 * (5 + 2 * 8 * 4) = 223 parameters at least."""
    own = {"vocab_size": 2, "hidden_size": 8, "num_hidden_layers": 3, "intermediate_size": 4}
    return SimpleNamespace(**own | {"mixer_parameters": 5} | changes)


def test_weights_with_fewer_bytes_than_the_model_has_parameters(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    one = torch.zeros(1, dtype=torch.int8)
    save_file({"a": one.repeat(221), "b": one, "c": one.clone()}, file)
    check_size(tmp_path, sizes())
    stored = file.stat().st_size
    for changes in ({"vocab_size": 99}, {"num_hidden_layers": 99}, {"mixer_parameters": 999}):
        with pytest.raises(UserError, match=rf"have {stored:,} bytes in 3 tensors and config\.js"):
            check_size(tmp_path, sizes(**changes))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(SafetensorError):
        check_size(tmp_path, sizes())


def test_tied_weights_are_read_as_two(copy: Path) -> None:
    file, head = copy / "model.safetensors", "lm_head.weight"
    stored = load_file(file)
    assert torch.equal(read_weights(copy, tied=True)[head], stored.pop(head))  # it has its own
    save_file(stored, file)
    weights = read_weights(copy, tied=True)
    assert weights[head] is weights["model.embed_tokens.weight"]
    assert head not in read_weights(copy, tied=False)


def test_a_file_that_memory_does_not_take_is_named(tmp_path: Path, monkeypatch) -> None:
    """Moments and carried states too, which were read in another way."""
    (tmp_path / "carried.safetensors").write_bytes(b"any")

    def too_large(*args: object, **options: object) -> None:
        raise MemoryError("Cannot allocate memory (os error 12)")

    monkeypatch.setattr("retnet.checkpoints.weights.safe_open", too_large)
    with pytest.raises(UserError, match=r"carried\.safetensors has 3 bytes, which memory does not"):
        read_file(tmp_path / "carried.safetensors")


def test_the_checkpoints_readers_share_one(tmp_path: Path) -> None:
    for module in (save, carry, sources):
        assert module.read_file is read_file and not hasattr(module, "load_file")


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    """The library said that it is damaged."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    save_checkpoint(tmp_path / "cafe").rename(folder)
    with pytest.raises(UserError, match=r"caf.*has a name that is no utf-8 text, and the library"):
        load_checkpoint(folder)
