"""Damaged checkpoints, full disks, lost folders: one clear line, nothing good lost."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from retnet import cli
from retnet.checkpoints import save
from retnet.commands import compare, generate
from retnet.training import loop
from tests.permissions import bound_by_permissions
from tests.training.conftest import as_options
from tests.training.test_train import TINY, metrics, run, weights


def truncate(folder: Path) -> str:
    file = folder / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    return "optimizer.safetensors has"


def flip_a_bit(folder: Path) -> str:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    return "model.safetensors is not what was written, its checksum differs"


def remove_a_file(folder: Path) -> str:
    (folder / "tokenizer.json").unlink()
    return "tokenizer.json is missing"


def remove_the_manifest(folder: Path) -> str:
    (folder / "manifest.json").unlink()
    return "manifest.json is missing"


def spoil_the_manifest(folder: Path) -> str:
    (folder / "manifest.json").write_text("{")
    return "manifest.json cannot be read"


DAMAGES = [truncate, flip_a_bit, remove_a_file, remove_the_manifest, spoil_the_manifest]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    options, finished: Path, capsys, damage: Callable[[Path], str]
) -> None:
    expected = weights(finished / "final")
    shutil.rmtree(finished / "final")
    words = damage(finished / "checkpoints/step_6")
    assert run(options, train__resume=finished / "checkpoints/step_6") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: train.resume") and words in error and error.count("\n") == 1
    assert run(options, train__max_steps=6) == 0
    printed = capsys.readouterr().err
    assert f"checkpoint ({finished / 'checkpoints/step_6'}) is damaged, {words}" in printed
    assert "going back to step_4" in printed and "is kept as set-aside-step_6" in printed
    found = weights(finished / "final")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert [row["step"] for row in metrics(finished)] == [1, 2, 3, 4, 5, 6]
    names = {folder.name for folder in (finished / "checkpoints").iterdir()}
    assert names == {"step_4", "step_6", "set-aside-step_6"}


def test_all_checkpoints_damaged(options, finished: Path, capsys) -> None:
    shutil.rmtree(finished / "final")
    for folder in (finished / "checkpoints").iterdir():
        truncate(folder)
    assert run(options) == 2
    error = capsys.readouterr().err
    assert "step_6) is damaged" in error and "step_4) is damaged" in error
    assert "there is no whole one" in error and error.count("\n") == 1


def test_damaged_weights_are_not_generated_from(finished: Path, capsys) -> None:
    words = flip_a_bit(finished / "final")
    assert cli.run(generate.main, [str(finished)]) == 2
    assert words in capsys.readouterr().err
    (finished / "final/manifest.json").unlink()  # for whoever edits weights
    assert cli.run(generate.main, [str(finished), "--max-new-tokens", "1"]) == 0


def test_back_to_an_older_checkpoint(options, finished: Path, tmp_path: Path, capsys) -> None:
    """Named on purpose, it may go on with other options; what came after it is set aside."""
    older = finished / "checkpoints/step_4"
    assert run(options, train__resume=older, train__learning_rate=1e-4) == 0
    assert (finished / "checkpoints/set-aside-step_6").is_dir()
    assert metrics(finished)[-1]["optim/lr"] < 1e-4
    other = tmp_path / "other"
    assert run(options, train__out_dir=other) == 0
    capsys.readouterr()
    assert run(options, train__out_dir=other, train__resume=older) == 2
    assert "already holds a run, and train.resume" in capsys.readouterr().err


def fail_at(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, call: int, act) -> None:
    """Let ``act`` happen before the ``call``-th call of ``owner.name``."""
    real, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            act()
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)


def no_space() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("owner", "name", "call", "newest"),
    [
        (save, "save_file", 2, 2), (save, "write_manifest", 3, 2),
        (loop.MetricsFile, "write", 5, 4),
    ],
)  # fmt: skip
def test_a_full_disk(
    options,
    whole: Path,
    tmp_path: Path,
    capsys,
    monkeypatch,
    owner: object,
    name: str,
    call: int,
    newest: int,
) -> None:
    with monkeypatch.context() as patch:
        fail_at(patch, owner, name, call, no_space)
        assert run(options) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: train.out_dir ({tmp_path / 'run'}) can't be written at step")
    assert "(No space left on device)" in error and "the same command goes on" in error
    assert not list((tmp_path / "run").rglob(".unfinished*/*"))  # the space is given back
    assert run(options) == 0
    assert f"going on from {tmp_path}/run/checkpoints/step_{newest} " in capsys.readouterr().err
    assert metrics(tmp_path / "run") == metrics(whole)
    a, b = weights(tmp_path / "run/final"), weights(whole / "final")
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_file_that_may_not_grow(options, tmp_path: Path, capsys) -> None:
    """What the operating system and the libraries really do when a write fails half way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))

    try:
        with pytest.MonkeyPatch.context() as patch:
            fail_at(patch, save.states, "get_model_state_dict", 3, limit)
            assert run(options) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: train.out_dir") and "too large" in error.lower()
    assert "checkpoints/step_2 is the newest whole checkpoint" in error
    assert run(options) == 0
    assert f"going on from {tmp_path}/run/checkpoints/step_2 " in capsys.readouterr().err


