"""metrics.jsonl and other trackers: what fails in them is said in one line."""

import json
import math
from pathlib import Path

import pytest
from accelerate.tracking import TensorBoardTracker, WandBTracker

from retnet.checkpoints.format import METRICS
from retnet.errors import UserError
from retnet.training.tracking import MetricsFile
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


def test_a_wandb_mode_that_is_none(options, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "foo")
    assert run([*options, "train.trackers=[wandb]"]) == 2
    assert capsys.readouterr().err.startswith("error: WANDB_MODE (foo) must be one of online, ")
    assert not (tmp_path / "run").exists()
    assert run(options, train__max_steps=2) == 0  # without wandb it has no meaning


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
        fail_at(patch, TensorBoardTracker, "log", 7, no_space)  # in step 5, with two samples
        fail_at(patch, TensorBoardTracker, "finish", 1, no_space)
        assert run([*options, "train.trackers=[tensorboard]"]) == 2
    said = capsys.readouterr().err
    assert "train.trackers can't be closed (No space left on device)" in said
    error = said.splitlines()[-1]
    assert error.startswith(f"error: train.out_dir ({tmp_path / 'run'}) can't be written at step")
    assert "checkpoints/step_4 is the newest whole checkpoint" in error
    assert run(options) == 0


def line(step: object, loss: object = 1.0) -> bytes:
    return json.dumps({"step": step, "train/loss": loss}).encode()


@pytest.mark.parametrize(
    ("steps", "kept", "words"),
    [
        ([1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5], None),
        ([3, 4, 5], [3, 4, 5], None),  # begun with another run's checkpoint
        ([1, 900, 3, 4, 5], [1, 3, 4, 5], "1 are missing, 0 are there twice"),
        ([1, 5, 3, 4, 5], [1, 3, 4, 5], "1 are missing, 1 are there twice"),
        ([1, 2, 2, 3, 4, 5], [1, 2, 3, 4, 5], "0 are missing, 1 are there twice"),
        ([1, 3, 2, 4, 5], [1, 2, 3, 4, 5], "it is put in order"),
        ([1, 2, 3], [1, 2, 3], "2 are missing"),
    ],
)
def test_steps_out_of_their_place(
    tmp_path: Path, caplog, steps: list[int], kept: list[int], words: str | None
) -> None:
    (tmp_path / METRICS).write_bytes(b"".join(line(step) + b"\n" for step in steps))
    MetricsFile(tmp_path, 5).close()
    rows = [json.loads(row) for row in (tmp_path / METRICS).read_bytes().splitlines()]
    assert [row["step"] for row in rows] == kept
    assert len(caplog.records) == (words is not None)
    assert (words or "") in caplog.text


def test_a_damaged_line_of_the_metrics_is_left_out(tmp_path: Path, caplog) -> None:
    """Alone: the good ones after it stay. What an interruption cut off is no damage."""
    good = [json.dumps({"step": step, "train/loss": 9.0 - step}).encode() for step in range(1, 8)]
    bad = [b"\xff\xfe", b'{"train/loss": 1.0}', b'{"step": 2}', b"[]", b"", good[1][:-4],
           line(2).decode().encode("utf-16"), b'{"a": "\xed\xa0\x80", ' + line(2)[1:],
           b"[" * 100_000, line(3.5), line(True), line(-2), line(2, "1.0"), line(2, 10**400),
           line(2, math.nan)]  # fmt: skip
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


def test_a_tracker_that_can_not_be_started_leaves_no_folder(
    options, tmp_path: Path, capsys, monkeypatch
) -> None:
    def refused(self) -> None:
        raise RuntimeError("Run ID cannot contain a slash")

    monkeypatch.setattr(WandBTracker, "start", refused)
    assert run([*options, "train.trackers=[wandb]"]) == 2
    assert "can't be started (Run ID cannot" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_last_evaluation_is_known_when_a_run_goes_on(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path, 0)
    assert file.evaluation is None
    rows = [{"step": step, "train/loss": 1.0} for step in (1, 2, 3)]
    rows[1]["val/loss"] = 2.0
    for row, known in zip(rows, (None, rows[1], rows[1]), strict=True):
        file.write(row)
        assert file.evaluation == known
    file.close()
    for step, known in ((3, rows[1]), (2, rows[1]), (1, None)):
        file = MetricsFile(tmp_path, step)
        file.close()
        assert file.evaluation == known


@pytest.mark.parametrize("write", ["write", "sync"])
def test_another_run_in_the_place_of_one_that_was_moved_away(tmp_path: Path, write: str) -> None:
    """As by Ctrl-Z, mv, a new run, fg: checkpoints would have gone among the other run's."""
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    file = MetricsFile(run_folder, 0)
    file.write({"step": 1, "train/loss": 1.0})
    run_folder.rename(tmp_path / "old")
    run_folder.mkdir()
    (run_folder / METRICS).write_text("")
    with pytest.raises(UserError, match=r"run\) is another run's folder now, this run's was moved"):
        file.write({"step": 2, "train/loss": 1.0}) if write == "write" else file.sync()
    file.close()
    assert (run_folder / METRICS).read_text() == ""


def test_losses_beyond_float32_are_none_that_a_run_wrote(tmp_path: Path, caplog) -> None:
    """The mean of them is beyond all numbers."""
    (tmp_path / METRICS).write_bytes(b"".join(line(i, 1.7e308) + b"\n" for i in range(1, 26)))
    file = MetricsFile(tmp_path, 25)
    file.close()
    assert file.losses == [] and "line 1 can't be read and is left out" in caplog.text
