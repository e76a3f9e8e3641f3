"""python -m retnet.serve: what it starts with, what it refuses, how it ends."""

import importlib.util
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from retnet import cli
from retnet.errors import UserError
from retnet.serve import __main__ as command
from tests.generation.builders import save_checkpoint


@pytest.fixture
def with_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the packages were there: what is refused is so before they are used."""
    monkeypatch.setattr(command, "NEEDED", ())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("runs") / "tiny" / "final").parent


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert cli.run(command.main, [*map(str, arguments)]) == cli.EXIT_USER_ERROR
    return capsys.readouterr().err.removeprefix("error: ").strip()


def test_a_port_in_use(tiny: Path, with_packages: None, capsys) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        number = other.getsockname()[1]
        assert refused(capsys, tiny, "--port", number) == (
            f"--port ({number}) is in use at 127.0.0.1: name another one, or 0 for any that is free"
        )


def test_two_that_start_at_once() -> None:
    """While one still loads its model, its port is in use."""
    with command.bound_socket("127.0.0.1", 0) as listening:
        number = listening.getsockname()[1]
        with pytest.raises(UserError, match=rf"--port \({number}\) is in use at 127\.0\.0\.1"):
            command.bound_socket("127.0.0.1", number)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "70000"], "argument --port: 70000 must be a whole number from 0 to 65535"),
        (["--port", "-1"], "argument --port: -1 must be a whole number from 0 to 65535"),
        (["--port", "http"], "argument --port: 'http' must be a whole number"),
        (["--host", "192.0.2.1", "--port", "0"], "--host (192.0.2.1) is no address of this"),
        (["--host", "", "--port", "0"], "--host () is no address of this machine (it is empty)"),
        (["--name", ""], "--name ('') is empty"),
        (["--device", "nonsense"], "--device (nonsense) cannot be used"),
    ],
)
def test_arguments(tiny: Path, with_packages: None, capsys, arguments: list, words: str) -> None:
    assert refused(capsys, tiny, *arguments).startswith(words)


def test_folders_that_are_no_checkpoint(tmp_path: Path, with_packages: None, capsys) -> None:
    assert refused(capsys, tmp_path / "none", "--port", 0).startswith(f"checkpoint ({tmp_path}")
    assert "holds no config.json" in refused(capsys, tmp_path, "--port", 0)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert "model_type (gpt2)" in refused(capsys, tmp_path, "--port", 0)


def test_packages_that_are_missing(tiny: Path, capsys, monkeypatch) -> None:
    find = importlib.util.find_spec

    def without(name: str, *more: object) -> object:
        return None if name in ("fastapi", "openai") else find(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    message = refused(capsys, tiny)
    assert "there is no fastapi and no " in message and "pip install fastapi" in message


def test_what_a_request_calls_the_model(tiny: Path, with_packages: None, monkeypatch) -> None:
    served = []
    monkeypatch.setattr(command, "serve", lambda own, name, listening: served.append(name))
    assert cli.run(command.main, [str(tiny), "--port", "0"]) == 0
    assert cli.run(command.main, [str(tiny / "final"), "--port", "0", "--name", "mine"]) == 0
    assert served == ["tiny", "mine"]


@pytest.mark.parametrize(
    ("host", "where", "alone"),
    [("127.0.0.1", "127.0.0.1", True), ("::1", "[::1]", True), ("0.0.0.0", "0.0.0.0", False)],
)
def test_where_it_answers_and_for_whom(host: str, where: str, alone: bool, monkeypatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(command.logger, "info", said.append)
    monkeypatch.setattr(command.logger, "warning", said.append)
    command.say_where("tiny", host, 8000)
    assert said[0] == f"tiny answers at http://{where}:8000/v1 (Ctrl-C ends)"
    rest = [] if alone else [f"whoever reaches {where}:8000 can use it: there are no keys"]
    assert said[1:] == rest


@pytest.mark.slow
def test_it_answers_until_ctrl_c(tiny: Path) -> None:
    openai = pytest.importorskip("openai", reason="needs the packages of the extra serve")
    pytest.importorskip("uvicorn", reason="needs the packages of the extra serve")
    pytest.importorskip("fastapi", reason="needs the packages of the extra serve")
    start = [sys.executable, "-m", "retnet.serve", str(tiny), "--port", "0"]
    with subprocess.Popen(
        start, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stderr and server.stdout
        line = server.stderr.readline()
        assert line.startswith("tiny answers at http://127.0.0.1:"), line
        client = openai.OpenAI(base_url=line.split()[3], api_key="none", max_retries=0)
        assert client.completions.create(model="tiny", prompt="ab").usage.completion_tokens == 16
        long = {"model": "tiny", "prompt": "ab", "max_tokens": 10**6, "stream": True}
        stream = client.completions.create(**long)
        next(iter(stream))
        server.send_signal(signal.SIGINT)  # while a text is being made
        assert server.wait(timeout=30) == cli.EXIT_INTERRUPTED
        rest = server.stderr.read()
        assert "Traceback" not in rest and rest.endswith("interrupted\n")
        assert server.stdout.read() == ""
