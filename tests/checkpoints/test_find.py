"""Which checkpoint a path means, and what is near where there is none."""

from pathlib import Path

import pytest

from retnet.checkpoints import find_checkpoint
from retnet.errors import UserError


def fake(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def test_a_run_folder_means_final_then_best_then_the_newest(tmp_path: Path) -> None:
    run = tmp_path / "run"
    fake(run / "checkpoints" / "step_9")
    newest = fake(run / "checkpoints" / "step_100")
    (run / "checkpoints" / "step_200.tmp").mkdir()
    assert find_checkpoint(run) == find_checkpoint(run / "checkpoints") == newest
    best = fake(run / "best")
    assert find_checkpoint(str(run)) == best
    final = fake(run / "final")
    assert find_checkpoint(run) == final
    assert find_checkpoint(newest) == newest


@pytest.mark.parametrize("name", ["final", "best", "checkpoints/step_9"])
def test_no_other_is_taken_for_one_that_lost_its_files(tmp_path: Path, name: str) -> None:
    """As a copy that was interrupted leaves it: other weights, and nothing would say so."""
    other = fake(tmp_path / "run/checkpoints/step_5")
    (tmp_path / "run" / name).mkdir(parents=True)
    words = rf"run/{name}\) holds no config\.json: checkpoints near it: .*{other.name}"
    with pytest.raises(UserError, match=words):
        find_checkpoint(tmp_path / "run")
    assert find_checkpoint(other) == other


def test_a_missing_path_lists_checkpoints_that_are_near(tmp_path: Path, monkeypatch) -> None:
    for name in ("tiny-retention", "tiny-attention"):
        fake(tmp_path / "runs" / name / "final")
    monkeypatch.chdir(tmp_path)
    for wrong in ("runs/tiny-retenton/final", "runs/tiny-retenton", "tiny-retention"):
        with pytest.raises(UserError, match=r"near it: runs/tiny-retention/final, runs/tiny-att"):
            find_checkpoint(wrong)
    with pytest.raises(UserError, match=r"near it: runs/tiny-attention/final, runs/tiny-ret"):
        find_checkpoint("runs")
    (tmp_path / "runs" / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no config.json: checkpoints near it: "):
        find_checkpoint("runs/empty")


def test_a_long_list_is_cut(tmp_path: Path) -> None:
    for number in range(9):
        fake(tmp_path / "runs" / f"run{number}" / "final")
    with pytest.raises(UserError, match=r" and 4 more$"):
        find_checkpoint(tmp_path / "runs" / "run")


def test_nothing_near(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not exist: train a model"):
        find_checkpoint(tmp_path / "a" / "b")


def test_a_file_is_no_checkpoint(tmp_path: Path) -> None:
    final = fake(tmp_path / "run/final")
    for place, words in (
        (final, r"its folder \("),
        (tmp_path, "a checkpoint or run folder; check"),
    ):
        (place / "model.safetensors").touch()
        with pytest.raises(UserError, match=f"is a file: name {words}"):
            find_checkpoint(place / "model.safetensors")
