"""The parity matrix holds, is complete in the docs, and notices a broken form."""

import re
from pathlib import Path

import pytest
import torch

from benchmarks import parity
from benchmarks.cases import KINDS, PRECISIONS
from benchmarks.parity import Entry, main, measure
from benchmarks.properties import PROPERTIES
from retnet.cli import run
from retnet.model.mixers import retention
from retnet.model.ops import decay

BOTH = ("retention", "attention")
FEW = ["--cases", "1", "--seed", "1", "--kinds", *BOTH]
FAR_ROW = "shifted by 10,000,000 positions"


@pytest.fixture(scope="module")
def entries() -> list[Entry]:
    return measure(2, 3, BOTH)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in BOTH])
def test_the_others(kind: str) -> None:
    found = measure(6, 3, [kind])
    assert not [(entry.row.name, entry.precision, entry.value) for entry in found if entry.failed]
    names = {entry.row.name for entry in found}
    assert ("parallel = recurrent" in names) == (kind != "rwkv")
    assert (FAR_ROW in names) == (kind in ("rwkv", "gated_retention", "hybrid"))
    # every one of them has something in it that rounds
    assert all(e.value > 0 for e in found if e.row.name == "chunkwise = recurrent"
               and e.precision == "float64")  # fmt: skip


def test_float64_is_exact(entries) -> None:
    rows = {(entry.kind, entry.row.name, entry.precision) for entry in entries}
    applying = sum(row.applies(KINDS[kind]) for row in PROPERTIES for kind in BOTH)
    assert len(rows) == len(entries) == applying * len(PRECISIONS)
    assert applying == 2 * len(PROPERTIES) - 3  # attention has one form
    for entry in entries:
        assert len(entry.differences) == (2 if entry.row.every == 1 else 1)
        if entry.precision == "float64":
            shift = entry.row.name.startswith("shifted")
            assert entry.value < (1e-6 if shift else 1e-10), entry.row.name
        assert not entry.failed, (entry.kind, entry.row.name, entry.precision, entry.value)
    # low precision does differ: else the matrix would compare a thing with itself
    assert any(e.value > 1e-4 for e in entries if e.precision.startswith("bfloat16"))


def test_a_table_for_each_model(capsys, entries, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(parity, "measure", lambda *given: asked.append(given) or entries)
    assert main([*FEW, "--markdown"]) == 0
    out = capsys.readouterr().out
    assert asked == [(1, 1, [*BOTH])]
    assert "over 1 random cases, seed 1; torch " + torch.__version__ in out
    assert re.search(r"\d{4}-\d\d-\d\d", out)
    assert out.count("| --- | --- | ---: |") == len(BOTH)
    assert main([]) == 0
    assert asked[1] == (parity.CASES, 0, [*KINDS])
    assert "|" not in capsys.readouterr().out


def test_seed_and_number_decide(monkeypatch) -> None:
    monkeypatch.setattr(parity, "PROPERTIES", PROPERTIES[:2])
    first, again, other = (measure(2, seed, BOTH) for seed in (0, 0, 1))
    assert first == again
    assert all(a.differences != b.differences for a, b in zip(first[:2], other[:2], strict=True))


def test_a_broken_form_fails_the_check(capsys, monkeypatch) -> None:
    def slightly_wrong(log_decay, *args):
        return right(log_decay * (1 + 1e-3), *args)

    right = decay.decay_between
    monkeypatch.setattr(parity, "PROPERTIES", PROPERTIES[:5])
    assert main([*FEW, "--check"]) == 0
    monkeypatch.setattr(decay, "decay_between", slightly_wrong)
    assert main(FEW) == 0
    capsys.readouterr()
    assert main([*FEW, "--check"]) == 1
    failures = capsys.readouterr().err
    assert "RetNet, parallel = recurrent, float64" in failures
    assert "RetNet, chunkwise = recurrent, float32" in failures
    assert "Transformer" not in failures


def test_nan_fails_the_check(monkeypatch) -> None:
    real = retention.gated_norm
    monkeypatch.setattr(retention, "gated_norm", lambda *a: real(*a) * float("nan"))
    rows = [row for row in PROPERTIES if row.unit in ("logits", "gradients")]
    monkeypatch.setattr(parity, "PROPERTIES", rows)
    exact = ("float64", "float32")
    found = [e for e in measure(1, 0, BOTH) if e.kind == "retention" and e.precision in exact]
    assert len(found) == 2 * len(rows)
    assert all(entry.failed for entry in found)


@pytest.mark.parametrize("values", [[float("nan"), 0.0], [0.0, float("nan")]])
def test_one_nan_is_enough(values: list[float]) -> None:
    assert Entry(PROPERTIES[0], "retention", "float64", values).failed


def test_a_kind_that_does_not_exist(capsys) -> None:
    assert run(main, ["--kinds", "retnet"]) == 2
    assert capsys.readouterr().err.startswith("error: argument --kinds: invalid choice: 'retnet'")


def test_mistakes(capsys) -> None:
    assert run(main, ["--cases", "0"]) == 2
    assert capsys.readouterr().err.startswith("error: argument --cases")


def test_the_docs_have_every_row() -> None:
    text = (Path(__file__).parents[2] / "docs" / "parity.md").read_text()
    for kind in KINDS:
        assert f"| {parity.title(kind)} | unit |" in text
    for row in PROPERTIES:
        assert f"| {row.name} | {row.unit} |" in text
        assert text.count(f"`{row.name}`") == 1, f"{row.name} is not explained"
    assert "python -m benchmarks.parity" in text
