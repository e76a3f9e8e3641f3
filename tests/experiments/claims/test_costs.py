"""Claims about costs: measured at a tiny size, and their rules with made-up times."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from retnet.evaluation.speed import Timing
from retnet.experiments.claims import costs, relatives
from retnet.experiments.claims import setup as its_setup
from retnet.experiments.claims.registry import CLAIMS
from retnet.experiments.claims.setup import ROWS, Setup, exponent, recipe_of
from retnet.experiments.claims.verdict import Finding, Outcome, exact, verdict

RECIPE = """
model: {hidden_size: 16, num_hidden_layers: 1, num_heads: 2, chunk_size: 4}
data: {tokenizer: bytes, vocab_size: 300}
"""


@pytest.fixture(name="tiny")
def tiny_setup(tmp_path: Path) -> Setup:
    file = tmp_path / "tiny.yaml"
    file.write_text(RECIPE)
    return Setup(size=str(file), rounds=2, context=64)


def timing(*seconds: float) -> Timing:
    return Timing(seconds[0], seconds[0], seconds[0], len(seconds), seconds)


class MadeUp(Setup):
    """A machine on which work costs what ``cost`` says: of decoding or training, in seconds."""

    cost: Callable[..., float]
    size_of: Callable[[str, int], int] = staticmethod(lambda mixer, context: 100)

    def time(self, prepares: Sequence[Any]) -> list[Timing]:
        return [timing(*[type(self).cost(*work)] * 6) for work in prepares]

    def decoding(self, model, context, rows=1):  # type: ignore[no-untyped-def]
        mixer = model.config.mixer_class.name
        return ("decode", mixer, context, rows), type(self).size_of(mixer, context) * rows


@pytest.fixture(name="made_up")
def machine(tiny: Setup, monkeypatch: pytest.MonkeyPatch) -> Callable[..., MadeUp]:
    def step(model, rows, length, mode=None):  # type: ignore[no-untyped-def]
        return ("train", model.config.mixer_class.name, length, mode)

    for module in (costs, its_setup):
        monkeypatch.setattr(module, "prepared_step", step)

    def make(
        cost: Callable[..., float], size_of: Callable[[str, int], int] | None = None
    ) -> MadeUp:
        own: dict[str, Any] = {"cost": staticmethod(cost)}
        own |= {"size_of": staticmethod(size_of)} if size_of else {}
        return type("Own", (MadeUp,), own)(size=tiny.size, rounds=6, context=64)

    return make


def outcome(findings: Sequence[Finding], *words: str) -> Outcome:
    """Of the only finding with a limit that has the words in its name."""
    (found,) = [x.outcome for x in findings if x.outcome and all(w in x.what for w in words)]
    return found


NAMES = ("decode-constant", "batch-latency", "parallel-training", "inference-8k", "rwkv-cost")


@pytest.mark.parametrize("name", NAMES)
def test_measured(tiny: Setup, name: str) -> None:
    findings = CLAIMS[name].measure(tiny)
    assert verdict(findings) in Outcome
    for finding in findings:
        figure = finding.figure
        assert figure.low is not None and figure.high is not None
        assert figure.low <= figure.value <= figure.high
        assert figure.over in ("exact", "2 rounds, range")
    assert any("as published" in x.what for x in findings) == (name == "inference-8k")


def test_bytes_are_those_of_the_states(tiny: Setup) -> None:
    findings = costs.decode_constant(tiny)
    sizes = {x.what: x.figure.value for x in findings if x.unit == "MB"}
    per_row = 24  # its tokens seen, position and segment, int64
    assert sizes["retention: state or cache after 64 tokens"] * 1e6 == 4 * 2 * 8 * 16 + per_row
    assert sizes["attention: state or cache after 64 tokens"] * 1e6 >= 4 * 2 * 64 * 16


def test_decode_constant_comes_out_each_way(made_up) -> None:
    flat = made_up(lambda kind, mixer, context, rows: 1.0)
    assert verdict(costs.decode_constant(flat)) is Outcome.HELD
    growing = made_up(lambda kind, mixer, context, rows: context, lambda mixer, context: context)
    assert verdict(costs.decode_constant(growing)) is Outcome.NOT
    only_time = made_up(lambda kind, mixer, context, rows: context)
    assert verdict(costs.decode_constant(only_time)) is Outcome.PART
    of_the_other = made_up(
        lambda kind, mixer, context, rows: context if mixer == "attention" else 1
    )
    assert verdict(costs.decode_constant(of_the_other)) is Outcome.HELD, "that stands beside"


def test_batch_latency_comes_out_each_way(made_up) -> None:
    for cost, expected in ((1.0, Outcome.HELD), (0.5, Outcome.NOT), (0.08, Outcome.PART)):
        machine = made_up(lambda kind, mixer, context, rows, own=cost: 1 + (own < 1) * own * rows)
        assert verdict(costs.batch_latency(machine)) is expected, cost


def test_parallel_training_comes_out_each_way(made_up) -> None:
    def cost(loop: float, power: float) -> Callable[..., float]:
        return lambda kind, mixer, length, mode: (
            loop if mode == "recurrent" else 1.0 if mode == "parallel" else length**power
        )

    findings = costs.parallel_training(made_up(cost(3.0, 1.0)))
    assert verdict(findings) is Outcome.HELD
    (b,) = [x.figure.value for x in findings if x.what.startswith("chunkwise")]
    assert b == pytest.approx(1)
    assert verdict(costs.parallel_training(made_up(cost(1.0, 2.0)))) is Outcome.NOT
    assert verdict(costs.parallel_training(made_up(cost(3.0, 2.0)))) is Outcome.PART


def test_inference_comes_out_each_way(made_up) -> None:
    def decode(times: float, memory: int) -> MadeUp:
        return made_up(
            lambda kind, mixer, context, rows: times if mixer == "attention" else 1.0,
            lambda mixer, context: memory * 10**6 if mixer == "attention" else 10**6,
        )

    assert verdict(costs.inference_at_length(decode(16, 4))) is Outcome.HELD
    findings = costs.inference_at_length(decode(9, 2))
    assert verdict(findings) is Outcome.PART
    assert outcome(findings, "throughput", "as published") is Outcome.HELD
    assert outcome(findings, "latency", "as published") is Outcome.NOT
    assert outcome(findings, "latency", "better at all") is Outcome.HELD
    assert outcome(findings, "memory", "as published") is Outcome.NOT
    assert verdict(costs.inference_at_length(decode(0.5, 0))) is Outcome.NOT


def test_memory_counts_weights_and_the_rows(made_up) -> None:
    machine = made_up(lambda *work: 1.0, lambda mixer, context: 5000 if mixer == "attention" else 0)
    (found,) = [
        x.figure.value
        for x in costs.inference_at_length(machine)
        if x.what == "memory (weights, 8 rows), as published"
    ]
    weights = {
        mixer: sum(p.nbytes for p in machine.model(mixer).parameters())
        for mixer in ("retention", "attention")
    }
    assert found == pytest.approx((weights["attention"] + ROWS * 5000) / weights["retention"])


def test_costs_of_rwkv_come_out_each_way(made_up, monkeypatch) -> None:
    good = made_up(lambda kind, mixer, length, more: 1.0 if kind == "decode" else length)
    bad = made_up(lambda kind, mixer, length, more: length**2, lambda mixer, context: context)
    monkeypatch.setattr(relatives, "state_exponent", lambda setup, mixer, *keys: exact(1))
    assert verdict(relatives.rwkv_cost(good)) is Outcome.HELD
    monkeypatch.setattr(relatives, "state_exponent", lambda setup, mixer, *keys: exact(2))
    assert verdict(relatives.rwkv_cost(good)) is Outcome.PART
    assert verdict(relatives.rwkv_cost(bad)) is Outcome.NOT


def test_costs_of_aft_come_out_each_way(made_up, monkeypatch) -> None:
    def peaks(power: int) -> None:
        def found(work, path, lengths, device, dtype):  # type: ignore[no-untyped-def]
            return [10**9 + 1000 * length**power for length in lengths]

        monkeypatch.setattr(relatives, "measured_peaks", found)

    good = made_up(lambda kind, mixer, length, more: 1.0 if kind == "decode" else length)
    peaks(1)
    findings = relatives.aft_cost(good)
    assert verdict(findings) is Outcome.HELD
    assert [x.figure.value for x in findings if "memory" in x.what] == pytest.approx([1])
    peaks(2)
    findings = relatives.aft_cost(good)
    assert verdict(findings) is Outcome.PART and outcome(findings, "memory") is Outcome.NOT
    monkeypatch.setattr(relatives, "state_exponent", lambda setup, mixer, *keys: exact(2))
    bad = made_up(lambda kind, mixer, length, more: length**3, lambda mixer, context: context)
    assert verdict(relatives.aft_cost(bad)) is Outcome.NOT


@pytest.mark.slow
def test_aft_measured(tiny: Setup) -> None:
    findings = relatives.aft_cost(tiny)
    (memory,) = [x.figure for x in findings if "memory" in x.what]
    assert memory.over == f"{relatives.PROCESSES} processes, range"


def test_states_of_rwkv_are_as_wide_as_the_model(tiny: Setup) -> None:
    assert relatives.state_exponent(tiny, "rwkv").value == pytest.approx(1, abs=0.1)
    assert relatives.state_exponent(tiny, "retention").value == pytest.approx(2, abs=0.1)


def test_exponents() -> None:
    assert exponent((1, 2, 4), (3.0, 12.0, 48.0)) == pytest.approx(2)


def test_size_is_a_recipe(tiny: Setup) -> None:
    assert recipe_of("base") == "configs/base.yaml"
    assert recipe_of(tiny.size) == tiny.size
    assert Setup(size="base").describe().startswith("configs/base.yaml: width 768, 14 layers")
    model = tiny.model("attention", "model.num_hidden_layers=2")
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (16, 2)
