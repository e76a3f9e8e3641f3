"""auto is decided once, where a run begins, and recorded."""

import json
from pathlib import Path

import pytest
import torch

from retnet import machine
from retnet.experiments.contenders import planned
from retnet.training import precision
from retnet.training.config import load_config
from retnet.training.precision import settled_precision
from tests.training.test_train import metrics, run


@pytest.fixture
def decide(monkeypatch):
    """Say what this machine would choose."""

    def set_to(has: bool, slow: bool = False) -> None:
        monkeypatch.setattr(precision, "computes_in_bfloat16", lambda: has)
        monkeypatch.setattr(precision, "_times_as_long", lambda: 1.6 if slow else 1.4)
        precision._bfloat16_is_slow.cache_clear()

    yield set_to
    precision._bfloat16_is_slow.cache_clear()


def of_run(folder: Path) -> tuple[str, str]:
    """What config.yaml and the final checkpoint say."""
    state = json.loads((folder / "final/training_state.json").read_text())
    return load_config(folder / "config.yaml").train.precision, state["precision"]


@pytest.mark.parametrize(
    ("has", "slow", "chosen"),
    [(True, False, "bf16"), (True, True, "fp32"), (False, False, "fp32")],
)
def test_the_machine_decides(has: bool, slow: bool, chosen: str, decide, said) -> None:
    decide(has, slow)
    given = ["train.device=cpu"]
    assert settled_precision(load_config(None, given)).train.precision == chosen
    reason = "train.precision (auto): fp32, as bfloat16 takes 1.6 times as long"
    assert said == [reason] * slow
    for other in ("fp32", "bf16"):
        config = load_config(None, [*given, f"train.precision={other}"])
        assert settled_precision(config) is config


def test_products_are_timed() -> None:
    assert 0.01 < precision._times_as_long() < 100


@pytest.mark.parametrize("busy", [range(15), range(17, 40)], ids=["first", "later"])
def test_a_busy_moment_of_the_machine_is_that_of_both_types(busy: range, monkeypatch) -> None:
    """Readings of a clock: every product takes 1 second, in the moment 9."""
    readings, now = iter(range(10**6)), [0.0]

    def clock() -> float:
        now[0] += 9.0 if next(readings) in busy else 1.0
        return now[0]

    monkeypatch.setattr(precision.time, "perf_counter", clock)
    assert precision._times_as_long() == 1.0


def test_bfloat16_is_refused_after_a_second_look_alone(decide, monkeypatch, said) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(precision.time, "sleep", pauses.append)
    for looks, slow in ([1.5], False), ([6.3, 1.5], False), ([1.7, 1.6], True), ([1.6, 1.7], True):
        left = iter(looks)
        monkeypatch.setattr(precision, "_times_as_long", left.__next__)
        precision._bfloat16_is_slow.cache_clear()
        pauses.clear()
        assert precision._bfloat16_is_slow() == slow and next(left, None) is None
        assert pauses == [precision.PAUSE] * (len(looks) - 1)
    assert said == ["train.precision (auto): fp32, as bfloat16 takes 1.6 times as long"] * 2


@pytest.mark.parametrize(("on_cpu", "chosen"), [(True, "fp32"), (False, "bf16")])
def test_what_auto_meant_before_it_was_recorded(on_cpu: bool, chosen: str, monkeypatch) -> None:
    """A GPU that computes in bfloat16 beside the CPU of the run changes nothing."""
    monkeypatch.setattr(precision, "runs_on_cpu", lambda train: on_cpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert precision.precision_before_it_was_recorded(load_config(None, []).train) == chosen
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert precision.precision_before_it_was_recorded(load_config(None, []).train) == "fp32"


def test_a_run_keeps_what_it_began_with(options, tmp_path: Path, decide) -> None:
    auto = {"train__precision": "auto", "train__schedule": "constant"}
    decide(True)
    whole = auto | {"train__out_dir": tmp_path / "whole"}
    assert run(options, **whole) == 0 and of_run(tmp_path / "whole") == ("bf16", "bf16")
    parts = auto | {"train__out_dir": tmp_path / "parts"}
    assert run(options, **parts, train__max_steps=3, train__save_every=3) == 0
    decide(False)
    assert run(options, **parts) == 0
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    named = tmp_path / "parts/checkpoints/step_4"
    assert run(options, **auto, train__resume=named, train__out_dir=tmp_path / "named") == 0
    assert of_run(tmp_path / "named") == ("bf16", "bf16")
    plain = {"train__precision": "fp32", "train__out_dir": tmp_path / "plain"}
    assert run(options, **plain, train__schedule="constant") == 0
    assert metrics(tmp_path / "plain") != metrics(tmp_path / "whole")


def test_runs_of_before_it_was_recorded(options, tmp_path: Path, decide, capsys) -> None:
    """On a CPU their "auto" meant fp32, whatever the machine would choose today."""
    decide(False)
    folder, short = tmp_path / "run", {"train__max_steps": 4, "train__schedule": "constant"}
    assert run(options, **short, train__precision="auto") == 0
    file = folder / "config.yaml"
    file.write_text(file.read_text().replace("precision: fp32", "precision: auto"))
    state = folder / "checkpoints/step_4/training_state.json"
    content = json.loads(state.read_text())
    del content["precision"]
    state.write_text(json.dumps(content))
    (state.parent / "manifest.json").unlink()
    decide(True)
    capsys.readouterr()
    longer = {"train__schedule": "constant", "train__precision": "auto"}
    assert run(options, **longer) == 0, capsys.readouterr().err
    assert of_run(folder) == ("fp32", "fp32")
    assert run(options, **longer, train__resume=state.parent, train__out_dir=tmp_path / "b") == 0
    assert of_run(tmp_path / "b") == ("fp32", "fp32")


def test_an_experiment_decides_for_all_its_runs(options, tmp_path: Path, decide) -> None:
    decide(True)
    given = [*options, "train.precision=auto", f"train.out_dir={tmp_path / 'run'}"]
    assert run(given, train__precision="fp32") == 0
    config = load_config("configs/tiny.yaml", given)
    assert settled_precision(config).train.precision == "fp32"
    assert (
        planned("configs/tiny.yaml", tmp_path / "run", given[:-1]).config.train.precision == "bf16"
    )


@pytest.mark.parametrize("name", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
def test_a_cpu_that_is_kept_from_bfloat16(name: str, monkeypatch) -> None:
    for key in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(key, raising=False)
    able = {"avx2": True, "avx512_bf16": True, "l2_cache_size": 1}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert machine.computes_in_bfloat16()
    monkeypatch.setenv(name, "avx512_core")
    assert not machine.computes_in_bfloat16()
    monkeypatch.setenv(name, "AVX512_CORE_BF16")
    assert machine.computes_in_bfloat16()
    able["avx512_bf16"] = False
    assert not machine.computes_in_bfloat16()
