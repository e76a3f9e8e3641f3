"""Killed with SIGKILL and started again, a run is the run that was never interrupted."""

import json
import random
import re
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


def drive(attempts: list[Attempt]) -> tuple[list[int], list[int]]:
    """Exit codes of the attempts (-9 is SIGKILL), and the steps they went on from."""
    command = [sys.executable, "-m", "tests.training.kill_driver", repr(attempts)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    codes = [int(line) for line in result.stdout.split()]
    steps = re.findall(r"going on from \S+ \(step (\d+)\)", result.stderr)
    return codes, [int(step) for step in steps]


@pytest.fixture
def arguments(options: list[str]):
    """Arguments of train.py for a run folder: accumulation, dropout, more than two epochs."""

    def make(out_dir: Path, **changes: object) -> list[str]:
        keys = {
            "train.max_steps": STEPS,
            "train.gradient_accumulation_steps": 2,
            "train.eval_every": 5,
            "train.save_every": 3,
            "data.max_tokens": 1200,  # so that an epoch has six steps
            "train.out_dir": out_dir,
        }
        return [TINY, *options, *as_options(keys | changes)]

    return make


def progress(folder: Path) -> dict:
    state = json.loads((folder / "training_state.json").read_text())
    return {key: value for key, value in state.items() if key != "seconds"}


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, moments, carried states, progress and metrics to the bit; nothing left over."""
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
        assert progress(one / folder) == progress(other / folder)
    trees = [sorted(p.relative_to(run) for p in run.rglob("*")) for run in (one, other)]
    assert trees[0] == trees[1]


PLAIN = {"train.carry_state": "false"}
CARRYING = {"train.carry_state": "true"}
NEWER = CARRYING | {"train.optimizer": "muon", "train.precision": "bf16", "train.schedule": "wsd"}
kinds = pytest.mark.parametrize("changes", [PLAIN, CARRYING, NEWER], ids=["plain", "carry", "muon"])


@pytest.mark.parametrize(
    "changes",
    [CARRYING, *(pytest.param(changes, marks=pytest.mark.slow) for changes in (PLAIN, NEWER))],
    ids=["carry", "plain", "muon"],
)
def test_a_run_killed_in_each_phase_is_the_uninterrupted_run(
    arguments, tmp_path: Path, changes: dict
) -> None:
    """Also twice in a row, and after the epoch's end; each goes on from the newest checkpoint."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    phases = ["data", "accumulation", "accumulation", "evaluation", "writing", "before renaming",
              "saved", "configuration", "metrics", "logged", "pruning", "replacing best",
              "final"]  # fmt: skip
    attempts: list[Attempt] = [(phase, arguments(killed, **changes)) for phase in phases]
    attempts += [(None, arguments(killed, **changes)), (None, arguments(whole, **changes))]
    codes, steps = drive(attempts)
    assert codes[:-2] == [-9] * len(phases)
    assert codes[-2:] == [0, 0]
    assert steps == [3, 3, 3, 6, 6, 6, 9, 12, 12, 20]  # from "writing" on
    assert metrics(whole)[-1]["data/epoch"] > 1
    assert_same_run(killed, whole)


@pytest.mark.slow
@kinds
def test_a_run_killed_at_25_random_moments_is_the_uninterrupted_run(
    arguments, tmp_path: Path, changes: dict
) -> None:
    rng = random.Random(0)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert drive([(None, arguments(whole, **changes))]) == ([0], [])
    kills, went_on = 0, 0
    while kills < 25:
        codes, steps = drive(
            [(rng.uniform(0.02, 0.9), arguments(killed, **changes)) for _ in range(10)]
        )
        assert set(codes) <= {-9, 0}
        kills += codes.count(-9)
        went_on += len(steps)
        codes, steps = drive([(None, arguments(killed, **changes))])
        assert codes == [0]
        went_on += len(steps)
        assert_same_run(killed, whole)
        if kills < 25:  # once more from the beginning
            killed = tmp_path / f"killed-{kills}"
    assert went_on > 0  # not always from the beginning
