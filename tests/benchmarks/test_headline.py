"""The paper's headline at a size that says nothing about speed."""

import json

import pytest
import torch

from benchmarks import headline
from benchmarks.headline import Cell, beside_the_paper, ratios, table
from retnet.cli import run

SMALL = ["--size", "tiny", "--device", "cpu", "--tokens", "2"]


def test_every_cell_is_measured_and_printed(tmp_path, capsys) -> None:
    path = tmp_path / "x.json"
    options = ["--contexts", "16", "8", "--batches", "2", "1", "--dtype", "float32"]
    assert run(headline.main, [*SMALL, *options, "--json", str(path)]) == 0
    printed, body = capsys.readouterr().out, json.loads(path.read_text())
    found = [Cell(**x) for x in body["cells"]]
    names = [(x.contender, x.context, x.rows) for x in found]
    pairs = [(8, 1), (8, 2), (16, 1), (16, 2)]
    assert names == [(name, *pair) for name in ("RetNet", "Transformer") for pair in pairs]
    assert all(x.seconds and x.seconds > 0 and x.num_bytes is None for x in found)
    moved = {name: [x.moved for x in found if x.contender == name] for name in headline.MAKERS}
    own, theirs = moved["RetNet"], moved["Transformer"]
    assert own[0] == own[2] < own[1] == own[3]  # the state does not grow with the context
    row = 2 * 2 * 32 * 64 * 4 + 24  # layers, heads, a head's state; the row's record
    assert own[1] - own[0] == 2 * row  # read and written
    assert theirs[0] < theirs[2] < theirs[3]
    assert body["environment"]["dtype"] == "float32"
    assert all(part in printed for part in ("== after 8 tokens", "== after 16 tokens", "15.6"))


def test_fewer_bits_are_fewer_bytes(tmp_path) -> None:
    """Of the weights; embeddings are looked up."""
    path, moved = tmp_path / "x.json", []
    for weights in ([], ["--weights", "bf16"], ["--weights", "int8"], ["--weights", "int4"]):
        options = [
            "--contexts",
            "4",
            "--batches",
            "1",
            *([] if weights else ["--dtype", "float32"]),
        ]
        assert run(headline.main, [*SMALL, *options, *weights, "--json", str(path)]) == 0
        moved.append(json.loads(path.read_text())["cells"][1]["moved"])
    assert moved == sorted(moved, reverse=True) and len({*moved}) == 4


def test_a_context_that_does_not_fit_is_told(monkeypatch, capsys) -> None:
    """The others are measured."""
    whole = headline.remembered

    def remembered(model, ids, room):
        if ids.shape[1] > 8 and model.grows:
            raise torch.cuda.OutOfMemoryError
        return whole(model, ids, room)

    monkeypatch.setattr(headline, "remembered", remembered)
    assert run(headline.main, [*SMALL, "--contexts", "8", "16", "--batches", "1", "2"]) == 0
    told = capsys.readouterr()
    assert told.out.count("does not fit") == told.err.count("does not fit") == 2
    assert "Transformer, 2 rows after 16 tokens: does not fit" in told.err


def cell(name: str, rows: int, seconds: float | None, gb: float | None) -> Cell:
    return Cell(name, 8192, rows, seconds, None if gb is None else int(gb * 1e9), 10**9)


FOUND = [
    cell("RetNet", 1, 0.01, 10), cell("RetNet", 8, 0.02, 12), cell("RetNet", 32, 0.04, 20),
    cell("Transformer", 1, 0.02, 11), cell("Transformer", 8, 0.2, 36),
    cell("Transformer", 32, None, None),
]  # fmt: skip


def test_ratios_are_of_what_fits() -> None:
    """Throughput 800 over 50; latency and memory with 8 rows, the most that fit for both."""
    found = ratios(FOUND, 8192)
    assert {key: rows for key, (_, rows) in found.items()} == {
        "throughput": 32, "latency": 8, "memory": 8,
    }  # fmt: skip
    values = {key: value for key, (value, _) in found.items()}
    assert values == pytest.approx({"throughput": 16.0, "latency": 10.0, "memory": 3.0})
    assert ratios(FOUND[:3], 8192) == {} == ratios(FOUND, 1024)
    shown = beside_the_paper(FOUND, [8192])
    assert [line.split()[3:] for line in shown[2:3]] == [
        ["(32", "rows)", "3.00", "(8", "rows)", "10.00", "(8", "rows)"]
    ]


def test_a_table_has_both_and_says_what_does_not_fit() -> None:
    lines = table(FOUND, 8192, 1e11)  # bytes a second: the limit is 10 ms
    assert lines[2].split() == ["1", "10.00", "100", "10.0", "1.00", "20.00", "50", "11.0", "0.50"]
    assert lines[4].split() == ["32", "40.00", "800", "20.0", "0.25", "does", "not", "fit"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--size", "7b"], "invalid choice: '7b'"),
        (["--contexts", "0"], "'0'"),
        (["--weights", "int8", "--dtype", "bfloat16"], "--dtype (bfloat16) does not go with"),
        (["--json", "absent/x.json"], "absent"),
    ],
)
def test_bad_options_are_one_line(options: list[str], said: str, capsys) -> None:
    assert run(headline.main, [*SMALL, *options]) == 2
    assert said in capsys.readouterr().err
