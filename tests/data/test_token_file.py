"""Token files: what is written is read, and what is damaged is not believed."""

import json
import os
import zlib
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from retnet.data import TokenFile
from retnet.data.token_file import DamagedTokenFileError, TokenFileWriter

DOCUMENTS = [np.array([1, 5, 9, 2]), np.array([1, 2]), np.array([1, 65535, 2])]


def write(folder: Path, max_token_id: int = 65535) -> Path:
    with closing(TokenFileWriter(folder, max_token_id)) as writer:
        for ids in DOCUMENTS:
            writer.add(ids, len(ids) * 10)
        writer.finish(note="kept")
    return folder


@pytest.mark.parametrize(("largest", "dtype"), [(65535, np.uint16), (65536, np.uint32)])
def test_round_trip(tmp_path: Path, largest: int, dtype: type) -> None:
    tokens = TokenFile.open(write(tmp_path / "t", largest))
    assert isinstance(tokens.tokens, np.memmap)
    assert tokens.tokens.dtype == dtype
    assert tokens.tokens.tolist() == np.concatenate(DOCUMENTS).tolist()
    assert tokens.document_starts.tolist() == [0, 4, 6]
    assert tokens.document_bytes.tolist() == [40, 20, 30]
    assert (tokens.num_tokens, tokens.num_documents, tokens.num_bytes) == (9, 3, 90)
    assert tokens.manifest["note"] == "kept"


@pytest.mark.parametrize("name", ["tokens.bin", "document_starts.npy", "document_bytes.npy"])
@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_damage_is_noticed(tmp_path: Path, name: str, damage: str) -> None:
    path = write(tmp_path / "t") / name
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[:-1])
    elif damage == "changed":  # the size alone would not show it
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        path.unlink()
    with pytest.raises(DamagedTokenFileError):
        TokenFile.open(tmp_path / "t")


@pytest.mark.parametrize("manifest", ["", "{}", "[]", '{"checksums": {}}'])
def test_a_bad_manifest_is_noticed(tmp_path: Path, manifest: str) -> None:
    (write(tmp_path / "t") / "manifest.json").write_text(manifest)
    with pytest.raises(DamagedTokenFileError):
        TokenFile.open(tmp_path / "t")


def test_unfinished_has_no_manifest(tmp_path: Path) -> None:
    with closing(TokenFileWriter(tmp_path / "t", 10)) as writer:
        writer.add(np.array([1, 2]), 0)
    with pytest.raises(DamagedTokenFileError):
        TokenFile.open(tmp_path / "t")


def rewrite(folder: Path, **changes: object) -> None:
    """Change arrays or the manifest, which has their checksums then."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, values in changes.items():
        if name.startswith("document"):
            np.save(folder / f"{name}.npy", values)
    for name in manifest["checksums"]:
        content = (folder / name).read_bytes()
        manifest["checksums"][name] = [len(content), zlib.crc32(content)]
    manifest |= {"dtype": changes.get("dtype", manifest["dtype"])}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "float16"},
        {"dtype": "O"},
        {"document_starts": [0, 4]},
        {"document_starts": [0, 6, 4]},
        {"document_starts": [-1, 4, 6]},
        {"document_starts": [0, 4, 9]},
        {"document_starts": [0.0, 4.0, 6.0]},
        {"document_bytes": [40, -20, 30]},
        {"document_starts": [], "document_bytes": []},
    ],
)
def test_what_no_writer_wrote_is_noticed(tmp_path: Path, changes: dict[str, object]) -> None:
    """The checksums are right, and the content can't be."""
    folder = write(tmp_path / "t")
    rewrite(folder)
    TokenFile.open(folder).check_ids(65535)
    rewrite(folder, **changes)
    with pytest.raises(DamagedTokenFileError):
        TokenFile.open(folder)


def test_tokens_beyond_the_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(DamagedTokenFileError, match="has the id 65535, the vocabulary 258"):
        TokenFile.open(write(tmp_path / "t")).check_ids(258)


def test_tokens_that_are_a_pipe_are_not_waited_for(tmp_path: Path) -> None:
    (write(tmp_path / "t") / "tokens.bin").unlink()
    os.mkfifo(tmp_path / "t/tokens.bin")
    with pytest.raises(DamagedTokenFileError, match=r"tokens\.bin is no file"):
        TokenFile.open(tmp_path / "t")
