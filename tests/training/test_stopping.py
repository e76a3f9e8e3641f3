"""Signals, losses that are not finite, spikes: the run stops or speaks in time, nothing is lost."""

import json
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from retnet import cli
from retnet.checkpoints import save
from retnet.checkpoints.format import list_checkpoints
from retnet.training import loop
from retnet.training import run as module
from retnet.training.health import SpikeWatch
from retnet.training.signals import stop_on_signals
from tests.training.test_faults import fail_at
from tests.training.test_train import metrics, run, weights


def test_a_request_to_stop_saves_and_the_run_goes_on(
    options, whole: Path, tmp_path: Path, capsys
) -> None:
    real = loop.Trainer._log

    def interrupted(self, values, *rest):
        real(self, values, *rest)
        if values["step"] == 3:
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Trainer, "_log", interrupted)
        assert run(options) == 143
    assert "stopped after step 3" in capsys.readouterr().err
    assert run(options) == 0
    assert "going on from" in capsys.readouterr().err
    assert metrics(tmp_path / "run") == metrics(whole)
    a, b = weights(tmp_path / "run/final"), weights(whole / "final")
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_sigint_saves_and_a_second_one_stops_at_once(
    options, whole: Path, tmp_path: Path, capsys
) -> None:
    def interrupt() -> None:
        signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        fail_at(patch, loop.Trainer, "_seed", 4, interrupt)
        assert run(options) == 130
    assert "stopped after step 3, saved in" in capsys.readouterr().err
    with pytest.MonkeyPatch.context() as patch:
        fail_at(patch, loop.Trainer, "_seed", 3, interrupt)
        fail_at(patch, save, "save_file", 2, interrupt)  # of step 4, then of the stop
        assert run(options) == 130
    assert capsys.readouterr().err.endswith("interrupted\n")
    folders = [folder.name for folder in list_checkpoints(tmp_path / "run")]
    assert folders == ["step_3", "step_4"]
    assert run(options) == 0
    assert metrics(tmp_path / "run") == metrics(whole)
    a, b = weights(tmp_path / "run/final"), weights(whole / "final")
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_sigterm_after_sigint_is_no_hurry() -> None:
    """torchrun sends it when Ctrl-C has reached it."""
    with stop_on_signals() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert stop.exit_code == 130


def test_a_terminal_that_is_closed(options, tmp_path: Path, capsys) -> None:
    """SIGHUP stops the run as SIGTERM does; under nohup it is ignored, and the run goes on."""

    def hang_up() -> None:
        signal.raise_signal(signal.SIGHUP)

    previous = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
    try:
        with pytest.MonkeyPatch.context() as patch:
            fail_at(patch, loop.Trainer, "_seed", 4, hang_up)
            assert run(options) == 129
        assert "stopped after step 3, saved in" in capsys.readouterr().err
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with pytest.MonkeyPatch.context() as patch:
            fail_at(patch, loop.Trainer, "_seed", 2, hang_up)
            assert run(options) == 0
    finally:
        signal.signal(signal.SIGHUP, previous)


