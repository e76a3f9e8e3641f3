"""Each tracker for real, where it is installed: what it keeps of a run that goes on later."""

import importlib
import importlib.util
import re
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from retnet.training import trackers
from retnet.training.spec import TRACKERS
from tests.training.test_train import run

Kept = tuple[list[int], str, str]  # steps of the losses, all texts, all that is configuration


def of_wandb(folder: Path) -> Kept:
    folders = sorted((folder / "wandb").glob("offline-run-*"))
    assert len({file.name for path in folders for file in path.glob("*.wandb")}) == 1, "two runs"
    until = time.monotonic() + 30  # a process of wandb's own writes, also after the run's end
    steps: set[int] = set()
    while len(steps) < 4 and time.monotonic() < until:
        content = b"".join(file.read_bytes() for path in folders for file in path.glob("*.wandb"))
        steps = {int(number) for number in re.findall(rb"_step\x82\x01.([0-9])", content)}
    text = content.decode(errors="replace")
    return sorted(steps), text, text


def of_tensorboard(folder: Path) -> Kept:
    module = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    sizes = {name: 0 for name in ("scalars", "tensors")}
    events = module.EventAccumulator(str(folder / "retnet"), size_guidance=sizes).Reload()
    steps = [event.step for event in events.Scalars("train/loss")]
    (tag,) = (tag for tag in events.Tags()["tensors"] if tag.startswith("val/sample"))
    texts = [event.tensor_proto.string_val[0].decode() for event in events.Tensors(tag)]
    files = (folder / "retnet").rglob("hparams.yml")
    settings = "".join(file.read_text() for file in files)
    return steps, "val/sample" * bool("".join(texts)), settings + " ".join(events.Tags()["scalars"])


def of_database(path: Path, query: str) -> list[Any]:
    return sqlite3.connect(path).execute(query).fetchall()


def of_trackio(folder: Path) -> Kept:
    (path,) = (folder / "trackio").glob("*.db")
    rows = of_database(path, "SELECT run_name, step, metrics FROM metrics ORDER BY id")
    assert {name for name, _, _ in rows} == {"run"}
    steps = [step for _, step, metrics in rows if "train/loss" in str(metrics)]
    settings = str(of_database(path, "SELECT * FROM configs"))
    return steps, str(rows), settings + str(rows)


def of_mlflow(folder: Path) -> Kept:
    path = folder / "mlflow/mlflow.db"
    assert len(of_database(path, "SELECT * FROM runs")) == 1
    rows = of_database(path, "SELECT step FROM metrics WHERE key = 'train/loss' ORDER BY step")
    texts = [str(file) for file in folder.rglob("step_*.txt") if file.read_text()]
    settings = of_database(path, "SELECT key, value FROM params UNION SELECT key, '' FROM metrics")
    return [step for (step,) in rows], " ".join(texts), str(settings)


def of_aim(folder: Path) -> Kept:
    """Opened as to go on: what only reads waits for the index that ``aim up`` makes."""
    aim = importlib.import_module("aim")
    repo = aim.Repo.from_path(str(folder))
    (name,) = repo.list_all_runs()
    quiet = {"system_tracking_interval": None, "capture_terminal_logs": False}
    found = aim.Run(name, repo=repo, force_resume=True, **quiet)
    steps = {metric.name: [*map(int, metric.data.numpy()[0])] for metric in found.metrics()}
    texts = [name for name, *_ in found.iter_sequence_info_by_type(("aim.text",))]
    settings = f"{found['hparams']} {[*steps]}"
    found.close()
    return steps["train/loss"], str(texts), settings


READERS: dict[str, Callable[[Path], Kept]] = {
    "wandb": of_wandb, "tensorboard": of_tensorboard, "trackio": of_trackio,
    "mlflow": of_mlflow, "aim": of_aim,
}  # fmt: skip


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_keeps_a_run_that_goes_on(
    name: str, options, tmp_path: Path, capsys, monkeypatch
) -> None:
    pytest.importorskip(name)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    options = [*options, f"train.trackers=[{name}]", "train.schedule=constant"]
    assert run(options, train__max_steps=2) == 0
    assert run(options, train__max_steps=4) == 0
    captured = capsys.readouterr()
    assert not captured.out and "finished 4 steps" in captured.err
    assert trackers.TRACKERS[name].hint(tmp_path / "run") in captured.err
    steps, texts, settings = READERS[name](tmp_path / "run")
    assert steps == [1, 2, 3, 4]
    assert "val/sample" in texts
    assert "1/(1-decay)" in settings and "train.learning_rate" in settings
    assert "perf/peak_memory_bytes" in settings


def test_wandb_goes_on_in_the_newest_run(tmp_path: Path, monkeypatch) -> None:
    """With the network it may be gone there; offline nobody is asked."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    own, folder = trackers.TRACKERS["wandb"], tmp_path / "run"
    new = {"mode": "offline", "dir": str(folder), "name": "run"}
    assert own.options(folder, 3) == new  # it had none
    for name in ("offline-run-20260101_000000-one/run-one", "run-20260102_000000-a-b-1/run-a-b"):
        made = folder / "wandb" / f"{name}.wandb"
        made.parent.mkdir(parents=True)
        made.touch()
    assert own.options(folder, 0) == new
    assert own.options(folder, 3) == new | {"id": "a-b"}
    assert f"wandb sync {folder}/wandb/" in own.hint(folder)
    monkeypatch.setenv("WANDB_MODE", "online")
    online = new | {"mode": "online", "settings": {"init_timeout": trackers.NETWORK_WAIT_S}}
    assert own.options(folder, 0) == online
    assert own.options(folder, 3) == online | {"id": "a-b", "resume": "allow"}
    assert own.hint(folder) == ""


def test_every_tracker_has_its_place() -> None:
    assert tuple(trackers.TRACKERS) == TRACKERS == tuple(READERS)


def test_one_that_is_not_installed(options, tmp_path: Path, capsys, monkeypatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda one, *more: None if one == "mlflow" else real(one, *more)
    )
    assert run([*options, "train.trackers=[mlflow]"]) == 2
    line = "error: train.trackers (mlflow) is not installed: pip install mlflow"
    assert capsys.readouterr().err.splitlines()[-1] == line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "variable"),
    [("trackio", "TRACKIO_SPACE_ID"), ("trackio", "TRACKIO_SERVER_URL"),
     ("mlflow", "MLFLOW_TRACKING_URI"), ("mlflow", "MLFLOW_RUN_ID")],
)  # fmt: skip
def test_one_that_would_write_elsewhere(
    name: str, variable: str, options, tmp_path: Path, capsys, monkeypatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda one, *more: one == name or real(one, *more)
    )
    monkeypatch.setenv(variable, "https://tracker.example")
    assert run([*options, f"train.trackers=[{name}]"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(
        f"error: {variable} (https://tracker.example) would have train.trackers"
    )
    assert not (tmp_path / "run").exists()
    assert run(options, train__max_steps=2) == 0  # without the tracker it has no meaning
