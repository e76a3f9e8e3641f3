"""What goes to the Hub and what stays; nothing goes without being asked for."""

import json
import logging
import shutil
import socket
import threading
from base64 import b64decode
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi, constants

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
def hub(monkeypatch) -> Iterator[SimpleNamespace]:
    """A server that answers as the Hub does, of what huggingface_hub asks in an upload."""
    asked = SimpleNamespace(made=[], sent={}, status=200)

    class Answers(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            assert self.headers["authorization"] == "Bearer hf_abc"
            status, answer = 200, {"errors": [], "warnings": []}  # of /api/validate-yaml
            if self.path == "/api/repos/create":
                status, answer = asked.status, {"url": f"{constants.ENDPOINT}/me/model"}
                asked.made.append(json.loads(body))
            elif self.path == "/api/models/me/model/preupload/main":
                paths = [file["path"] for file in json.loads(body)["files"]]
                mode = {"uploadMode": "regular", "shouldIgnore": False}
                answer = {"files": [{"path": path} | mode for path in paths]}
            elif self.path == "/api/models/me/model/commit/main":
                for entry in map(json.loads, body.splitlines()):
                    if entry["key"] == "file":
                        content = b64decode(entry["value"]["content"])
                        asked.sent[entry["value"]["path"]] = content
                answer = {"commitUrl": f"{constants.ENDPOINT}/me/model/commit/1", "commitOid": "1"}
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_abc")
    yield asked
    server.shutdown()
    server.server_close()


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
    assert hub.sent.keys() == listed(printed.out).keys() >= PARTS
    assert all((final / name).read_bytes() == content for name, content in hub.sent.items())
    (made,) = hub.made
    assert made["name"] == "model" and ("private" in str(made)) is private
    assert printed.out.endswith("/me/model/commit/1\n") and not printed.err


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
    assert "a[bc].safetensors" in hub.sent and "ab.safetensors" not in hub.sent


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
    ("trouble", "words"),
    [
        ("nobody", "the Hub cannot be reached (ConnectError: "),
        ("silence", "the Hub cannot be reached (TimeoutError): connect to the network"),
        ("offline", "the Hub cannot be reached (OfflineModeIsEnabled: "),
        (401, "the Hub refuses it ("),
        (503, "the Hub cannot be reached (HfHubHTTPError: "),
    ],
)
def test_a_hub_that_gives_nothing(
    final: Path, hub, monkeypatch, capsys, trouble: str | int, words: str
) -> None:
    if isinstance(trouble, int):
        hub.status = trouble
    elif trouble == "nobody":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    elif trouble == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        monkeypatch.setattr("retnet.data.network.DEADLINE_S", 0.1)
        monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: threading.Event().wait(2))
    assert cli.run(main, [str(final), "me/model"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: NAME (me/model): ") and words in line, line
    assert not hub.sent
