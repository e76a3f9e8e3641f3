"""Costs by context, batch and length, and the memory of training."""

import pytest
import torch

from retnet.checkpoints import load_checkpoint
from retnet.evaluation import costs, memory
from retnet.evaluation.costs import TrainingCost, measure_costs, training_costs
from retnet.evaluation.memory import peaks
from retnet.evaluation.speed import DecodeSpeed
from tests.generation.builders import save_checkpoint, tiny_model

CPU = torch.device("cpu")


@pytest.fixture(name="small_step", autouse=True)
def of_few_tokens(monkeypatch) -> None:
    monkeypatch.setattr(costs, "STEP_TOKENS", 16)


def test_every_cost_of_every_model(tmp_path) -> None:
    names = ("attention", "aft")
    checkpoints = [load_checkpoint(save_checkpoint(tmp_path / name, name)) for name in names]
    by_context = [[DecodeSpeed(4, ms_per_token=float(i)), DecodeSpeed(13)] for i in range(2)]
    found = measure_costs(
        checkpoints, by_context=by_context, batches=(1, 3), lengths=(4, 16, 32), limit_s=1e9,
        peaks=False,
    )  # fmt: skip
    attention, aft = found
    assert [one.by_context for one in found] == by_context
    assert [(one.context, one.rows) for one in attention.by_batch] == [(4, 1), (4, 3)]
    assert [(one.length, one.rows) for one in attention.training] == [(4, 4), (16, 1), (32, 1)]
    assert all(one.tokens_per_second > 0 for one in attention.training)
    assert [one.tokens_per_second is not None for one in aft.training] == [True, True, False]
    assert not any(one.stopped for one in aft.training)
    assert all(p.grad is None for one in checkpoints for p in one.model.parameters())
    assert not any(one.model.training for one in checkpoints)


def test_a_model_whose_steps_take_too_long_is_stopped() -> None:
    """Judged by the step before, as if its time grew with the square; then for good."""
    lengths = (4, 16, 32, 64)
    (found,) = training_costs([tiny_model("attention")], lengths, limit_s=0)
    assert [one.stopped for one in found] == [False, True, True, True]
    assert all(one.tokens_per_second is None for one in found[1:])
    before = [TrainingCost(8, 2, tokens_per_second=16.0)]  # 16 tokens in a second
    assert costs._too_long(before, 64, 15) and not costs._too_long(before, 64, 17)
    assert not costs._too_long([TrainingCost(8, 2)], 64, 0) and not costs._too_long([], 64, 0)


def test_peaks_rise_from_the_same_ground(monkeypatch) -> None:
    """Each is counted from before the first, although the process never gets smaller."""
    resident = iter([100, 130, 130, 170, 170, 170])
    monkeypatch.setattr(memory, "largest_resident_size", lambda: next(resident))
    assert peaks(tiny_model("retention"), (4, 8, 16)) == [30, 70, 70]


@pytest.mark.slow
def test_in_a_process_of_its_own(tmp_path, monkeypatch) -> None:
    """From any folder: this package need not be installed, and what lies there is none of ours."""
    path = save_checkpoint(tmp_path / "model", "retention")
    (tmp_path / "torch.py").write_text("raise SystemExit('of the current folder')")
    monkeypatch.chdir(tmp_path)
    found = memory.training_peaks(path, [16, 2048], CPU, torch.float32)
    assert 0 <= found[0] < found[1]


@pytest.mark.parametrize(
    ("content", "words"),
    [("{", "failed (retnet.errors.UserError: "), (None, "failed (signal 9)")],
)
@pytest.mark.slow
def test_a_process_that_fails_costs_its_figures_alone(
    tmp_path, monkeypatch, caplog, content: str | None, words: str
) -> None:
    """Signal 9 is what ends a process for its memory."""
    path = save_checkpoint(tmp_path / "model", "retention")
    checkpoint = load_checkpoint(path)
    if content is None:
        kill = "#!/bin/sh\nkill -9 $$\n"
        (tmp_path / "python").write_text(kill)
        (tmp_path / "python").chmod(0o755)
        monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    else:
        (path / "config.json").write_text(content)
    given = [TrainingCost(4, 4, 9.0)]
    assert costs._with_peaks(checkpoint, given) == given
    (line,) = caplog.messages
    assert line.startswith(f"the memory of training {path} was not measured: its process {words}")


def test_peaks_stand_beside_the_speed_of_their_length(monkeypatch) -> None:
    asked = []

    def instead(path, lengths, device, dtype, trust_remote_code):
        asked.append((path, lengths, device, dtype, trust_remote_code))
        return [7 * length for length in lengths]

    monkeypatch.setattr(costs, "training_peaks", instead)
    model = tiny_model("retention")
    checkpoint = type("Checkpoint", (), {"path": "here", "base": None, "model": model})
    given = [TrainingCost(4, 4, 9.0), TrainingCost(8, 2), TrainingCost(16, 1, 9.0)]
    found = costs._with_peaks(checkpoint, given)
    assert [one.row_bytes for one in found] == [28, None, 112]
    assert asked == [("here", [4, 16], model.device, model.dtype, False)]
