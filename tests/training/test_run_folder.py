"""A finished run's folder that lost something: nothing that is left in it gets lost too."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.test_mistakes import tree
from tests.training.test_faults import bound_by_permissions, flip_a_bit
from tests.training.test_resume import error_line, step_in
from tests.training.test_train import TINY, metrics, run, weights


def is_refused(folder: Path, options: list[str], capsys, words: str, **changes: object) -> None:
    before = tree(folder)
    assert run(options, **changes) == 2
    line = error_line(capsys)
    assert words in line, line
    assert tree(folder) == before


def test_checkpoints_that_can_not_be_listed(options, finished: Path, capsys) -> None:
    """Nobody knows what is there: not the moment to begin at step 0."""
    folder = finished / "checkpoints"
    for change in ({"train__max_steps": 8}, {"train__resume": "never"}):
        folder.chmod(0)
        try:
            with bound_by_permissions():
                assert run(options, **change) == 2
        finally:
            folder.chmod(0o755)
        assert f"{folder} can't be read (Permission denied)" in error_line(capsys)
    assert len(metrics(finished)) == 6
    shutil.rmtree(folder)
    folder.touch()
    is_refused(finished, options, capsys, f"{folder} is no folder, as a run", train__max_steps=8)


def test_a_folder_with_the_name_of_no_step(options, finished: Path) -> None:
    (finished / "checkpoints/step_\u00b2").mkdir()
    assert run(options, train__max_steps=8) == 0
    assert step_in(finished / "final") == 8


def test_an_end_without_checkpoints(options, finished: Path, capsys) -> None:
    shutil.rmtree(finished / "checkpoints")
    words = f"train.out_dir ({finished}) has final/ and no checkpoint in checkpoints/"
    is_refused(finished, options, capsys, words, train__max_steps=8)
    assert run(options) == 0
    assert "is finished (6 steps)" in capsys.readouterr().err
    flip_a_bit(finished / "final")
    is_refused(finished, options, capsys, words)


def test_a_run_killed_before_its_first_checkpoint_begins_again(options, finished: Path) -> None:
    shutil.rmtree(finished / "checkpoints")
    shutil.rmtree(finished / "final")
    assert run(options) == 0
    assert [row["step"] for row in metrics(finished)] == [1, 2, 3, 4, 5, 6]


def test_fewer_steps_than_are_done(options, finished: Path, tmp_path: Path, capsys) -> None:
    checkpoint = finished / "checkpoints/step_6"
    words = f"train.max_steps (4) is less than the 6 steps of checkpoint ({checkpoint})"
    named = {"train__resume": checkpoint, "train__out_dir": tmp_path / "b", "train__max_steps": 4}
    is_refused(finished, options, capsys, words, **named)
    assert not (tmp_path / "b").exists()
    assert run(options, train__max_steps=4) == 0
    assert "is finished (6 steps): nothing to do" in capsys.readouterr().err
    shutil.rmtree(finished / "final")
    is_refused(finished, options, capsys, words, train__max_steps=4)
    assert run(options, train__max_steps=6) == 0
    assert step_in(finished / "final") == 6


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def without_files(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"files": {}}')


@pytest.mark.parametrize("damage", [without_weights, flip_a_bit, without_files])
def test_a_damaged_end_is_written_again(
    options, finished: Path, capsys, damage: Callable[[Path], object]
) -> None:
    expected, rows = weights(finished / "best"), (finished / "metrics.jsonl").read_bytes()
    damage(finished / "final")
    assert run(options) == 0
    printed = capsys.readouterr().err
    assert f"checkpoint ({finished / 'final'}) is damaged" in printed
    found = weights(finished / "final")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert (finished / "set-aside-final").is_dir()
    assert (finished / "metrics.jsonl").read_bytes() == rows
    assert run(options) == 0
    assert "nothing to do" in capsys.readouterr().err


def test_a_checkpoint_that_was_renamed(options, finished: Path, capsys) -> None:
    """The state counts: what is gone on from is not said to be left."""
    shutil.rmtree(finished / "final")
    (finished / "checkpoints/step_6").rename(finished / "checkpoints/step_7")
    assert run(options, train__max_steps=8) == 0
    printed = capsys.readouterr().err
    words = "checkpoints/step_7 is of step 6, whatever its name: it is kept as set-aside-step_7"
    assert words in printed and "is not gone on from" not in printed
    assert [row["step"] for row in metrics(finished)] == [*range(1, 9)]


def test_a_manifest_without_files_makes_no_whole_checkpoint(
    options, finished: Path, tmp_path: Path, capsys
) -> None:
    newest = finished / "checkpoints/step_6"
    without_files(newest)
    named = {"train__resume": newest, "train__out_dir": tmp_path / "b"}
    is_refused(finished, options, capsys, "is no whole checkpoint, manifest.json says", **named)
    for name in ("manifest.json", "training_state.json"):  # of the same weights, after step 6
        (newest / name).write_bytes((finished / "best" / name).read_bytes())
    assert run(options, train__max_steps=8) == 0
    printed = capsys.readouterr().err
    assert "manifest.json says nothing of optimizer.safetensors: going back to step_4" in printed


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_metrics_that_are_no_file(options, finished: Path, capsys, make) -> None:
    """A pipe was waited for without end."""
    file = finished / "metrics.jsonl"
    file.unlink()
    make(file)
    words = f"{file} is no file, as a run has it there: move it away"
    is_refused(finished, options, capsys, words, train__max_steps=8)


@pytest.mark.parametrize("left", ["checkpoints", "final"])
def test_a_folder_without_its_configuration(options, finished: Path, capsys, left: str) -> None:
    (finished / "config.yaml").unlink()
    shutil.rmtree(finished / {"checkpoints": "final", "final": "checkpoints"}[left])
    other = {"model__norm": "rmsnorm", "train__max_steps": 8}
    is_refused(finished, options, capsys, "holds a run without its config.yaml", **other)
    if left == "checkpoints":
        newest = finished / "checkpoints/step_6"
        is_refused(finished, options, capsys, f"go on by train.resume={newest}, or set another")
        assert run(options, train__max_steps=8, train__resume=newest) == 0
        assert (finished / "config.yaml").is_file()


@pytest.mark.parametrize(
    "content", ["train: [", "train:\n  max_steps: many\n", "train:\n  keep: 0\n"]
)
def test_a_damaged_configuration_is_named(options, finished: Path, capsys, content: str) -> None:
    (finished / "config.yaml").write_text(content)
    words = f"{finished / 'config.yaml'}, the configuration of the run in train.out_dir, is damaged"
    is_refused(finished, options, capsys, words)


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "config.yaml", "diverged.json"])
def test_a_link_where_a_run_writes(options, finished: Path, tmp_path, capsys, name: str) -> None:
    """What it leads to would have been rewritten, all of it as damaged lines."""
    victim = tmp_path / "mine.txt"
    victim.write_text("important\n")
    (finished / name).unlink(missing_ok=True)
    (finished / name).symlink_to(victim)
    is_refused(finished, options, capsys, f"{finished / name} is a link, and a run writes there")
    assert victim.read_text() == "important\n"


def test_a_manifest_that_is_a_pipe(options, finished: Path, capsys) -> None:
    """It was waited for without end; the checkpoint before it is whole."""
    manifest = finished / "checkpoints/step_6/manifest.json"
    manifest.unlink()
    os.mkfifo(manifest)
    assert run(options, train__max_steps=8) == 0
    assert "manifest.json cannot be read: going back to step_4" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["checkpoints", "best", "final"])
def test_a_link_to_nothing(options, tmp_path: Path, capsys, name: str) -> None:
    """A disk that is not there was noticed at the first checkpoint."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "nowhere/at_all")
    before = tree(tmp_path / "run")
    assert run(options) == 2
    assert f"{tmp_path / 'run' / name} is a link to nothing: restore" in error_line(capsys)
    assert tree(tmp_path / "run") == before


