"""A tokenizer's files are looked at first: nothing waits for a pipe, no text grows without end."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from retnet.checkpoints import load_checkpoint
from retnet.data import load_tokenizer
from retnet.data.tokenizer_files import check_tokenizer_files
from retnet.errors import UserError
from tests.generation.builders import byte_tokenizer, save_checkpoint

TEN = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
PREPEND = {"type": "Prepend", "prepend": "a" * 1000}
PANIC = {"type": "Precompiled", "precompiled_charsmap": "////f3g="}
ANY = {"type": "Replace", "pattern": {"Regex": "."}, "content": "a" * 10}
HALF = {"type": "Replace", "pattern": {"String": "aa"}, "content": "b"}
BEFORE = "normalizer and pre_tokenizer"
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def spoil(folder: Path, **parts: object) -> Path:
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | parts))
    return folder


def several(name: str, *steps: dict) -> dict:
    return {"type": "Sequence", name: list(steps)}


def loads(folder: Path) -> None:
    load_tokenizer(str(folder))


@pytest.mark.parametrize("load", [loads, load_checkpoint])
def test_a_pipe_is_not_waited_for(tmp_path: Path, load: Callable[[Path], object]) -> None:
    folder = save_checkpoint(tmp_path / "final")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
        with pytest.raises(UserError, match=rf"{name} is a folder, pipe or device, where a file"):
            load(folder)
        (folder / name).unlink()


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"normalizer": several("normalizers", *[TEN] * 4)}, BEFORE),
        (
            {"normalizer": several("normalizers", several("normalizers", *[ANY] * 2), *[ANY] * 2)},
            BEFORE,
        ),
        (
            {"pre_tokenizer": several("pretokenizers", *[BYTES] * 11)},
            BEFORE,
        ),
        (
            {
                "normalizer": several("normalizers", *[TEN] * 2),
                "pre_tokenizer": several("pretokenizers", *[BYTES] * 4),
            },
            BEFORE,
        ),
        ({"decoder": several("decoders", *[TEN] * 4)}, "decoder"),
        ({"normalizer": PREPEND}, BEFORE),
    ],
)
@pytest.mark.parametrize("load", [loads, load_checkpoint])
def test_texts_that_grow(tmp_path: Path, load, parts: dict, words: str) -> None:
    """Eleven times ten for one ended the process: the library aborts where memory does."""
    folder = spoil(save_checkpoint(tmp_path / "final"), **parts)
    with pytest.raises(UserError, match=rf"json: the {words} can make more than 1,000 characters"):
        load(folder)


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": several("normalizers", TEN, TEN, *[HALF] * 20)},
        {"normalizer": several("normalizers", *[{**ANY, "content": ""}] * 30)},
        {"normalizer": None, "decoder": several("decoders", TEN, TEN, TEN)},
        {"normalizer": [1], "pre_tokenizer": {"pretokenizers": 3}, "decoder": "x"},
    ],
)
def test_texts_that_do_not(tmp_path: Path, parts: dict) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    check_tokenizer_files(spoil(tmp_path, **parts), "repair it")


@pytest.mark.parametrize("load", [loads, load_checkpoint])
def test_a_panic_while_it_is_loaded(tmp_path: Path, load) -> None:
    """What the library raises then is no Exception in Python."""
    folder = spoil(save_checkpoint(tmp_path / "final"), normalizer=PANIC)
    with pytest.raises(UserError, match=r"Cannot parse precompiled_charsmap"):
        load(folder)


@pytest.mark.parametrize("where", ["vocab", "added_tokens"])
@pytest.mark.parametrize("load", [loads, load_checkpoint])
def test_an_id_that_no_memory_reaches(tmp_path: Path, load, where: str) -> None:
    """The library ended the process when it wrote the vocabulary, 4 bytes for each id before it."""
    folder = save_checkpoint(tmp_path / "final")
    content = json.loads((folder / "tokenizer.json").read_text())
    if where == "vocab":
        content["model"]["vocab"]["a"] = 4_000_000_000
    else:
        content["added_tokens"][0]["id"] = 4_000_000_000
    spoil(folder, **content)
    with pytest.raises(UserError, match=r"json: an id \(4000000000\) is beyond 16777215, and mem"):
        load(folder)


@pytest.mark.parametrize("name", ["chat_template.jinja", "added_tokens.json", "vocab.json"])
def test_what_the_libraries_read_beside_it(tmp_path: Path, monkeypatch, name: str) -> None:
    """A pipe, or a file with a hole of 100 GB (as memory has it: of 10 TB)."""
    byte_tokenizer().save_pretrained(tmp_path)
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=f"{name} is a folder, pipe or device"):
        check_tokenizer_files(tmp_path, "fix it")
    (tmp_path / name).unlink()
    (tmp_path / name).touch()
    os.truncate(tmp_path / name, 10**13)
    with pytest.raises(UserError, match=f"{name} has 10,000,000,000,000 bytes, and memory does"):
        check_tokenizer_files(tmp_path, "fix it")