class Burst(threading.Thread):
    """Twenty Ctrl-C within 10 ms, from outside, after ``go``. Join it while they do no harm."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()
        self.start()

    def run(self) -> None:
        self.go.wait()
        for _ in range(20):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.0005)


def test_a_burst_of_ctrl_c_is_one(capsys) -> None:
    """Whatever happens on the way out is not interrupted again."""

    def waits(argv: Sequence[str]) -> None:
        sending = Burst()
        try:
            sending.go.set()
            time.sleep(5)
        finally:
            sending.join()

    began = time.monotonic()
    assert cli.run(waits, []) == 130
    assert time.monotonic() - began < 4
    assert capsys.readouterr().err == "interrupted\n"
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_nothing_raises_after_the_end_of_a_process(monkeypatch) -> None:
    """The rest of a burst does nothing, and a later Ctrl-C does what it does without Python."""

    def interrupted(argv: Sequence[str]) -> None:
        signal.raise_signal(signal.SIGINT)

    ends: list[object] = []
    monkeypatch.setattr("sys.argv", ["train.py"])
    try:
        assert cli.run(interrupted) == 130
        handler = signal.getsignal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        monkeypatch.setattr("retnet.interrupts.BURST_S", 0)
        monkeypatch.setattr(signal, "raise_signal", lambda number: ends.append(number))
        with pytest.raises(KeyboardInterrupt):  # where the default had ended the process
            handler(signal.SIGINT, None)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL and ends == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_burst_of_ctrl_c_in_training(options, whole: Path, tmp_path: Path, capsys) -> None:
    sending, real = Burst(), module.end_training

    def interrupt() -> None:
        sending.go.set()
        time.sleep(1)

    def end(*args: object) -> None:
        sending.join()
        real(*args)

    with pytest.MonkeyPatch.context() as patch:
        fail_at(patch, loop.Trainer, "_seed", 4, interrupt)
        patch.setattr(module, "end_training", end)
        assert run(options) == 130
    printed = capsys.readouterr().err
    assert printed.endswith("interrupted\n") and "Traceback" not in printed
    assert run(options) == 0
    assert metrics(tmp_path / "run") == metrics(whole)


def test_outside_of_the_main_thread(options, whole: Path, tmp_path: Path, capsys) -> None:
    """A notebook's or a server's thread can train too; signals are not its own."""
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(run(options)))
    thread.start()
    thread.join()
    assert codes == [0]
    assert capsys.readouterr().err.count("outside of the main thread: signals") == 1
    assert metrics(tmp_path / "run") == metrics(whole)


def test_loss_that_is_not_finite_stops_before_the_update(options, tmp_path: Path, capsys) -> None:
    original = loop.Trainer._step

    def poisoned(self, step, stop):
        if step == 4:
            with torch.no_grad():
                self.bare_model.model.embed_tokens.weight[:] = float("nan")
        return original(self, step, stop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Trainer, "_step", poisoned)
        assert run(options) == 3
    assert "step 5: loss nan" in capsys.readouterr().err
    report = json.loads((tmp_path / "run/diverged.json").read_text())
    assert report["step"] == 5 and report["rows"] == [16, 19]
    assert (tmp_path / "run/checkpoints/step_4").is_dir()
    assert not (tmp_path / "run/final").exists()


def test_weights_that_the_last_step_broke(options, tmp_path: Path, capsys) -> None:
    """No loss of training comes after it: they were saved as the end, and the exit code was 0."""
    original = loop.Trainer._evaluate

    def poisoned(self):
        if self.progress.step == self.spec.max_steps:
            with torch.no_grad():
                self.bare_model.model.embed_tokens.weight[:] = float("nan")
        return original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Trainer, "_evaluate", poisoned)
        assert run(options) == 3
    assert "step 6: validation loss nan; its weights are not saved" in capsys.readouterr().err
    assert not (tmp_path / "run/final").exists()
    assert not (tmp_path / "run/checkpoints/step_6").exists()
    assert run(options) == 0


def test_a_first_loss_far_from_chance_is_warned_of(options, tmp_path: Path, capsys) -> None:
    assert run(options) == 0
    assert "ln(vocabulary)" not in capsys.readouterr().err
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("retnet.model.mixers.base.LOGIT_STD", 20.0)
        patch.setattr("retnet.model.mixers.base.min", max, raising=False)
        assert run(options, train__out_dir=tmp_path / "wild") == 0
    assert "ln(vocabulary)" in capsys.readouterr().err


def test_the_report_of_a_divergence(options, tmp_path: Path, capsys) -> None:
    def poison(self, *args) -> torch.Tensor:
        loss = real(self, *args)
        if self.progress.step == 4:
            self.bare_model.model.norm.weight.grad.fill_(math.inf)
        return loss

    real = loop.Trainer._backward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Trainer, "_backward", poison)
        assert run(options) == 3
    assert "gradient norm inf; the step was not taken" in capsys.readouterr().err
    text = (tmp_path / "run/diverged.json").read_text()
    report = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    norms = report["grad_norms"]
    assert norms.pop("model.norm.weight") == report["grad_norm"] == "inf"
    assert all(0 < norm < 100 for norm in norms.values())  # as they were, not clipped to nan
    assert report["rows"] == [16, 19] and len(report["window_starts"]) == 4
    assert run(options) == 0  # the poison is gone; so is the report
    assert not (tmp_path / "run/diverged.json").exists()


def test_a_loss_spike_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    losses = [3.0 + 0.1 * (step % 3) for step in range(30)]
    watch = SpikeWatch(losses[:10])  # the rest of a run that was gone on with
    with caplog.at_level(logging.WARNING):
        for step, loss in enumerate([*losses[10:], 3.3], 11):
            watch.check(step, loss)
        assert not caplog.records
        watch.check(32, 4.0)
    assert "step 32: the loss jumped to 4.000" in caplog.text


def test_a_run_watches_for_spikes(options, capsys, monkeypatch) -> None:
    """Its own losses, also those from before it was gone on with."""

    def jumps(self, step, stop):
        values = real(self, step, stop)
        return values | {"train/loss": values["train/loss"] + (step == 6)}

    real = loop.Trainer._step
    monkeypatch.setattr(loop.Trainer, "_step", jumps)
    monkeypatch.setattr("retnet.training.health.SPIKE_AFTER", 5)
    assert run(options, train__schedule="constant") == 0
    assert "the loss jumped" not in capsys.readouterr().err
    assert run(options, train__schedule="constant", train__max_steps=8) == 0
    assert capsys.readouterr().err.count("step 7: the loss jumped") == 1