def test_metrics_that_may_only_be_read(options, finished: Path, capsys) -> None:
    file = finished / "metrics.jsonl"
    file.chmod(0o444)
    before = tree(finished)
    with bound_by_permissions():
        assert run(options, train__max_steps=7) == 2
    assert error_line(capsys).startswith(f"error: {file} cannot be written (Permission denied)")
    assert tree(finished) == before


@pytest.mark.parametrize("resume", ["auto", "never", "named"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.yaml", None),
        ("config.yaml", "model:\n  hidden_size: 8\ndata:\n  seq_len: 8\ntrain:\n  seed: 1\n"),
        ("config.yaml", "trainer:\n  epochs: 3\n"),
        ("metrics.jsonl", '{"epoch": 1, "accuracy": 0.5}\n'),
        ("diverged.json", "[1]"),
        ("best/chapter.txt", "years of work"),
    ],
)
def test_what_others_keep_under_a_runs_names(
    options, finished: Path, tmp_path: Path, capsys, resume: str, name: str, content: str | None
) -> None:
    """A recipe named config.yaml beside its results lost its comments, another tool its metrics."""
    file = tmp_path / "mine" / name
    file.parent.mkdir(parents=True)
    file.write_text(Path(TINY).read_text() if content is None else content)
    if resume == "named":
        resume = str(finished / "checkpoints/step_4")
    options = [text for text in options if not text.startswith("train.out_dir=")]
    changes = {"train__resume": resume, "train__out_dir": tmp_path / "mine"}
    taken = f"train.out_dir ({tmp_path / 'mine'}) holds no run, and {tmp_path / 'mine'}"
    is_refused(tmp_path / "mine", options, capsys, taken, **changes)


def test_a_run_of_an_older_version_that_saved_nothing(options, tmp_path: Path) -> None:
    """Its configuration lacks the keys of since then, and is a run's all the same."""
    assert run(options, train__max_steps=2) == 0
    file = tmp_path / "run/config.yaml"
    lines = file.read_text().splitlines()
    new = ("adamw_learning_rate:", "decay_fraction:", "tuning_fraction:")
    older = [line for line in lines if not line.strip().startswith(new)]
    assert len(older) == len(lines) - len(new)
    for name in ("final", "best", "checkpoints"):
        shutil.rmtree(tmp_path / "run" / name, ignore_errors=True)
    file.write_text("\n".join(older) + "\n")
    assert run(options, train__max_steps=2) == 0
    assert (tmp_path / "run/final").is_dir()


def test_empty_files_are_no_loss(options, tmp_path: Path) -> None:
    """A run that was killed at its very start has left one; so has ``touch``."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").touch()
    assert run(options) == 0
    assert len(metrics(tmp_path / "run")) == 6
