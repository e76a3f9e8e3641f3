"""Costs by context, batch and length, and the memory of training."""

from types import SimpleNamespace

import pytest
import torch

from retnet.checkpoints import load_checkpoint
from retnet.evaluation import costs, memory
from retnet.evaluation.costs import Costs, TrainingCost, measure_costs, training_costs
from retnet.evaluation.memory import peaks
from retnet.evaluation.speed import TOKENS_PER_ROUND, DecodeSpeed
from tests.generation.builders import save_checkpoint, tiny_model

CPU = torch.device("cpu")


@pytest.fixture(name="small_step", autouse=True)
def of_few_tokens(monkeypatch) -> None:
    monkeypatch.setattr(costs, "STEP_TOKENS", 16)


def checkpoint_of(name: str) -> SimpleNamespace:
    return SimpleNamespace(path=name, base=None, model=tiny_model(name))


def test_every_cost_of_every_model(tmp_path) -> None:
    names = ("attention", "aft")
    checkpoints = [load_checkpoint(save_checkpoint(tmp_path / name, name)) for name in names]
    by_context = [[DecodeSpeed(4, ms_per_token=float(i)), DecodeSpeed(13)] for i in range(2)]
    found = measure_costs(
        checkpoints, by_context=by_context, batches=(1, 3), lengths=(4, 16, 32), limit_s=1e9,
        everywhere=False, peaks=False,
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


def test_batches_after_each_context() -> None:
    """One row is what it was found to be; several are stopped by the time that one row took."""
    batches, contexts = (1, 2, 3), (4, 16)
    checkpoints = [checkpoint_of(name) for name in ("attention", "retention")]
    slow = [DecodeSpeed(4, 9.0, prefill_s=1.0), DecodeSpeed(16, 9.0, prefill_s=10.0)]
    quick = [DecodeSpeed(context, 9.0, prefill_s=0.1) for context in contexts]
    found = measure_costs(
        checkpoints, by_context=[slow, quick], batches=batches, lengths=(), limit_s=20, peaks=False
    )
    for own, alone in zip(found, (slow, quick), strict=True):
        shown = [(one.context, one.rows) for one in own.by_batch]
        assert shown == [(context, rows) for context in contexts for rows in batches]
        assert own.by_batch[0] is alone[0] and own.by_batch[3] is alone[1]
    stopped = [one.stopped for one in found[0].by_batch]
    assert stopped == [False] * 5 + [True], "30 seconds"
    assert all(one.ms_per_token and not one.stopped for one in found[1].by_batch)


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
    assert peaks("training", tiny_model("retention"), (4, 8, 16)) == [30, 70, 70]


def test_peaks_of_generating_are_those_of_prompts_and_tokens(monkeypatch) -> None:
    """Read by a cache of its own; a short one first, from which nothing is counted."""
    model, seen = tiny_model("attention"), []

    def peak_of(work, device):
        cache = []
        monkeypatch.setattr(
            model, "new_cache", lambda **options: cache.append(new(**options)) or cache[0]
        )
        work()
        seen.append(cache[0].get_seq_length())
        return 7

    new = model.new_cache
    monkeypatch.setattr(memory, "peak_of", peak_of)
    assert peaks("generating", model, (20, 40)) == [7, 14]
    assert seen == [20 + TOKENS_PER_ROUND, 40 + TOKENS_PER_ROUND]


@pytest.mark.slow
@pytest.mark.parametrize("work", memory.WORKS)
def test_in_a_process_of_its_own(tmp_path, monkeypatch, work: str) -> None:
    """From any folder: this package need not be installed, and what lies there is none of ours."""
    path = save_checkpoint(tmp_path / "model", "retention")
    (tmp_path / "torch.py").write_text("raise SystemExit('of the current folder')")
    monkeypatch.chdir(tmp_path)
    found = memory.measured_peaks(work, path, [16, 2048], CPU, torch.float32)
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
    given = Costs([DecodeSpeed(4, 9.0)], [], [TrainingCost(4, 4, 9.0)])
    assert costs._with_peaks(checkpoint, given) == given
    for work, line in zip(("generating", "training"), caplog.messages, strict=True):
        said = f"the memory of {work} {path} was not measured: its process {words}"
        assert line.startswith(said)


def test_peaks_stand_beside_what_was_measured_there(monkeypatch) -> None:
    asked = []

    def instead(work, path, lengths, *options):
        asked.append((work, path, lengths, *options))
        return [{"training": 7, "generating": 5}[work] * length for length in lengths]

    monkeypatch.setattr(costs, "measured_peaks", instead)
    checkpoint = checkpoint_of("retention")
    read = [DecodeSpeed(16, 9.0), DecodeSpeed(8, stopped=True), DecodeSpeed(4, 9.0)]
    trained = [TrainingCost(4, 4, 9.0), TrainingCost(8, 2), TrainingCost(16, 1, 9.0)]
    given = {"by_context": [read], "batches": (), "lengths": (), "limit_s": 1}
    monkeypatch.setattr(costs, "training_costs", lambda *options: [trained])
    (found,) = measure_costs([checkpoint], **given)
    assert [one.row_bytes for one in found.training] == [28, None, 112]
    assert [one.peak_bytes for one in found.by_context] == [80, None, 20]
    options = (checkpoint.model.device, checkpoint.model.dtype, False)
    assert asked == [(work, "retention", [4, 16], *options) for work in ("generating", "training")]
    (without,) = measure_costs([checkpoint], **given, peaks=False)
    assert without == Costs(read, [], trained) and len(asked) == 2