@pytest.mark.parametrize("step", [4, 3])  # with an evaluation at its end: best/ comes first
def test_a_folder_removed_while_the_run_is_in_it(
    options, tmp_path: Path, capsys, step: int
) -> None:
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        fail_at(patch, loop.Trainer, "_step", step, lambda: shutil.rmtree(folder))
        assert run(options) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: train.out_dir") and "No such file or directory" in error
    assert "it has no checkpoint" in error
    assert not folder.exists()


def test_a_folder_that_can_not_be_made(options, capsys) -> None:
    assert run(options, train__out_dir="/proc/nowhere/run") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: train.out_dir (/proc/nowhere/run) can't be written")


@pytest.mark.parametrize("lock", [False, True])
def test_a_read_only_folder(options, finished: Path, capsys, lock: bool) -> None:
    if not lock:
        (finished / ".lock").unlink()
    before = sorted(finished.rglob("*"))
    finished.chmod(0o500)
    try:
        with bound_by_permissions():
            assert run(options, train__max_steps=8) == 2
    finally:
        finished.chmod(0o700)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: train.out_dir ({finished}) can't be written (Permission den")
    assert sorted(finished.rglob("*")) == before


def test_a_replaced_folder_comes_back(tmp_path: Path) -> None:
    """Killed between the two renames, best/ is only there under its temporary name."""
    old = tmp_path / ".unfinished-old-0123456789abcdef-best"
    old.mkdir()
    (old / "config.json").write_text("{}")
    (tmp_path / ".unfinished-0123456789abcdef-best").mkdir()
    (tmp_path / ".unfinished-0123456789abcdef-config.yaml").write_text("half")
    save.remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_a_longer_run_whose_end_was_lost_is_not_finished(options, finished: Path) -> None:
    def die() -> None:
        raise RuntimeError("power cut")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError):
        fail_at(patch, loop.Trainer, "_save", 3, die)  # best, step_8, final
        run(options, train__max_steps=8)
    assert (finished / "checkpoints/step_8").is_dir()
    assert run(options, train__max_steps=8) == 0
    assert json.loads((finished / "final/training_state.json").read_text())["step"] == 8


def test_no_code_of_a_checkpoint_is_run(options, finished: Path, tmp_path: Path, capsys) -> None:
    """Neither by generate.py and compare.py nor by training from its weights or tokenizer."""
    folder, mark = finished / "final", tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nraise SystemExit\n")
    (folder / "manifest.json").unlink()
    for name, keys in (
        ("config.json", {"AutoConfig": "evil.A", "AutoModelForCausalLM": "evil.B"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["evil.C", "evil.C"]}),
    ):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | {"auto_map": keys}))
    quick = ["--max-new-tokens", "1"]
    assert cli.run(generate.main, [str(folder), *quick]) == 0
    assert cli.run(compare.main, [str(folder), str(folder), "--no-speed"]) == 0
    # the weights themselves are no code
    other = {"model.init_from": folder, "data.tokenizer": folder, "train.out_dir": tmp_path / "b"}
    assert run([*options, *as_options(other)]) == 0
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"model_type": "evil"}))
    assert cli.run(generate.main, [str(folder)]) == 2
    assert cli.run(compare.main, [str(folder), str(folder)]) == 2
    assert run([*options, *as_options(other | {"train.out_dir": tmp_path / "c"})]) == 2
    assert "[y/N]" not in capsys.readouterr().out
    assert not mark.exists()


@pytest.mark.slow
def test_a_small_disk_in_a_process_of_its_own(options, tmp_path: Path) -> None:
    """RLIMIT_FSIZE from the outside, as a batch system sets it; then the limit is lifted."""
    program = [sys.executable, "train.py", TINY, *options]
    limited = f"ulimit -f 40; exec {' '.join(program)}"
    result = subprocess.run(["bash", "-c", limited], capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in result.stderr
    assert subprocess.run(program, capture_output=True, check=False).returncode == 0
