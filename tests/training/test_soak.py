"""Hours in minutes: memory stays flat however long text is generated or training goes on."""

import gc
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from retnet.generation import Sampling, generate
from tests.generation.builders import BOS, tiny_model
from tests.training.conftest import as_options

TOKENS = int(os.environ.get("SOAK_TOKENS", "1000000"))
MINUTES = float(os.environ.get("SOAK_MINUTES", "10"))


def resident() -> int:
    gc.collect()
    return psutil.Process().memory_info().rss


@pytest.mark.slow
def test_a_million_tokens_from_one_state() -> None:
    """Resident memory after the first 10,000 tokens and at the end differ by less than 1 %."""
    model = tiny_model("retention", dtype=torch.float32)
    tokens = generate(
        model, torch.tensor([[BOS]]), max_new_tokens=TOKENS, sampling=Sampling(seed=0)
    )
    readings = []
    count = 0
    for _ in tokens:
        count += 1
        if count % 10_000 == 0:
            readings.append(resident())
    assert count == TOKENS
    print(f"{count:,} tokens, {readings[0] / 1e6:.1f} MB at 10,000, {readings[-1] / 1e6:.1f} MB")
    assert max(readings) < 1.01 * readings[0]


@pytest.mark.slow
def test_training_with_flat_memory(options, tmp_path: Path) -> None:
    """Ten minutes of train.py with evaluations, samples and checkpoints, watched from outside.

    In a process of its own: under pytest's import hook every question of a library whether some
    other one is installed leaves strings behind, and accelerate asks in each optimizer step.
    """
    changes = {
        "train.max_steps": 10_000_000,
        "train.eval_every": 200,
        "train.save_every": 500,
        "train.log_every": 2000,
    }
    command = [sys.executable, "train.py", "configs/tiny.yaml", *options, *as_options(changes)]
    readings = []
    with subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}) as training:
        watched = psutil.Process(training.pid)
        end = time.monotonic() + 60 * MINUTES
        while time.monotonic() < end and training.poll() is None:
            time.sleep(MINUTES / 10)
            readings.append(watched.memory_info().rss)
        training.terminate()
    assert training.returncode == 143
    early = readings[len(readings) // 10 :]
    steps = len((tmp_path / "run" / "metrics.jsonl").read_bytes().splitlines())
    first, most = early[0] / 1e6, max(early) / 1e6
    print(f"{steps:,} steps, {first:.1f} MB after a tenth, {most:.1f} MB at most")
    assert most < 1.01 * first
