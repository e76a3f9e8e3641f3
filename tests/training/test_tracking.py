"""metrics.jsonl and other trackers: what fails in them is said in one line."""

from pathlib import Path

import pytest
from accelerate.tracking import TensorBoardTracker, WandBTracker

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
