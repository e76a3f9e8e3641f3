"""From an empty folder: what a person gets who installs the project and has no clone of it.

One environment is made for all tests here, which come in the order of a person's steps; the last
takes the package away again. It needs a package index and minutes.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SOURCES = ("setup.py", "pyproject.toml", "requirements.txt", "README.md", "LICENSE", "retnet",
           "retnet_commands.py", "configs")  # fmt: skip
Run = Callable[..., subprocess.CompletedProcess]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("empty")


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a program of an environment with nothing but the project, in an empty folder."""
    place = tmp_path_factory.mktemp("fresh")
    for name in SOURCES:  # a copy: building leaves files among the sources
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, place / name)
    subprocess.run([sys.executable, "-m", "venv", place / "env"], check=True)
    outside = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}

    def call(program: str, *arguments: str, code: int = 0) -> subprocess.CompletedProcess:
        command = [str(place / "env/bin" / program), *arguments]
        done = subprocess.run(command, cwd=folder, env=outside, capture_output=True, text=True)
        assert done.returncode == code, f"{command}: {done.stdout}{done.stderr}"
        return done

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


@pytest.mark.skipif(
    not (ROOT / "retnet/checkpoints/push.py").exists(), reason="there is no push yet"
)
def test_what_would_be_uploaded(run: Run, trained: str) -> None:
    listed = run("python", "-m", "retnet.checkpoints.push", trained, "me/model", "--dry-run")
    assert "model.safetensors" in listed.stdout + listed.stderr


def test_a_process_without_the_package(run: Run, trained: str, folder: Path) -> None:
    """The last one: it takes the package away."""
    final = f"{trained}/final"
    if "auto_map" not in json.loads((folder / final / "config.json").read_text()):
        run("python", "-m", "retnet.checkpoints.export", trained, "exported")
        final = "exported"
    run("pip", "uninstall", "--yes", "retnet-lm")
    run("python", "-c", "import retnet", code=1)
    program = (
        "from transformers import pipeline; "
        f"made = pipeline('text-generation', {final!r}, trust_remote_code=True); "
        "print(made('def ', max_new_tokens=4, return_full_text=True)[0]['generated_text'])"
    )
    assert run("python", "-c", program).stdout.startswith("def ")
