"""train.carry_state: memory reaches beyond the window."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from retnet import RetNetConfig, RetNetForCausalLM, cli
from retnet.checkpoints import write_manifest
from retnet.commands import train
from retnet.data import CarriedValidationBatches
from retnet.training.validation import sum_losses
from tests.data.corpora import tokens_of
from tests.training.conftest import as_options
from tests.training.test_train import TINY, metrics, run, weights

WINDOW = 8  # below the 11 characters across the digits, above the 4 across xyz


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents that say one letter again and again, every other time further than a window."""
    rng = random.Random(0)
    rows = []
    for _ in range(400):
        letter = rng.choice("ABCDEFGHIJKLMNOP")
        rows.append(f"{letter}xyz{letter}0123456789" * rng.randint(6, 14))
    path = tmp_path_factory.mktemp("far") / "far.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in rows))
    return path


@pytest.mark.slow
def test_validation_improves_where_dependencies_are_longer_than_the_window(
    far: Path, options, tmp_path: Path
) -> None:
    """Without it, a letter after the digits costs ln(16) nats: 0.18 on each of 15 tokens."""
    losses = {}
    for carry in ("false", "true"):
        keys = {
            "data.source": far, "data.seq_len": WINDOW, "model.hidden_size": 32,
            "model.dropout": 0, "train.max_steps": 300, "train.batch_size": 16,
            "train.learning_rate": 5e-3, "train.warmup_steps": 10, "train.eval_every": 300,
            "train.save_every": 300, "train.log_every": 50, "train.sample_tokens": 0,
            "train.carry_state": carry, "train.out_dir": tmp_path / carry,
        }  # fmt: skip
        assert cli.run(train.main, [TINY, *options, *as_options(keys)]) == 0
        losses[carry] = metrics(tmp_path / carry)[-1]["val/loss"]
    assert losses["true"] < losses["false"] - 0.1


def test_a_run_that_stops_keeps_the_state_of_its_last_whole_step(options, tmp_path: Path) -> None:
    """Asked to stop between micro-steps, it saves the states from before the step."""
    import signal

    from retnet.training import loop

    more = {"train__carry_state": "true", "train__gradient_accumulation_steps": 2,
            "train__batch_size": 2}  # fmt: skip
    assert run(options, **more, train__out_dir=tmp_path / "whole") == 0
    real, calls = loop.Trainer._backward, []

    def interrupted(self, *args):
        calls.append(1)
        if len(calls) == 7:
            signal.raise_signal(signal.SIGINT)
        return real(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Trainer, "_backward", interrupted)
        assert run(options, **more) == 130
    assert run(options, **more) == 0
    a, b = weights(tmp_path / "run/final"), weights(tmp_path / "whole/final")
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_the_validation_loss_is_the_same_however_its_rows_are_divided() -> None:
    tokens = tokens_of([90, 700, 3, 410, 800])
    torch.manual_seed(0)
    config = RetNetConfig(vocab_size=4000, hidden_size=16, num_hidden_layers=2, num_heads=2)
    model = RetNetForCausalLM(config)
    sums = []
    for batch_size, world_size in ((2, 1), (8, 1), (4, 2)):
        parts = [
            sum_losses(model, CarriedValidationBatches(tokens, seq_len=4, batch_size=batch_size,
                                                       rank=rank, world_size=world_size))
            for rank in range(world_size)
        ]  # fmt: skip
        sums.append([sum(values) for values in zip(*parts, strict=True)])
    assert sums[0][1] == sums[1][1] == sums[2][1] > 1900
    assert sums[0][0] == pytest.approx(sums[1][0], rel=1e-6)
    assert sums[0][0] == pytest.approx(sums[2][0], rel=1e-6)


def test_a_checkpoint_without_states(options, whole: Path, capsys) -> None:
    start = whole / "checkpoints/step_4"
    assert run(options, train__carry_state="true", train__resume=start) == 2
    assert "has no carried.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["garbage", "names", "rows", "kind"])
def test_states_of_another_kind(options, tmp_path: Path, capsys, damage: str) -> None:
    """As written, says the manifest, and still nothing to go on from."""
    assert run(options, train__carry_state="true", train__max_steps=2) == 0
    folder = tmp_path / "run/checkpoints/step_2"
    file = folder / "carried.safetensors"
    states = load_file(file)
    name = "layers.0.mixer.state"
    if damage == "names":
        states["layers.7.mixer.state"] = states[name].clone()
    else:
        states[name] = states[name].long() if damage == "kind" else states[name][:1].clone()
    save_file(states, file)
    if damage == "garbage":
        file.write_bytes(b"none")
    (folder / "manifest.json").unlink()
    write_manifest(folder)
    assert run(options, train__carry_state="true", train__max_steps=4) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: {file}") and line.endswith("copy the checkpoint again")


def test_states_that_are_not_finite(options, tmp_path: Path, capsys) -> None:
    """The learning rate was blamed for a loss of nan."""
    assert run(options, train__carry_state="true", train__max_steps=2) == 0
    folder = tmp_path / "run/checkpoints/step_2"
    states = load_file(folder / "carried.safetensors")
    states["layers.0.mixer.state"][0] = torch.nan
    save_file(states, folder / "carried.safetensors")
    (folder / "manifest.json").unlink()
    write_manifest(folder)
    assert run(options, train__carry_state="true", train__max_steps=4) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "carried.safetensors has values that are not finite (layers.0.mixer.state)" in line
