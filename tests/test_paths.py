"""What a path leads to, also where the system refuses to say, and one way to write it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from retnet import cli
from retnet.checkpoints import export
from retnet.errors import UserError
from retnet.experiments import repeat
from retnet.paths import expand, kind_of
from tests.places import MAINS, RUN


def test_kinds(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("nothing")
    (tmp_path / "loop").symlink_to("loop")
    kinds = {
        "file": "file",
        "pipe": "other",
        ".": "folder",
        "no": None,
        "file/x": None,
        "link": None,
        "loop": None,
    }
    assert {name: kind_of(tmp_path / name, "key") for name in kinds} == kinds


@pytest.mark.parametrize(
    ("name", "reason"),
    [("x" * 300, "File name too long"), ("a\0b", "embedded null"), ("\ud800", "surrogates")],
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


def test_what_is_parsed_stays_as_it_is(tmp_path: Path, monkeypatch) -> None:
    """./~x is a file of that name, and the current folder has to be named."""
    assert expand(expand("./~x", "key"), "key") == Path("~x")
    assert expand("a/~/b", "key") == Path("a/~/b")
    assert expand(".", "key") == Path()
    with pytest.raises(UserError, match=r"^key \(''\) is empty"):
        expand("", "key")


@pytest.mark.parametrize(
    ("text", "reason"), [("a\0b", "it has a null byte"), ("\ud800", "it has half a surrogate pair")]
)
def test_texts_that_are_no_path(text: str, reason: str) -> None:
    with pytest.raises(UserError, match=rf"(?s)^key \(.*\) cannot be a path, {reason}: "):
        expand(text, "key")


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    """A name of them can be read; libraries that only take text cannot write there."""
    Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9")).write_text("x")
    typed = f"{tmp_path}/caf\udce9"
    assert kind_of(expand(typed, "key"), "key") == "file"
    with pytest.raises(UserError, match=r"cannot be written where names are utf-8: "):
        expand(typed, "key", for_libraries=True)


def test_a_home_folder_in_every_path_of_every_command(
    places: dict[str, Path], tmp_path: Path, monkeypatch, capsys
) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    for folder in (home, here):
        folder.mkdir()
    for name in ("tiny", "corpus", "runs"):
        (home / places[name].name).symlink_to(places[name])
    (home / "held.txt").write_text("text that is held back")
    (home / "prompt.txt").write_text("the prompt")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    run = RUN.format(tiny="~/tiny.yaml", corpus="~/corpus.jsonl", new="~")
    other = run.replace("train.out_dir=~/run", "train.out_dir=~/other train.max_steps=2")
    every = run.replace("train.out_dir=~/run", "--seeds 0 --mixers retention --out ~/all")
    resumed = "data.tokenizer=~/run/final train.resume=~/run/checkpoints/step_1"
    model, both = "~/runs/retention", "~/runs/retention ~/runs/attention --no-speed"
    commands = [
        (MAINS["train"], run + " data.validation=~/held.txt"),
        (MAINS["train"], run + " train.out_dir=~/begun model.init_from=~/run"),
        (MAINS["train"], f"{other} {resumed}"),
        (MAINS["generate"], f"{model} --prompt-file ~/prompt.txt --max-new-tokens 2"),
        (MAINS["compare"], f"{both} --text ~/corpus.jsonl --json ~/out.json"),
        (export.main, f"{model} ~/exported"),
        (repeat.main, every),
    ]
    for main, arguments in commands:
        assert cli.run(main, arguments.split()) == 0, capsys.readouterr().err
    assert "the prompt" in capsys.readouterr().out
    made = ("run/final", "begun/final", "other/final", "cache", "out.json", "exported", "all")
    assert [name for name in made if not (home / name).exists()] == []
    assert list(here.iterdir()) == []


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
IN_ASCII = """
import sys, generate, train
from retnet import cli
from retnet.data.sources import open_location
def call(main, *argv):
    sys.argv[1:] = argv
    print(cli.run(main.main))
recipe, text, model, tiny = sys.argv[1:]
assert sys.getfilesystemencoding() == "ascii"
call(train, recipe)
call(train, tiny, "train.sample_prompt=\\udcc3\\udca9", "--print-config")
(document,) = open_location("\\xe9.txt", "data.source", "text", None, "train").documents()
assert document == "\\xe9"
call(generate, model, "--prompt", "\\udcc3\\udca9", "--stop=\\udcc3\\udca9", "--max-new-tokens=1")
call(generate, model, "-", "--max-new-tokens", "1")
call(generate, model, "--prompt", "a\\udcff", "--max-new-tokens", "1")
"""


@pytest.mark.slow
def test_a_locale_without_letters_that_are_typed(places: dict[str, Path], tmp_path: Path) -> None:
    """Text is UTF-8 whatever the locale says, and paths are read; a run folder gets one line."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("train: {out_dir: café}\n", encoding="utf-8")
    text = tmp_path / "é.txt"
    text.write_text("é", encoding="utf-8")
    arguments = (recipe, text, places["runs"] / "retention", places["tiny"])
    result = subprocess.run(
        [sys.executable, "-c", IN_ASCII, *arguments],
        env=os.environ | ASCII | {"PYTHONPATH": str(Path.cwd())},
        cwd=tmp_path,
        input="é".encode(),
        capture_output=True,
        check=False,
    )
    errors = [line for line in result.stderr.splitlines() if line.startswith(b"error: ")]
    codes = [line for line in result.stdout.splitlines() if line in b"0 1 2"]
    assert codes == [b"2", b"0", b"0", b"0", b"2"], result.stderr.decode()
    assert errors == [
        rb"error: train.out_dir (caf\xe9) cannot be written where names are ascii: set "
        b"PYTHONUTF8=1 or a UTF-8 locale, or use another name",
        b"error: --prompt is not UTF-8 at byte 1 (0xff): convert it",
    ]
