"""Model FLOP utilisation at a size that says nothing about speed."""

import json

import pytest
import torch

from benchmarks import measure, utilisation
from benchmarks.contenders import Ours, Size, make_retnet, make_transformer
from benchmarks.utilisation import SQUARE, model_flops
from retnet.cli import run

SMALL = ["--sizes", "tiny", "--device", "cpu", "--rounds", "1", "--no-compile"]


def test_everybody_is_measured(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setitem(SQUARE, "cpu", 64)
    path = tmp_path / "x.json"
    options = ["--length", "16", "--tokens", "40", "--json", str(path)]
    assert run(utilisation.main, [*SMALL, *options]) == 0
    printed, body = capsys.readouterr().out, json.loads(path.read_text())
    (rows,) = body["tables"].values()
    assert [row[0] for row in rows[1:]] == [
        "RetNet",
        "Transformer",
        "Llama",
        "limit: square products",
    ]
    assert [*body["tables"]] == ["tiny: 2 x 16 tokens"]
    shares = [float(row[4]) for row in rows[1:]]
    assert all(share > 0 for share in shares) and shares[3] == 1
    tokens = {one["contender"]: one["tokens"] for one in body["measurements"]}
    assert tokens["RetNet"] == 32
    assert "flash-linear-attention" in body["absent"] and "utilisation" in printed


def test_those_that_are_named_are_measured(tmp_path, capsys, monkeypatch) -> None:
    """And of each call that takes long is said whose it was, before the end."""
    monkeypatch.setitem(SQUARE, "cpu", 64)
    monkeypatch.setattr(utilisation, "kernels", lambda *given: pytest.fail("kernels are measured"))
    monkeypatch.setattr(measure, "SLOW_S", 0)
    path = tmp_path / "x.json"
    options = ["--contenders", "Llama", "--no-kernels", "--tokens", "16", "--length", "16"]
    assert run(utilisation.main, [*SMALL, *options, "--json", str(path)]) == 0
    (rows,) = json.loads(path.read_text())["tables"].values()
    assert [row[0] for row in rows[1:]] == ["Llama", "limit: square products"]
    said = capsys.readouterr().err
    assert said.count("utilisation: tiny: 1 x 16 tokens, Llama: one call in ") == 1
    assert said.index("Llama: one call") < said.index("tiny: 1 x 16 tokens done")


def test_operations_are_those_of_the_forward_pass_three_times() -> None:
    """Products of weights, and of each token with the state, or with half of the other tokens."""
    size, rows, length = Size(16, 3, 2, 300), 2, 10
    layers = 3 * 12 * 16 * 16 + 300 * 16  # weights
    retnet, transformer = make_retnet(size), make_transformer(size)
    state = 2 * (8 * 16 + 8 * 16) * 2 * 3  # update and reading: 2 heads of K V = 8 x 16, 3 layers
    found = model_flops(Ours("RetNet", retnet), size, rows, length)
    assert found == 3 * rows * length * (2 * layers + state)
    pairs = 2 * (length / 2) * 2 * 16 * 3  # q k and weights v
    found = model_flops(Ours("Transformer compiled", transformer), size, rows, length)
    assert found == 3 * rows * length * (2 * layers + pairs)


def test_products_are_of_bfloat16() -> None:
    flops, prepare = utilisation.square_products(torch.device("cpu"))
    product = prepare()()
    assert isinstance(product, torch.Tensor)
    assert product.dtype == torch.bfloat16 and flops == 2 * product.shape[0] ** 3


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--length", "64", "--tokens", "32"], "--tokens (32)"), (["--sizes", "9b"], "'9b'")],
)
def test_bad_options_are_one_line(options: list[str], said: str, capsys) -> None:
    assert run(utilisation.main, [*SMALL, *options]) == 2
    assert said in capsys.readouterr().err
