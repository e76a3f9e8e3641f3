"""Files and folders are there as a whole or not at all; JSON is an object or one clear line."""

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from retnet import files
from retnet.errors import UserError


class PowerCut(BaseException):
    """What no code catches, as when the process is gone."""


def fail(error: BaseException) -> Callable[..., None]:
    def failing(*_: object, **__: object) -> None:
        raise error

    return failing


NO_SPACE = OSError(28, "No space left on device")


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A file and a folder that are there already; returns the folder above."""
    (tmp_path / "file.json").write_text("old")
    (tmp_path / "best").mkdir()
    (tmp_path / "best/a").write_text("old")
    return tmp_path


@pytest.mark.parametrize("moment", ["sync", "replace"])
def test_a_file_is_the_old_one_until_it_is_the_new_one(old: Path, monkeypatch, moment: str) -> None:
    owner = files if moment == "sync" else Path
    with monkeypatch.context() as patch:
        patch.setattr(owner, moment, fail(NO_SPACE))
        with pytest.raises(OSError, match="No space"):
            files.write_text(old / "file.json", "new")
        assert content(old) == {"file.json": "old"}  # and nothing beside it
        patch.setattr(owner, moment, fail(PowerCut()))
        with pytest.raises(PowerCut):
            files.write_text(old / "file.json", "new")
    assert (old / "file.json").read_text() == "old"
    files.tidy(old)
    assert content(old) == {"file.json": "old"}
    files.write_text(old / "file.json", "new")
    assert content(old) == {"file.json": "new"}


def test_what_is_written_is_on_disk_before_it_takes_its_place(old: Path, monkeypatch) -> None:
    done: list[str] = []
    real_sync, real_replace, real_rename = files.sync, Path.replace, Path.rename
    monkeypatch.setattr(files, "sync", lambda path: (done.append(path.name), real_sync(path)))
    monkeypatch.setattr(
        Path, "replace", lambda path, to: (done.append("replace"), real_replace(path, to))
    )
    monkeypatch.setattr(
        Path, "rename", lambda path, to: (done.append("rename"), real_rename(path, to))
    )
    files.write_text(old / "file.json", "new")
    assert names(done) == [".unfinished-file.json", "replace"]
    done.clear()
    with files.replacing(old / "final") as new:
        (new / "a").write_text("new")
    assert names(done) == ["a", ".unfinished-final", "rename", old.name]


def names(done: list[str]) -> list[str]:
    """Temporary names without what was drawn by chance."""
    return [files.OURS.sub(r".unfinished-\g<name>", name) for name in done]


@pytest.mark.parametrize("error", [NO_SPACE, RuntimeError("a bug"), PowerCut()])
def test_a_folder_is_the_old_one_until_it_is_complete(old: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), files.replacing(old / "best") as new:
        (new / "a").write_text("half")
        raise error
    assert content(old / "best") == {"a": "old"}
    left = list(old.glob(".unfinished-*"))
    assert len(left) == isinstance(error, PowerCut)  # else the space is given back
    files.tidy(old)
    assert sorted(path.name for path in old.iterdir()) == ["best", "file.json"]
    with files.replacing(old / "best") as new:
        (new / "b").write_text("new")
    assert content(old / "best") == {"b": "new"}
    assert sorted(path.name for path in old.iterdir()) == ["best", "file.json"]


@pytest.mark.parametrize(("renames", "found"), [(1, "old"), (2, "new")])
def test_a_folder_that_was_being_replaced_comes_back(
    old: Path, monkeypatch, renames: int, found: str
) -> None:
    """Interrupted after the first of the two renames, or before the old one is removed."""
    real, calls = Path.rename, []

    def rename(path: Path, target: Path) -> Path:
        result = real(path, target)
        calls.append(1)
        if len(calls) == renames:
            raise PowerCut
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(PowerCut), files.replacing(old / "best") as new:
            (new / "a").write_text("new")
    files.tidy(old)
    assert content(old / "best") == {"a": found}
    assert sorted(path.name for path in old.iterdir()) == ["best", "file.json"]


def test_a_folder_half_removed_has_lost_its_name(old: Path, monkeypatch) -> None:
    real = files.shutil.rmtree

    def interrupted(path: Path, **options: object) -> None:
        if path.exists():
            os.unlink(path / "a")  # noqa: PTH108
            raise PowerCut
        real(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", interrupted)
        with pytest.raises(PowerCut):
            files.remove_folder(old / "best")
    assert not (old / "best").exists()
    files.tidy(old)
    assert [path.name for path in old.iterdir()] == ["file.json"]


def test_trying_leaves_nothing(old: Path) -> None:
    files.try_to_write(old / "file.json")
    files.try_to_write(old / "other.json")
    assert content(old) == {"file.json": "old"}
    with pytest.raises(OSError):
        files.try_to_write(old / "none/other.json")


def test_what_a_user_made_is_neither_overwritten_nor_removed(old: Path) -> None:
    """Temporary names were made from the file's name alone."""
    for name in (
        ".unfinished-file.json",
        ".unfinished-best",
        ".file.json.tmp",
        ".unfinished-old-x",
    ):
        (old / name).write_text("a user's")
    before = content(old)
    files.try_to_write(old / "file.json")
    files.write_text(old / "file.json", "new")
    with files.replacing(old / "best") as new:
        (new / "a").write_text("new")
    files.tidy(old)
    assert content(old) == before | {"file.json": "new"}


