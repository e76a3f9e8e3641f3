"""Folders and globs list the same files: through links once, nothing silently left out."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from retnet.data import DataSpec
from retnet.data.listing import files_below
from retnet.data.sources import open_source, reopen_source
from retnet.errors import UserError

SpecFor = Callable[..., DataSpec]


def write(folder: Path, *names: str) -> None:
    """Files that hold their own names."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def read(spec: DataSpec) -> list[str]:
    """The documents, which the record must lead to again."""
    source = open_source(spec)
    found = list(source.documents())
    assert list(reopen_source(source.to_record()).documents()) == found
    return found


@pytest.mark.parametrize("source", ["here", "here/**", "here/**/*", "here/**/*.txt"])
def test_links_are_followed_once(
    tmp_path: Path, spec_for: SpecFor, monkeypatch, source: str
) -> None:
    """Into other folders, in circles, and to what is there already."""
    write(tmp_path, "here/a.txt", "here/sub/b.txt", "here/sub/c/d.txt", "far/e.txt", "one/f.txt")
    (tmp_path / "here/linked").symlink_to(tmp_path / "far")
    (tmp_path / "far/back").symlink_to(tmp_path / "here/sub")
    (tmp_path / "here/sub/up").symlink_to("..")
    (tmp_path / "here/Again").symlink_to("sub")  # before it by name
    (tmp_path / "here/a again.txt").symlink_to("a.txt")
    (tmp_path / "here/f.txt").symlink_to(tmp_path / "one/f.txt")
    monkeypatch.chdir(tmp_path)
    found = ["here/a.txt", "one/f.txt", "far/e.txt", "here/sub/b.txt", "here/sub/c/d.txt"]
    assert read(spec_for(source)) == found


def test_hidden_ones_are_read_where_a_glob_names_them(tmp_path: Path, spec_for: SpecFor) -> None:
    write(tmp_path, "a.txt", ".b.txt", ".c/d.txt", "e/.f/g.txt")
    assert read(spec_for(tmp_path)) == read(spec_for(tmp_path / "**/*.txt")) == ["a.txt"]
    assert read(spec_for(tmp_path / ".c/*.txt")) == [".c/d.txt"]
    assert read(spec_for(tmp_path / "e/.*/*.txt")) == ["e/.f/g.txt"]
    assert read(spec_for(tmp_path / "e/../.[a-b]*")) == [".b.txt"]


@pytest.mark.parametrize("source", [".", "**/*.txt", "*/*.txt"])
def test_a_folder_that_cannot_be_read_is_named(
    tmp_path: Path, spec_for: SpecFor, monkeypatch, source: str
) -> None:
    """The superuser, who may run this, may read all."""
    write(tmp_path, "a/b.txt", "closed/c.txt")
    real = os.scandir

    def closed(path: Path):
        if path.name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", closed)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"data\.source: .*closed cannot be read \(Permission den"):
        open_source(spec_for(source))


def test_links_to_nothing_are_named(
    tmp_path: Path, spec_for: SpecFor, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, "a.txt")
    (tmp_path / "unmounted").symlink_to("/no/such/place")
    assert read(spec_for(tmp_path)) == ["a.txt"]
    assert f"{tmp_path}/unmounted is a link to nothing" in caplog.text
    (tmp_path / "b.txt").symlink_to("/no/such/file")
    for source in (tmp_path, tmp_path / "*.txt"):
        with pytest.raises(UserError, match=r"b\.txt is a link to nothing: restore what it leads"):
            open_source(spec_for(source))


@pytest.mark.parametrize("name", ["a[1]", "b]c[", "d*", "e?", "[[]f]"])
def test_signs_in_the_name_of_the_current_folder(
    tmp_path: Path, spec_for: SpecFor, monkeypatch, name: str
) -> None:
    here = tmp_path / name
    write(here, "a.txt", "sub/b.txt")
    write(tmp_path, "a1/no.txt", "dd/no.txt", "ee/no.txt")
    monkeypatch.chdir(here)
    assert read(spec_for("*.txt")) == ["a.txt"]
    assert read(spec_for("**/[ab].txt")) == ["a.txt", "sub/b.txt"]
    monkeypatch.setenv("HOME", str(here))
    assert read(spec_for("~/sub/*.txt")) == ["sub/b.txt"]


def test_a_glob_of_a_run_reads_nothing_that_it_wrote(tmp_path: Path, spec_for: SpecFor) -> None:
    write(tmp_path, "run/config.yaml", "run/metrics.jsonl", "run/checkpoints/step_1/vocab.txt")
    for pattern in ("run/*.jsonl", "*/metrics.jsonl", "**/*.txt", "*/checkpoints/*/vocab.txt"):
        with pytest.raises(UserError, match="matches no file"):
            open_source(spec_for(tmp_path / pattern))


def test_checkpoints_and_the_cache_are_no_text(tmp_path: Path) -> None:
    write(tmp_path, *(f"copy/{x}" for x in ("config.json", "manifest.json", "tokenizer.json")))
    write(tmp_path, "copy/vocab.txt", "cache/x-1/record.json", "cache/x-1/train/tokens.bin")
    write(tmp_path, "cache/x-1/validation/tokens.bin", "cache/x-1/tokenizer/vocab.txt")
    write(tmp_path, "set/record.json", "set/train/a.txt", "set/validation/b.txt")  # not the cache's
    found = files_below(tmp_path, "data.source", lambda path: True)
    assert {path.relative_to(tmp_path).parts[0] for path in found} == {"set"}
    assert len(found) == 3
