"""What goes to the Hub and what stays; nothing goes without being asked for."""

import json
import logging
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import filter_repo_objects

from retnet import cli
from retnet.checkpoints import write_manifest
from retnet.checkpoints.export import export_checkpoint
from retnet.checkpoints.push import main

CARD = "---\nlicense: mit\n---\n# A model\n"
STRANGERS = (".env", "notes.txt", "evil.py", "optimizer.safetensors", "carried.safetensors")
PARTS = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
         "tokenizer_config.json", "README.md", "models.py", "mixers_retention.py"}  # fmt: skip


@pytest.fixture(scope="module")
def whole(saved: Path, tmp_path_factory) -> Path:
    """A run's end with its code, and strange things beside it."""
    folder = tmp_path_factory.mktemp("run") / "final"
    export_checkpoint(saved, folder)
    (folder / "README.md").write_text(CARD)
    for name in STRANGERS:
        (folder / name).write_text("a secret")
    (folder / ".cache").mkdir()
    return folder


@pytest.fixture
def final(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run/final"))


@pytest.fixture
def hub(monkeypatch) -> SimpleNamespace:
    """Records what the Hub is asked for; which files of a folder go is the library's own rule."""
    asked = SimpleNamespace(made=[], sent={}, error=None)

    def create_repo(self, repo_id: str, **options):
        if asked.error is not None:
            raise asked.error
        asked.made.append((repo_id, options))
        return SimpleNamespace(repo_id=f"me/{repo_id}" if "/" not in repo_id else repo_id)

    def upload_folder(self, *, repo_id: str, folder_path, allow_patterns, commit_message: str):
        names = [x.relative_to(folder_path).as_posix() for x in folder_path.rglob("*")]
        asked.sent[repo_id] = set(filter_repo_objects(names, allow_patterns=allow_patterns))
        return SimpleNamespace(commit_url="https://huggingface.co/me/model/commit/1")

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setenv("HF_TOKEN", "hf_abc")
    return asked


@pytest.fixture
def nothing_answers(monkeypatch) -> None:
    def refuse(*_, **__):
        pytest.fail("a connection was tried")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("HF_TOKEN", "")


def listed(printed: str) -> dict[str, int]:
    lines = (line.split(maxsplit=1) for line in printed.splitlines() if line.startswith("  "))
    sizes = {name: int(size.replace(",", "")) for size, name in lines}
    *_, (total, count) = sizes.items()
    assert count == sum(sizes.values()) - count and total.startswith("bytes in ")
    del sizes[total]
    return sizes


def test_a_dry_run_needs_neither_network_nor_account(
    final: Path, tmp_path: Path, nothing_answers, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run(main, ["run", "me/model", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    sizes = listed(printed)
    assert sizes.keys() >= PARTS and not sizes.keys() & {*STRANGERS, "data.json", "manifest.json"}
    assert all((final / name).stat().st_size == size for name, size in sizes.items())
    assert f"files of {Path('run/final')} would go to me/model" in printed
    (left,) = [line for line in printed.splitlines() if line.startswith("not uploaded: ")]
    named = set(left.removeprefix("not uploaded: ").split(", "))
    assert named == {*STRANGERS, "data.json", "manifest.json", ".cache"}
    assert sizes.keys() | named == {path.name for path in final.iterdir()}


@pytest.mark.parametrize("private", [False, True])
def test_what_is_listed_is_what_goes(final: Path, hub, private: bool, capsys) -> None:
    assert cli.run(main, [str(final), "model", *["--private"] * private]) == 0
    printed = capsys.readouterr()
    assert hub.sent == {"me/model": set(listed(printed.out))}
    assert hub.made == [("model", {"private": True if private else None, "exist_ok": True})]
    assert printed.out.endswith("https://huggingface.co/me/model/commit/1\n") and not printed.err


def test_a_name_that_is_a_pattern_sends_no_other_file(final: Path, hub) -> None:
    """Shards are named by an index, and may be called anything."""
    weights = final / "model.safetensors"
    weights.rename(final / "a[bc].safetensors")
    index = {"weight_map": {"model.norm.weight": "a[bc].safetensors"}}
    (final / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in (*STRANGERS, ".cache"):
        path = final / name
        path.rmdir() if path.is_dir() else path.unlink()
    write_manifest(final)
    (final / "ab.safetensors").write_text("a secret")
    assert cli.run(main, [str(final), "me/model"]) == 0
    assert (
        "a[bc].safetensors" in hub.sent["me/model"] and "ab.safetensors" not in hub.sent["me/model"]
    )


def test_lines_on_what_is_lacking(saved: Path, tmp_path: Path, nothing_answers, caplog) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "c"))
    write_manifest(folder)
    caplog.set_level(logging.INFO, "retnet")
    main([str(folder), "me/model", "--dry-run"])
    assert any("has no code, people will need this package" in line for line in caplog.messages)
    assert any("there is no README.md" in line for line in caplog.messages)
    caplog.clear()
    (folder / "README.md").write_text(CARD.replace("license: mit", "tags: [a]"))
    main([str(folder), "me/model", "--dry-run"])
    assert any("README.md names no license" in line for line in caplog.messages)


def is_refused(arguments: list, capsys, words: str) -> None:
    assert cli.run(main, [*map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    line = err.splitlines()[-1]
    assert line.startswith("error: ") and words in line and out == "", (line, out)


@pytest.mark.parametrize("name", ["a/b/c", "", "a b", "x..y", "me/model.git", "me/-", "é"])
def test_no_name_of_a_repository(final: Path, hub, capsys, name: str) -> None:
    is_refused([final, name], capsys, f"NAME ({name}) can't be a repository's: write USER/NAME")
    assert not hub.made


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("model.safetensors", b"a", "can't be verified, model.safetensors has 1 bytes"),
        ("mixers.py", b"import os", "can't be verified, mixers.py has 9 bytes"),
        ("tokenizer.json", None, "can't be verified, tokenizer.json is missing: copy it again"),
        ("manifest.json", None, "can't be verified, manifest.json is missing: copy it again; if y"),
        ("manifest.json", b'{"files": {}}', "its manifest says nothing of config.json, tokenizer."),
        ("README.md", b"---\na: [\n---\n", "README.md: the Hub can't read its header (ParserError"),
        ("README.md", b"---\n- a\n---\n", "header (ValueError: repo card metadata block should be"),
        ("README.md", b"\xff", "README.md: the Hub can't read its header (UnicodeDecodeError"),
    ],
)
def test_what_is_not_whole_stays_here(
    final: Path, hub, capsys, name: str, content: bytes | None, words: str
) -> None:
    (final / name).unlink() if content is None else (final / name).write_bytes(content)
    for more in ([], ["--dry-run"]):
        is_refused([final, "me/model", *more], capsys, words)
    assert not hub.made and not hub.sent


def test_other_mistakes(final: Path, hub, tmp_path: Path, capsys, monkeypatch) -> None:
    is_refused([tmp_path / "no", "me/model"], capsys, f"checkpoint ({tmp_path}/no) does not exist")
    (tmp_path / "empty").mkdir()
    is_refused([tmp_path / "empty", "me/model"], capsys, "holds no config.json")
    is_refused([final], capsys, "the following arguments are required: NAME")
    final.rename(tmp_path / "run/best")
    words = (
        f"is a run without final/: finish it, or name the checkpoint itself ({tmp_path}/run/best"
    )
    is_refused([tmp_path / "run", "me/model"], capsys, words)
    assert cli.run(main, [str(tmp_path / "run/best"), "me/model"]) == 0
    capsys.readouterr()
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr("retnet.checkpoints.push.get_token", lambda: None)
    words = "NAME (me/model) needs an account on the Hub, and there is no token: run hf auth login"
    is_refused([tmp_path / "run/best", "me/model"], capsys, words)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (httpx.ConnectError("no route"), "the Hub cannot be reached (ConnectError: no route): con"),
        (OfflineModeIsEnabled("offline"), "the Hub cannot be reached (OfflineModeIsEnabled: offl"),
        (TimeoutError(), "the Hub cannot be reached (TimeoutError): connect to the network"),
        (401, "the Hub refuses it (not yours): correct the name, or log in with a token that may"),
        (503, "the Hub cannot be reached (HfHubHTTPError: not yours"),
    ],
)
def test_a_hub_that_gives_nothing(final: Path, hub, capsys, error, words: str) -> None:
    if isinstance(error, int):
        response = httpx.Response(error, request=httpx.Request("POST", "https://hub"))
        error = HfHubHTTPError("not yours\nmore", response=response)
    hub.error = error
    assert cli.run(main, [str(final), "me/model"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: NAME (me/model): ") and words in line, line
    assert not hub.sent