def test_what_a_living_process_writes_is_not_removed(old: Path) -> None:
    with files.replacing(old / "best") as new:
        (new / "a").write_text("new")
        files.tidy(old)
        with files.replacing(old / "best") as other:  # two at once have places of their own
            (other / "a").write_text("other")
    assert content(old / "best") == {"a": "new"}
    left = old / ".unfinished-0123456789abcdef-final"
    left.mkdir()
    with files.held(left):
        files.tidy(old)
        assert left.exists()
    files.tidy(old)
    assert sorted(path.name for path in old.iterdir()) == ["best", "file.json"]


def test_a_process_that_was_killed_holds_nothing(old: Path) -> None:
    left = old / ".unfinished-0123456789abcdef-file.json"
    left.write_text("half")
    child = os.fork()
    if child == 0:
        with files.held(left):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    files.tidy(old)
    assert content(old) == {"file.json": "old"}


def test_a_link_stays_and_its_file_is_written(old: Path) -> None:
    target = old / "best/real.json"
    target.write_text("old")
    target.chmod(0o600)
    link = old / "link.json"
    link.symlink_to(target)
    files.try_to_write(link)
    files.write_text(link, "new")
    assert link.is_symlink() and target.read_text() == "new"
    assert target.stat().st_mode & 0o777 == 0o600
    files.write_text(old / "best/fresh.json", "")
    umask = os.umask(0)
    os.umask(umask)
    assert (old / "best/fresh.json").stat().st_mode & 0o777 == 0o666 & ~umask


def test_numbers_that_json_does_not_know(tmp_path: Path) -> None:
    file, numbers = tmp_path / "a.json", {"a": [math.nan, 1.5], "b": (math.inf,), "é": "\udc80"}
    files.write_json(file, numbers)
    assert json.loads(file.read_text()) == {"a": [None, 1.5], "b": [None], "é": "\udc80"}
    files.write_json(file, numbers, not_finite=str)
    assert files.read_json(file, "")["b"] == ["inf"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "is not readable JSON (Expecting property name"),
        (b"\xff", "is not readable JSON ('utf-8' codec"),
        (b"[" * 100_000, "is not readable JSON (maximum recursion"),
        (b"[1]", "does not hold an object: make it again"),
        (None, "is not readable JSON ([Errno 2] No such file"),
    ],
)
def test_json_that_cannot_be_read(tmp_path: Path, text: bytes | None, message: str) -> None:
    file = tmp_path / "a.json"
    if text is not None:
        file.write_bytes(text)
    with pytest.raises(UserError) as caught:
        files.read_json(file, "make it again")
    assert str(caught.value).startswith(f"{file} {message}")
    assert str(caught.value).endswith(": make it again")


def test_missing_folders(tmp_path: Path) -> None:
    assert files.missing_folders(tmp_path) == []
    below = tmp_path / "a/b"
    assert files.missing_folders(below) == [below, below.parent]


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(UserError, match=r"a\.json is a folder, pipe or device, where a file is"):
        files.read_json(tmp_path / "a.json", "repair it")
    os.mkfifo(tmp_path / f".unfinished-{'0' * 16}-a")
    files.tidy(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_of_a_link_the_link_alone_is_removed(tmp_path: Path) -> None:
    """A checkpoint that was moved to another disk is one."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/mine").write_text("years")
    for name in ("step_1", "best", ".unfinished-0123456789abcdef-x"):
        (tmp_path / name).symlink_to(tmp_path / "disk")
    files.remove_folder(tmp_path / "step_1")
    with files.replacing(tmp_path / "best") as new:
        (new / "a").write_text("a")
    files.tidy(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "disk"]
    assert content(tmp_path / "disk") == {"mine": "years"}
    assert content(tmp_path / "best") == {"a": "a"}
