"""The file of a comparison replaces nothing that is read, nor a part of a checkpoint or run."""

import os
from pathlib import Path

import pytest

from retnet.errors import UserError
from retnet.evaluation import check_not_read, check_writable
from retnet.evaluation.output import write_bytes


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The names of a run's files."""
    folder = tmp_path / "run"
    for part in ("final", "best", "checkpoints/step_2"):
        (folder / part).mkdir(parents=True)
        for name in ("config.json", "model.safetensors"):
            (folder / part / name).write_text(part)
    for name in ("config.yaml", "metrics.jsonl", "old.json"):
        (folder / name).write_text(name)
    return folder


def everything(folder: Path) -> dict[Path, str | None]:
    return {path: path.read_text() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("name", "culprit"),
    [
        ("final/model.safetensors", "final"),
        ("final/config.json", "final"),
        ("final/new.json", "final"),
        ("checkpoints/step_2/data.json", "checkpoints/step_2"),
        ("checkpoints/new.json", ""),
        ("config.yaml", ""),
        ("metrics.jsonl", ""),
    ],
)
def test_files_of_training(run: Path, name: str, culprit: str) -> None:
    before = everything(run)
    link = run.parent / "link.json"
    link.symlink_to(run / name)
    for path in (run / name, link):
        with pytest.raises(UserError) as caught:
            check_writable(path)
        folder = run / culprit
        assert str(caught.value) == (
            f"--json ({path}) lies among the files of a checkpoint or run ({folder}): name a file "
            "elsewhere"
        )
    assert everything(run) == before


def test_a_file_of_another_option_is_called_so(run: Path, tmp_path: Path) -> None:
    paths = [run, run / "final/x.png", tmp_path / "no/x.png", Path("-"), Path("/dev/null")]
    for path in paths:
        with pytest.raises(UserError, match=r"^--plot \("):
            check_writable(path, "--plot")
    with pytest.raises(UserError, match=r"^--plot \(.*\) cannot be written"):
        write_bytes(tmp_path / "no/x.png", b"", "--plot")
    write_bytes(tmp_path / "x.png", b"content", "--plot")
    assert (tmp_path / "x.png").read_bytes() == b"content"


@pytest.mark.parametrize("name", ["old.json", "new.json", "reports/../new.json", "../out.jsonl"])
def test_other_places(run: Path, name: str) -> None:
    (run / "reports").mkdir()
    before = everything(run.parent)
    check_writable(run / name)
    assert everything(run.parent) == before


def test_files_that_the_text_is_read_from(tmp_path: Path) -> None:
    text, other = tmp_path / "text.jsonl", tmp_path / "other.txt"
    text.write_text("a")
    os.link(text, tmp_path / "hard.json")
    (tmp_path / "soft.json").symlink_to(text)
    for name in ("text.jsonl", "hard.json", "soft.json"):
        with pytest.raises(
            UserError, match=rf"{name}\) is a file that the text is read from: name"
        ):
            check_not_read(tmp_path / name, [other, text])
    check_not_read(tmp_path / "new.json", [other, text])


@pytest.mark.parametrize(("stream", "name"), [("stdout", "output"), ("stderr", "error")])
def test_the_file_that_a_stream_goes_to(
    tmp_path: Path, monkeypatch, stream: str, name: str
) -> None:
    """As in ``--json out.txt > out.txt``, or with /dev/stdout."""
    with (tmp_path / "out.txt").open("w") as file:
        monkeypatch.setattr(f"sys.{stream}", file)
        with pytest.raises(UserError, match=rf"is where standard {name} goes: name another file"):
            check_writable(tmp_path / "out.txt")
