"""The cache of prepared data: what is damaged, left behind or written by two at once."""

import json
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import pytest

import retnet.data.prepare as prepare
from retnet.data import prepare_data
from retnet.data.prepared import remove_abandoned, unfinished
from retnet.errors import UserError
from tests.data.conftest import SpecFor, entries, write_documents


@pytest.mark.parametrize(
    "name",
    ["record.json", "train/tokens.bin", "validation/manifest.json", "tokenizer/tokenizer.json"],
)
@pytest.mark.parametrize("content", [None, b"", b"{}"])
def test_a_damaged_entry_is_made_again(
    tmp_path: Path, spec_for: SpecFor, builds: list[int], name: str, content: bytes | None
) -> None:
    spec = spec_for(write_documents(tmp_path / "a.jsonl"), tokenizer="bpe", vocab_size=280)
    first = prepare_data(spec)
    (entry,) = entries(spec)
    damaged = Path(spec.cache_dir) / entry / name
    damaged.unlink()
    if content is not None:
        damaged.write_bytes(content)
    again = prepare_data(spec)
    assert len(builds) == 2
    assert again.record == first.record
    assert entries(spec) == [entry]
    prepare_data(spec)
    assert len(builds) == 2


@pytest.mark.parametrize("name", ["train_sha256", "corpus_sha256", "split", "validation_source"])
def test_a_record_that_lacks_an_entry_is_made_again(
    tmp_path: Path, spec_for: SpecFor, builds: list[int], name: str
) -> None:
    """A run that went on ended in a KeyError."""
    spec = spec_for(write_documents(tmp_path / "a.jsonl"))
    first = prepare_data(spec)
    (file,) = Path(spec.cache_dir).glob("*/record.json")
    file.write_text(json.dumps({k: v for k, v in first.record.items() if k != name}))
    assert prepare_data(spec).record == first.record
    assert len(builds) == 2


@pytest.mark.parametrize("padding", ["x", -1, 259, None, True])
def test_padding_that_is_no_token_is_made_again(
    tmp_path: Path, spec_for: SpecFor, builds: list[int], padding: object
) -> None:
    spec = spec_for(write_documents(tmp_path / "a.jsonl"))
    prepare_data(spec)
    (file,) = Path(spec.cache_dir).glob("*/validation/manifest.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token_id": padding}))
    assert prepare_data(spec).validation.padding == 258
    assert len(builds) == 2


def test_tokens_that_the_tokenizer_does_not_have_are_made_again(
    tmp_path: Path, spec_for: SpecFor, builds: list[int]
) -> None:
    """The checksums are right; training would have ended in an IndexError."""
    spec = spec_for(write_documents(tmp_path / "a.jsonl"))
    first = prepare_data(spec)
    (entry,) = entries(spec)
    folder = Path(spec.cache_dir) / entry / "train"
    manifest = json.loads((folder / "manifest.json").read_text())
    wrong = b"\xff\xff" * first.train.num_tokens
    (folder / "tokens.bin").write_bytes(wrong)
    manifest["checksums"]["tokens.bin"] = [len(wrong), zlib.crc32(wrong)]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert prepare_data(spec).train.tokens.max() < 259
    assert len(builds) == 2


