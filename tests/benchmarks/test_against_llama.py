"""llama.cpp computes what transformers' Llama does; our table says who is faster, who is absent."""

import importlib.util
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import against_llama as module
from benchmarks.against_llama import (
    NAME,
    PLAIN,
    against_llama,
    caches_fit,
    llama_case,
    our_contenders,
    places,
    summary,
    their_contenders,
)
from benchmarks.contenders import Size, make_llama
from benchmarks.llamacpp import BLOCK, FLASH_UP_TO, KINDS, LlamaCpp, token_ids, write_gguf
from benchmarks.measure import LLAMA, Measurement, Plan, Results
from benchmarks.targets import targets
from retnet.evaluation import Timing
from retnet.model.fast_decode import products

CPU = torch.device("cpu")
PLAN = Plan(CPU, torch.float32, compiled=False).quick()
needs_llama = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llama_cpp", "gguf")),
    reason="benchmarks/requirements-llama.txt is not installed",
)


@pytest.fixture
def absent(monkeypatch) -> None:
    monkeypatch.setattr(module, "absence", lambda: "not here")


def odd_llama() -> LlamaForCausalLM:
    """Nothing about it is a default, and positions matter to it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        rms_norm_eps=1e-3,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4) if weight.dim() > 1 else weight.uniform_(0.5, 1.5)
    return model


@torch.inference_mode()
def logits_after(model: LlamaForCausalLM, ids: Tensor, start: int) -> np.ndarray:
    """[T - start, vocab]"""
    return model(ids).logits[0, start:].numpy()


@needs_llama
@pytest.mark.parametrize("context", [30, FLASH_UP_TO + 40])
def test_logits_are_those_of_transformers(context, tmp_path) -> None:
    """In each format and on both of its ways to attend, of texts side by side, after a cut too."""
    model, rows, more = odd_llama(), 3, 6
    ids = torch.randint(320, (1, context + more), generator=torch.Generator().manual_seed(1))
    expected = logits_after(model, ids, context)
    errors = {}
    with ExitStack() as stack:
        first = None
        for kind in KINDS:
            write_gguf(model, kind, tmp_path / kind)
            one = LlamaCpp(kind, tmp_path / kind, 1)
            stack.callback(one.close)
            assert one.num_parameters == sum(weight.numel() for weight in model.parameters())
            text = stack.enter_context(one.texts(rows, context + more))
            if first is None:
                text.read(token_ids(ids[:, :context]))
                first = text
            else:
                text.take(first)
            for _ in range(2):
                text.forget(context)
                tokens = ids[0, context:].tolist()
                found = np.stack([text.step(np.full(rows, x, np.int32)).copy() for x in tokens])
                assert np.array_equal(found[:, 0], found[:, rows - 1])
                errors[kind] = np.abs(found[:, 1] - expected).max() / np.abs(expected).max()
    assert errors["f32"] < 3e-3  # keys and values are f16
    assert errors["f32"] < errors["q8_0"] < 0.05 < errors["q4_0"] < 0.5


@needs_llama
def test_rows_go_their_own_ways(tmp_path) -> None:
    """Texts that begin alike share nothing afterwards, and decoding is greedy from a cut cache."""
    model = odd_llama()
    ids = torch.randint(320, (1, 20), generator=torch.Generator().manual_seed(2))
    write_gguf(model, "f32", tmp_path / "f32")
    one = LlamaCpp("f32", tmp_path / "f32", 1)
    with one.texts(2, 64) as text:
        text.read(token_ids(ids))
        text.step(np.array([5, 7], np.int32))
        found = text.step(np.array([11, 11], np.int32)).copy()
        for row, token in enumerate((5, 7)):
            whole = torch.cat((ids, torch.tensor([[token, 11]])), dim=1)
            assert np.abs(found[row] - logits_after(model, whole, 21)[0]).max() < 0.02
        fed = []
        text.step = lambda tokens, step=text.step: fed.append(tokens.tolist()) or step(tokens)
        prepare = text.decoding(20, 4)
        prepare()()
        prepare()()
        assert text.length == 24
    one.close()
    assert fed[:4] == fed[4:]
    token = torch.zeros(1, 1, dtype=torch.int64)
    for seen, _ in fed[:4]:
        assert seen == token.item()
        ids = torch.cat((ids, token), dim=1)
        token = torch.tensor([[logits_after(model, ids, ids.shape[1] - 1).argmax()]])


@needs_llama
def test_what_is_no_model_is_not_measured(tmp_path) -> None:
    (tmp_path / "x").write_text("no model")
    with pytest.raises(RuntimeError, match="does not load x"):
        LlamaCpp("x", tmp_path / "x", 1)


@needs_llama
def test_everybody_takes_part() -> None:
    results = Results()
    against_llama(PLAN, results)
    assert not results.absent
    ours = [PLAIN, *(f"{PLAIN} {weights}" for weights in ("bf16", "int8", "int4"))]
    for place in places(PLAN):
        case = llama_case(PLAN.size, *place, results)
        group = [one.contender for one in results.measurements if one.case == case]
        assert group == [*ours, *(f"{NAME} {kind}" for kind in KINDS)], case
    rows = [row for row in targets(PLAN, results) if NAME in row.title]
    assert len(rows) == 8
    assert all(row.value is not None for row in rows)


def test_llama_has_whole_blocks_and_as_many_parameters() -> None:
    size = Size(64, 2, 2, 320)
    model = make_llama(size, BLOCK)
    assert model.config.intermediate_size == 160  # the nearest to 171
    assert make_llama(size).config.intermediate_size == 171


def test_without_llama_ours_are_measured_in_each_format(absent) -> None:
    results = Results()
    against_llama(PLAN, results)
    assert results.absent == {NAME: "not here"}
    both, many = summary(PLAN, results)
    assert both[0] == "| ms a token | RetNet | RetNet bf16 | RetNet int8 | RetNet int4 |"
    assert [line.split(" | ")[0] for line in both[2:]] == [
        f"| 0.0227M parameters, 1 row after {context} tokens" for context in PLAN.llama_contexts
    ]
    assert "| 0.0227M parameters, 3 rows after 4 tokens |" in many[-1]
    values = [row.value for row in targets(PLAN, results) if "weights against float32" in row.title]
    assert len(values) == 2
    assert all(values)


def test_a_format_without_its_operator_is_absent(absent, monkeypatch) -> None:
    """And not measured by the plain product that takes its place."""
    kind = products.QuantisedProduct
    made = kind.__init__

    def without_int8(self, layers) -> None:
        made(self, layers)
        self.problem = "no such product" if self.weights == "int8" else ""

    monkeypatch.setattr(kind, "__init__", without_int8)
    results = Results()
    names = [one.name for one in our_contenders(PLAN, PLAN.size, results)]
    assert names == [PLAIN, f"{PLAIN} bf16", f"{PLAIN} int4"]
    assert results.absent == {f"{PLAIN} int8": "no such product"}


def test_each_is_compiled_too() -> None:
    for compiled in (False, True):
        plan = replace(PLAN, compiled=compiled)
        ours = our_contenders(plan, PLAN.size, Results())
        plain = [x.name for x in ours if not x.compiled]
        assert [x.name for x in ours if x.compiled] == [f"{x} compiled" for x in plain if compiled]


def test_what_another_has_read_is_what_reads_itself() -> None:
    """For as many rows as are wanted, and each round from the same states."""
    one = our_contenders(PLAN, PLAN.size, Results())[0]
    ids = module.random_ids(1, 7, PLAN, PLAN.size).expand(2, -1)
    with torch.inference_mode():
        taken, own = one.remember(ids, 3), one.read(ids)
    for name, x in own.tensors().items():
        assert torch.allclose(taken.tensors()[name].double(), x.double(), atol=1e-5), name


def test_caches_beyond_half_of_the_memory_are_left_out(monkeypatch) -> None:
    size = Size(64, 2, 2, 320)
    need = 3 * 5 * 100 * 2 * 2 * 2 * 64  # contenders, rows, tokens, layers, K and V, bytes, width
    for memory, fits in ((2 * need, True), (2 * need - 1, False), (None, True)):
        monkeypatch.setattr(module, "memory_of", lambda device, memory=memory: memory)
        assert caches_fit(3, size, 5, 100) == fits


def test_the_table_compares_formats_of_one_size() -> None:
    results = Results(parameters={str(PLAN.size): {PLAIN: 4_200_000}})
    times = {PLAIN: 8.0, f"{PLAIN} int8": 2.0, f"{PLAIN} int8 compiled": 1.0}
    times |= {f"{NAME} f32": 10.0, f"{NAME} q8_0": 5.0}
    for rows, context in ((1, 4), (3, 4)):
        case = llama_case(PLAN.size, rows, context, results)
        for name, s in times.items():
            timing = Timing(s, s, s, 1, (s,))
            results.measurements.append(Measurement(LLAMA, case, name, 1000 * rows, timing))
    one, many = summary(PLAN, results)
    head = " | RetNet | RetNet int8 | RetNet int8 compiled | llama.cpp f32 | llama.cpp q8_0"
    head += " | float32: x faster | int8: x faster | int8 compiled: x faster |"
    assert one[0] == f"| ms a token{head}"
    assert one[2] == (
        "| 4.2M parameters, 1 row after 4 tokens | 8.00 | 2.00 | 1.00 | 10.00 | 5.00 |"
        " 1.25 | 2.50 | 5.00 |"
    )
    assert one[3].count("|  ") == 8  # not measured: empty
    assert many[0] == f"| tokens/s{head}"
    assert many[-1] == (
        "| 4.2M parameters, 3 rows after 4 tokens | 375 | 1,500 | 3,000 | 300 | 600 |"
        " 1.25 | 2.50 | 5.00 |"
    )
    found = {row.title: row.value for row in targets(PLAN, results)}
    assert found["decode at width 32 after 4 tokens: int8 against llama.cpp q8_0"] == 2.5
    assert found["decode at width 32 after 4 tokens: int8 compiled against llama.cpp q8_0"] == 5
    assert found["decode at width 32: int8 weights against float32, ms/token"] == 0.25
    assert found["decode at width 32: ms/token, eager or compiled"] == 8


@needs_llama
def test_the_files_are_gone_afterwards(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))
    with their_contenders(Size(32, 1, 2, 320)) as contenders:
        assert len(contenders) == 3
        assert len([x for x in tmp_path.rglob("*") if x.is_file()]) == 3
    assert not list(Path(tmp_path).iterdir())
