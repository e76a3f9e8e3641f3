"""What a path leads to, also where the system refuses to say."""

import os
from pathlib import Path

import pytest

from retnet.errors import UserError
from retnet.paths import expand, kind_of


def test_kinds(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("nothing")
    kinds = {
        "file": "file",
        "pipe": "other",
        ".": "folder",
        "no": None,
        "file/x": None,
        "link": None,
    }
    assert {name: kind_of(tmp_path / name, "key") for name in kinds} == kinds


@pytest.mark.parametrize(
    ("name", "reason"),
    [("x" * 300, "File name too long"), ("a\0b", "embedded null byte"), ("\ud800", "surrogates")],
)
def test_names_that_no_file_can_have(name: str, reason: str) -> None:
    with pytest.raises(UserError, match=rf"^key \((?s:.*)\) cannot be reached \(.*{reason}.*\): "):
        kind_of(Path(name), "key")


def test_a_folder_that_may_not_be_entered(monkeypatch) -> None:
    """The superuser, who may run this, may enter all."""

    def denied(path: Path, **options) -> os.stat_result:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as inside:
        inside.setattr(Path, "stat", denied)
        with pytest.raises(UserError, match=r"key \(a/b\) cannot be reached \(Permission denied\)"):
            kind_of(Path("a/b"), "key")


def test_home_folders() -> None:
    assert expand("~/a", "key") == Path.home() / "a"
    with pytest.raises(UserError, match=r"key \(~nobodyx/a\) has no home folder"):
        expand("~nobodyx/a", "key")