@pytest.mark.slow
def test_two_processes_at_once(tmp_path: Path, spec_for: SpecFor) -> None:
    spec = spec_for(write_documents(tmp_path / "a.jsonl", 400), tokenizer="bpe", vocab_size=400)
    code = (
        "import sys, json; from retnet.data import DataSpec, prepare_data; sys.stdin.read(1);"
        f"p = prepare_data({spec!r});"
        "print(json.dumps([p.record, p.train.tokens.tolist()]))"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        for _ in range(2)
    ]
    answers = [process.communicate("x")[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert answers[0] == answers[1] != ""
    assert len(entries(spec)) == 1


def test_the_later_of_two_keeps_the_earlier(
    tmp_path: Path, spec_for: SpecFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process finishes the same preparation while this one is at work."""
    spec = spec_for(write_documents(tmp_path / "a.jsonl"))
    real = prepare._build
    inode: list[int] = []

    def slow(*arguments: object) -> None:
        monkeypatch.setattr(prepare, "_build", real)
        prepare_data(spec)
        (entry,) = (name for name in entries(spec) if not name.startswith("."))
        inode.append((Path(spec.cache_dir) / entry).stat().st_ino)
        real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(prepare, "_build", slow)
    prepare_data(spec)
    (entry,) = entries(spec)
    assert [(Path(spec.cache_dir) / entry).stat().st_ino] == inode


def test_source_that_changes_meanwhile(
    tmp_path: Path, spec_for: SpecFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_documents(tmp_path / "a.jsonl")
    real = prepare._build

    def build(*arguments: object) -> None:
        real(*arguments)  # type: ignore[arg-type]
        write_documents(path, 41)

    monkeypatch.setattr(prepare, "_build", build)
    with pytest.raises(UserError, match="changed while it was being read"):
        prepare_data(spec_for(path))
    assert not (tmp_path / "cache").exists()


LONE = json.dumps({"text": "a\ud800"})


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("", {}, r"data\.source \(.*a\.jsonl\) is empty"),
        ('{"text": ""}\n{"text": null}', {}, r"data\.source \(.*a\.jsonl\) is empty"),
        ('{"text": "ab"}', {}, r"data\.seq_len \(8\) is longer than the training text"),
        ('{"text": "a"}', {}, r"too short to hold anything back"),
        ('{"text": "' + "ab" * 20 + '"}', {"validation_fraction": 1e-17}, r"validation side empty"),
        (LONE, {}, r"document 1 holds half a surrogate pair at character 1"),
        ('{"text": "a"}\n' * 9 + "{", {}, r"line 10 is not JSON"),
    ],
)
def test_failures_leave_nothing_behind(
    tmp_path: Path, spec_for: SpecFor, content: str, options: dict[str, object], message: str
) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        prepare_data(spec_for(tmp_path / "a.jsonl", **options))
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_empty_validation_file(tmp_path: Path, spec_for: SpecFor) -> None:
    (tmp_path / "a.txt").write_text("training text")
    (tmp_path / "b.txt").write_text("")
    with pytest.raises(UserError, match=r"data\.validation \(.*b\.txt\) is empty"):
        prepare_data(spec_for(tmp_path / "a.txt", validation=str(tmp_path / "b.txt")))


def test_an_interrupt_leaves_nothing_behind(
    tmp_path: Path, spec_for: SpecFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_documents(tmp_path / "a.jsonl")

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "train_bpe", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare_data(spec_for(path, tokenizer="bpe", vocab_size=300))
    assert not (tmp_path / "cache").exists()


def test_leftovers_of_killed_processes_go_at_the_next_start(
    tmp_path: Path, spec_for: SpecFor, builds: list[int]
) -> None:
    """Whether or not it has anything to prepare; what a living process holds stays."""
    spec = spec_for(write_documents(tmp_path / "a.jsonl"))
    cache = Path(spec.cache_dir)
    with unfinished(cache / "other") as alive:
        for _ in range(2):
            (cache / ".unfinished-killed" / "complete").mkdir(parents=True)
            prepare_data(spec)
            assert [name for name in entries(spec) if name.startswith(".")] == [alive.name]
    assert len(builds) == 1
    assert not alive.exists()


def test_a_folder_that_is_taken_for_a_leftover_is_made_anew(tmp_path: Path, monkeypatch) -> None:
    """Another process may look between the making of a folder and its lock."""
    real, looked = tempfile.mkdtemp, []

    def and_then_another_looks(**options: object) -> str:
        made = real(**options)  # type: ignore[call-overload]
        if not looked:
            looked.append(made)
            remove_abandoned(tmp_path)
        return made

    monkeypatch.setattr(tempfile, "mkdtemp", and_then_another_looks)
    with unfinished(tmp_path / "entry") as folder:
        remove_abandoned(tmp_path)
        assert folder.is_dir()
    assert looked and list(tmp_path.iterdir()) == []


def test_cache_that_cannot_be_written(tmp_path: Path, spec_for: SpecFor) -> None:
    path = write_documents(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match=r"data\.cache_dir .*a\.jsonl is a file: name a folder"):
        prepare_data(spec_for(path, cache_dir=str(path / "x")))


def test_links_in_the_cache_are_left_alone(tmp_path: Path) -> None:
    """A lock was made in the folder that one leads to."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/.unfinished-x").symlink_to(tmp_path / "mine")
    remove_abandoned(tmp_path / "cache")
    assert list((tmp_path / "mine").iterdir()) == []
