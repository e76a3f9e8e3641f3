"""Killed with SIGKILL and started again, a run is the run that was never interrupted."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training.conftest import as_options
from tests.training.test_train import TINY, metrics

STEPS = 20
Attempt = tuple[str | float | None, list[str]]


def drive(attempts: list[Attempt]) -> list[int]:
    """Exit codes of the attempts; -9 is SIGKILL."""
    command = [sys.executable, "-m", "tests.training.kill_driver", repr(attempts)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return [int(line) for line in result.stdout.split()]


@pytest.fixture
def arguments(options: list[str]):
    """Arguments of train.py for a run folder: accumulation, carried states, two epochs."""

    def make(out_dir: Path, **changes: object) -> list[str]:
        keys = {
            "train.max_steps": STEPS,
            "train.gradient_accumulation_steps": 2,
            "train.carry_state": "true",
            "train.eval_every": 5,
            "train.save_every": 3,
            "data.max_tokens": 1200,  # so that an epoch has six steps
            "train.out_dir": out_dir,
        }
        return [TINY, *options, *as_options(keys | changes)]

    return make


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, moments, carried states and metrics, bit for bit, and nothing left over."""
    assert metrics(one) == metrics(other)
    assert [row["step"] for row in metrics(one)] == list(range(1, STEPS + 1))
    folders = [f"checkpoints/step_{STEPS}", "best", "final"]
    for folder in folders:
        names = {file.name for file in (one / folder).iterdir()}
        assert names == {file.name for file in (other / folder).iterdir()}
        for name in sorted(names):
            if name.endswith(".safetensors"):
                a, b = load_file(one / folder / name), load_file(other / folder / name)
                assert a.keys() == b.keys()
                assert all(torch.equal(a[key], b[key]) for key in a), f"{folder}/{name}"
    trees = [sorted(p.relative_to(run) for p in run.rglob("*")) for run in (one, other)]
    assert trees[0] == trees[1]


def test_a_run_killed_in_each_phase_is_the_uninterrupted_run(arguments, tmp_path: Path) -> None:
    """Also twice in a row, and after the epoch's end."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    phases = ["data", "accumulation", "accumulation", "evaluation", "writing", "before renaming",
              "saved", "logged", "pruning"]  # fmt: skip
    attempts: list[Attempt] = [(phase, arguments(killed)) for phase in phases]
    attempts += [(None, arguments(killed)), (None, arguments(whole))]
    codes = drive(attempts)
    assert codes[:-2] == [-9] * len(phases)
    assert codes[-2:] == [0, 0]
    assert metrics(whole)[-1]["data/epoch"] > 1
    assert_same_run(killed, whole)


@pytest.mark.slow
def test_a_run_killed_at_25_random_moments_is_the_uninterrupted_run(
    arguments, tmp_path: Path
) -> None:
    rng = random.Random(0)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert drive([(None, arguments(whole))]) == [0]
    kills = 0
    while kills < 25:
        for code in drive([(rng.uniform(0.02, 0.9), arguments(killed)) for _ in range(10)]):
            kills += code == -9
            assert code in (-9, 0)
        final = drive([(None, arguments(killed))])
        assert final == [0]
        assert_same_run(killed, whole)
        if kills < 25:  # once more from the beginning
            killed = tmp_path / f"killed-{kills}"
