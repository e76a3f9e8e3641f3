"""metrics.jsonl and other trackers: what fails in them is said in one line."""

import json
from pathlib import Path

import pytest
from accelerate.tracking import TensorBoardTracker, WandBTracker

from retnet.training.tracking import METRICS, MetricsFile
from tests.training.test_faults import fail_at, no_space
from tests.training.test_train import run


def test_wandb_online_without_an_account(options, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run([*options, "train.trackers=[wandb]"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: WANDB_MODE (online) needs an account")
    assert not (tmp_path / "run").exists()


def test_wandb_that_can_not_be_started(options, capsys, monkeypatch) -> None:
    """Such as an account that is refused; the run's end must not hide why."""

    def refused(self) -> None:
        raise RuntimeError("the key is not valid")

    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(WandBTracker, "start", refused)
    assert run([*options, "train.trackers=[wandb]"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: train.trackers (wandb) can't be started (the key is not valid)")
    assert "WANDB_MODE (offline)" in error


def test_a_full_disk_in_a_tracker(options, tmp_path: Path, capsys) -> None:
    with pytest.MonkeyPatch.context() as patch:
        fail_at(patch, TensorBoardTracker, "log", 5, no_space)
        fail_at(patch, TensorBoardTracker, "finish", 1, no_space)
        assert run([*options, "train.trackers=[tensorboard]"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: train.out_dir ({tmp_path / 'run'}) can't be written at step")
    assert "checkpoints/step_4 is the newest whole checkpoint" in error
    assert run(options) == 0


def test_a_damaged_line_of_the_metrics_is_left_out(tmp_path: Path, caplog) -> None:
    """Alone: the good ones after it stay. What an interruption cut off is no damage."""
    good = [json.dumps({"step": step, "train/loss": 9.0 - step}).encode() for step in range(1, 8)]
    bad = [b"\xff\xfe", b'{"train/loss": 1.0}', b'{"step": 2}', b"[]", b"", good[1][:-4]]
    for damage in bad:
        lines = [good[0], damage, *good[2:6], good[6][:-3]]
        (tmp_path / METRICS).write_bytes(b"\n".join(lines))
        caplog.clear()
        metrics = MetricsFile(tmp_path, 5)
        metrics.close()
        assert metrics.losses == [8.0, 6.0, 5.0, 4.0]
        kept = (tmp_path / METRICS).read_bytes().splitlines()
        assert kept == [good[0], *good[2:5]]
        assert caplog.text.count("line 2 can't be read and is left out") == 1
        assert caplog.text.count("left out") == 1


def test_a_run_goes_on_after_damage_in_its_metrics(options, tmp_path: Path, capsys) -> None:
    constant = {"train__schedule": "constant"}
    assert run(options, **constant) == 0
    path = tmp_path / "run/metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], b"\xff\n", *lines[2:]]))
    assert run(options, **constant, train__max_steps=8) == 0
    assert f"{path} line 2 can't be read" in capsys.readouterr().err
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == [1, 3, 4, 5, 6, 7, 8]
