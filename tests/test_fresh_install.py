"""From an empty folder: what a person gets who installs the project and has no clone of it.

One environment is made for all tests here, which come in the order of a person's steps; the last
takes the package away again. It needs a package index and minutes.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.test_elsewhere import TASK

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SOURCES = ("setup.py", "pyproject.toml", "requirements.txt", "README.md", "LICENSE", "retnet",
           "retnet_commands.py", "configs")  # fmt: skip


class Run:
    """Programs of an environment with nothing but the project, started in an empty folder."""

    def __init__(self, project: Path, folder: Path) -> None:
        self.project, self.bin, self.folder = project, project / "env/bin", folder
        inside = ("PYTHONPATH", "VIRTUAL_ENV")
        self.env = {name: value for name, value in os.environ.items() if name not in inside}

    def __call__(self, program: str, *arguments: str, code: int = 0) -> subprocess.CompletedProcess:
        command = [str(self.bin / program), *arguments]
        done = subprocess.run(
            command, cwd=self.folder, env=self.env, capture_output=True, text=True, check=False
        )
        assert done.returncode == code, f"{command}: {done.stdout}{done.stderr}"
        return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("empty")


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    place = tmp_path_factory.mktemp("fresh")
    for name in SOURCES:  # a copy: building leaves files among the sources
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, place / name)
    subprocess.run([sys.executable, "-m", "venv", place / "env"], check=True)
    call = Run(place, folder)
    # of a torch that is not there yet, the one that CI runs: else a build of gigabytes comes
    call("pip", "install", str(place), "-c", str(ROOT / "constraints.txt"))
    return call


@pytest.fixture(scope="module")
def trained(run: Run, folder: Path) -> str:
    steps = ("train.max_steps=20", "train.eval_max_tokens=4096", "train.device=cpu")
    said = run("retnet-train", "tiny", "train.out_dir=run", "data.vocab_size=512", *steps).stderr
    assert "configuration (tiny) is no file here: it is the recipe " in said
    assert "site-packages/retnet/configs/tiny.yaml" in said and "finished 20 steps" in said
    return "run"


def test_the_package_is_whole(run: Run) -> None:
    shown = run("pip", "show", "-f", "retnet-lm").stdout
    assert "retnet/py.typed" in shown and "retnet/configs/tiny.yaml" in shown
    for name in ("train", "generate", "compare"):
        assert f"usage: retnet-{name} " in run(f"retnet-{name}", "--help").stdout
    error = run("retnet-train", "tyny", code=2).stderr
    assert error.startswith("error: configuration (tyny) is not a file") and "tiny, " in error


def test_train_generate_compare(run: Run, trained: str, folder: Path) -> None:
    text = run("retnet-generate", trained, "--prompt", "def ", "--max-new-tokens", "8").stdout
    assert text.startswith("def ") and len(text) > 5
    (folder / "some.txt").write_text("def state(head):\n    return head + 1\n" * 50)
    options = ("--text", "some.txt", "--no-speed", "--json", "a.json")
    table = run("retnet-compare", trained, f"{trained}/best", *options)
    assert "perplexity" in table.stdout
    assert len(json.loads((folder / "a.json").read_text())["models"]) == 2


def test_what_would_be_uploaded(run: Run, trained: str) -> None:
    listed = run("python", "-m", "retnet.checkpoints.push", trained, "me/model", "--dry-run")
    assert "model.safetensors" in listed.stdout + listed.stderr


CLIENT = """
import openai, sys
client = openai.OpenAI(base_url=sys.argv[1], api_key="none", max_retries=40)
(model,) = [one.id for one in client.models.list()]
asked = {"model": model, "prompt": "def ", "max_tokens": 8}
print(len(client.completions.create(**asked).choices[0].text), model)
parts = [part.choices[0].text for part in client.completions.create(**asked, stream=True)]
print(len("".join(parts)))
"""


def test_a_server_answers(run: Run, trained: str, folder: Path) -> None:
    run("pip", "install", f"{run.project}[serve]")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command = [str(run.bin / "python"), "-m", "retnet.serve", trained, "--port", port]
    with subprocess.Popen(command, cwd=folder, env=run.env, stderr=subprocess.DEVNULL) as server:
        try:
            printed = run("python", "-c", CLIENT, f"http://127.0.0.1:{port}/v1").stdout.splitlines()
        finally:
            server.send_signal(signal.SIGINT)
    assert int(printed[0].split()[0]) > 0 and printed[0].endswith("run") and int(printed[1]) > 0


def test_a_process_without_the_package(run: Run, trained: str, folder: Path) -> None:
    """And those after it: it takes the package away."""
    final = f"{trained}/final"
    run("pip", "uninstall", "--yes", "retnet-lm")
    run("python", "-c", "import retnet", code=1)
    program = (
        "from transformers import pipeline; "
        f"made = pipeline('text-generation', {final!r}, trust_remote_code=True); "
        "print(made('def ', max_new_tokens=4, return_full_text=True)[0]['generated_text'])"
    )
    assert run("python", "-c", program).stdout.startswith("def ")


def test_the_harness_without_the_package(run: Run, trained: str, folder: Path) -> None:
    """Its own command line, on the folder that the run left."""
    run("pip", "install", "lm_eval")
    (folder / "rows.jsonl").write_text(json.dumps({"text": "def state(head): return head"}))
    (folder / "task.yaml").write_text(TASK.replace("FILE", str(folder / "rows.jsonl")))
    arguments = f"pretrained={trained}/final,trust_remote_code=True,add_bos_token=False"
    own = ("--tasks", "own_text", "--include_path", ".", "--output_path", "found")
    run(
        "python",
        "-m",
        "lm_eval",
        "--model",
        "hf",
        "--model_args",
        arguments,
        "--device",
        "cpu",
        *own,
    )
    (file,) = (folder / "found").rglob("results*.json")
    found = json.loads(file.read_text())["results"]["own_text"]["bits_per_byte,none"]
    assert 0 < found < 20
