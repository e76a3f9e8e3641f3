"""Hours in minutes: memory stays flat however long text is generated or training goes on."""

import gc
import os
from pathlib import Path

import psutil
import pytest
import torch

from retnet.generation import Sampling, generate
from retnet.training import loop
from tests.generation.builders import BOS, tiny_model
from tests.training.test_train import run

TOKENS = int(os.environ.get("SOAK_TOKENS", "1000000"))
STEPS = int(os.environ.get("SOAK_STEPS", "20000"))


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
def test_training_with_flat_memory(options, tmp_path: Path, monkeypatch) -> None:
    """20,000 steps with evaluations, samples and checkpoints; about ten minutes."""
    real, readings = loop.Trainer._log, []

    def measured(self, values: dict[str, float]) -> None:
        real(self, values)
        if values["step"] % (STEPS // 20) == 0:
            readings.append(resident())

    monkeypatch.setattr(loop.Trainer, "_log", measured)
    changes = {"train__max_steps": STEPS, "train__eval_every": 200, "train__save_every": 500,
               "train__log_every": 2000}  # fmt: skip
    assert run(options, **changes) == 0
    print(f"{STEPS:,} steps, {readings[1] / 1e6:.1f} MB after a tenth, {readings[-1] / 1e6:.1f} MB")
    assert max(readings[1:]) < 1.01 * readings[1]
