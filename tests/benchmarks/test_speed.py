"""The harness at sizes that say nothing about speed: everybody takes part, nothing is guessed."""

import importlib
import json
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import kernels, memory, speed
from benchmarks.contenders import Field, Ours, Size, make_retnet, with_compiled
from benchmarks.family import PLAIN, STATE_FACT, variants
from benchmarks.limits import decode_bytes, linear_flops, linear_products, matmul_products
from benchmarks.measure import LIMIT, MATMULS, Measurement, Plan, Results
from benchmarks.others import TORCHSCALE, YET_ANOTHER, add_others
from benchmarks.report import format_targets, times
from benchmarks.speed import BENCHMARKS
from benchmarks.steps import ADAMW, MATRICES, MUON, NARROW, TORCHS
from benchmarks.targets import targets
from retnet.cli import run
from retnet.evaluation import Timing
from retnet.model import MIXERS

CPU = torch.device("cpu")
SIZE = Size(16, 1, 2, 300)
OPTIONS = ["--quick", "--no-compile", "--device", "cpu"]


@pytest.fixture
def others_absent(monkeypatch) -> None:
    """Other people's packages, as if they were not installed."""
    for name in ("torchscale", "yet_another_retnet", "llama_cpp"):
        for module in [x for x in sys.modules if x.partition(".")[0] == name]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture
def one_process(monkeypatch) -> None:
    """Memory measured here: the figures mean nothing, but it is quick."""

    def peak(*arguments) -> int | None:
        num_bytes = memory.peak_of(*arguments)
        return num_bytes if num_bytes is None else max(1, num_bytes)  # it may fit what is there

    monkeypatch.setattr(memory, "_in_own_process", peak)


@pytest.fixture
def threads():
    """Give torch its number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_everything_runs_and_is_written_down(
    others_absent, one_process, threads, tmp_path, capsys
) -> None:
    path = tmp_path / "speed.json"
    assert run(speed.main, ["all", *OPTIONS, "--threads", "1", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    written = json.loads(path.read_text())

    plan = Plan(CPU, torch.float32).quick()
    about = written["environment"]
    assert about["threads"] == 1
    assert about["dtype"] == "float32"
    assert torch.__version__.startswith(about["versions"]["torch"])  # with +cu130 or the like
    assert len(about["load_average"]) == 2
    for name in (TORCHSCALE, YET_ANOTHER, "llama.cpp", "compiled steps"):
        assert name in written["absent"]
        assert f"absent    {name}: {written['absent'][name]}" in printed

    assert {one["benchmark"] for one in written["measurements"]} == {*BENCHMARKS} - {"memory"}
    for one in written["measurements"]:
        assert len(one["timing"]["seconds"]) == 1
        assert one["tokens_per_second"] == one["tokens"] / one["timing"]["median"]
    names = {one["contender"] for one in written["measurements"]}
    forms = {"RetNet parallel", "RetNet chunkwise", "RetNet recurrent"}
    chunks = {"parallel", "chunks of 4", "chunks of 8"}
    loops = {"bare decode step", "generate.py loop", "model.generate"}
    own = {*variants(plan), PLAIN}
    assert {*MIXERS, "aft simple", "hybrid, window"} < own
    ours = {"RetNet", "Transformer", "Llama", LIMIT, MATMULS, *forms, *loops, *chunks}
    narrow = {name + NARROW for name in ("RetNet", "Transformer", LIMIT)}
    formats = {"RetNet bf16", "RetNet int8", "RetNet int4"}
    assert names == ours | own | narrow | formats | {ADAMW, MUON, MATRICES, TORCHS}
    for name in variants(plan):
        sizes = [written["facts"][STATE_FACT.format(name, n)] for n in plan.family_contexts]
        assert (sizes[1] > sizes[0]) == (name in ("attention", "aft full")), name
    assert len(written["memory"]) == 6

    missing = {one["title"] for one in written["targets"] if one["value"] is None}
    absent = ("torchscale", "compiled", "llama.cpp")
    assert all(any(name in title for name in absent) for title in missing)
    for row in written["targets"]:
        assert row["title"] in printed


def test_the_targets_are_those_of_the_issue() -> None:
    rows = targets(Plan(CPU, torch.float32), Results())
    assert all(row.value is None and row.reached is None for row in rows)
    assert [row.gate for row in rows if row.gate] == [0.8, 0.6] * 2
    assert sum("(gate 0.8)" in line for line in format_targets(rows)) == 2
    bounds = [(row.bound, row.at_least) for row in rows]
    training = [(4.5, True), (1, True), (1.3, True), (2, True)]
    training += [(0.65, True), (0.65, True), (0.9, True)]
    llama = [(0.6, False), (0.45, False)]  # weights of fewer bits, then against llama.cpp
    llama += [(bound, True) for bound in (0.85, 2.2, 1, 2.5, 4, 1, 2.5, 4)]
    steps = [(1.5, True), (2.5, True), (9, True), (0.75, True), (0.75, True), (6, True), (6, True)]
    assert bounds == [
        *training,
        (1.15, False),
        (0.95, True),
        (1.05, False),
        (1.05, False),
        *steps,
        (1.1, False),
        (2, False),
        *llama,  # as it is
        *llama,  # compiled
        (0.3, False),
        *((bound, False) for bound in (1.15, 1.15, 2, 2, 2)),  # the family's training steps
        *((1.5, False) for _ in range(5)),  # and its tokens
        (0.55, False),
    ]


def test_a_target_is_judged_by_rounds_side_by_side() -> None:
    plan, results = Plan(CPU, torch.float32), Results()
    case = "training step, 1 x 2048 tokens"
    for name, seconds in (("RetNet", (1.0, 10.0, 2.0)), ("Transformer", (1.4, 14.0, 1.0))):
        timing = Timing(seconds[0], 0, 0, 3, seconds)
        results.measurements.append(Measurement("train", case, name, 2048, timing))
    row = next(row for row in targets(plan, results) if "2048: against our Trans" in row.title)
    assert row.value == pytest.approx(1.4)
    assert row.reached


def test_options_that_change_the_run(one_process, others_absent, capsys) -> None:
    assert run(speed.main, ["prefill", *OPTIONS, "--dtype", "bfloat16"]) == 0
    printed = capsys.readouterr().out
    assert "bfloat16, 1 rounds" in printed
    assert "== prefill" in printed
    assert not any(f"== {name}" in printed for name in ("train", "decode", "memory"))
    assert Plan(CPU, torch.float32, rounds=3).rounds == 3


def test_the_number_of_rounds_is_the_users(monkeypatch, capsys) -> None:
    seen = []
    monkeypatch.setitem(speed.BENCHMARKS, "memory", lambda plan, results: seen.append(plan.rounds))
    assert run(speed.main, ["memory", "--no-compile", "--device", "cpu", "--rounds", "3"]) == 0
    assert seen == [3]


@pytest.mark.parametrize(
    ("benchmark", "parts"), [("decode", ["decode", "llama"]), ("llama", ["llama"])]
)
def test_decoding_is_measured_against_llama_too(benchmark, parts, monkeypatch) -> None:
    seen = []
    for name in ("decode", "llama"):
        monkeypatch.setitem(speed.BENCHMARKS, name, lambda *_, name=name: seen.append(name))
    assert run(speed.main, [benchmark, *OPTIONS]) == 0
    assert seen == parts


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["train", "--device", "abacus"], "--device (abacus)"),
        (["train", "--rounds", "0"], "--rounds"),
        (["all", "--json", "/nowhere/x.json"], "--json"),
        (["everything"], "everything"),
    ],
)
def test_mistakes_are_one_line(arguments, word, capsys) -> None:
    assert run(speed.main, arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert word in error
    assert error.count("\n") == 1


def test_no_compiler_is_named(monkeypatch, others_absent, capsys) -> None:
    def compile(*_: object, **__: object):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", compile)
    assert run(speed.main, ["prefill", "--quick", "--device", "cpu"]) == 0
    assert "compiled steps: torch.compile fails: no compiler here" in capsys.readouterr().out


def test_limits_count_every_linear_layer_once() -> None:
    model = make_retnet(SIZE)
    layers = 12 * 16**2 + 16 * 300
    assert linear_flops(model, 5) == 6 * 5 * layers
    for products in (linear_products, matmul_products):
        products(model, 5)()()
    norms = sum(weight.numel() for weight in model.parameters() if weight.dim() == 1)
    assert decode_bytes(model, 100) == 4 * (layers + norms) + 200  # the tied embedding once


def test_the_limit_in_another_type_has_operands_of_it() -> None:
    """And each precision's row is held against its own limit."""
    seen = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.update(x.dtype for x in args if isinstance(x, torch.Tensor))
            return func(*args, **(kwargs or {}))

    work = linear_products(make_retnet(SIZE), 5, torch.bfloat16)()
    with Watch():
        work()
    assert seen == {torch.bfloat16}
    names = {"RetNet": 8.0, "RetNet" + NARROW: 4.0, LIMIT: 4.0, LIMIT + NARROW: 1.0}
    group = [
        Measurement("steps", "pass", name, 1, Timing(s, s, s, 1, (s,))) for name, s in names.items()
    ]
    last = [line.split()[-1] for line in times(group)[2:]]
    assert last == ["0.50", "0.25", "1.00", "1.00"]


def test_the_row_by_mkl_is_measured_without_the_switch() -> None:
    """And the process has it again afterwards."""
    setting, seen = torch.backends.mkldnn.matmul, []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func._schema.name == "aten::mm":
                seen.append(setting.fp32_precision)
            return func(*args, **(kwargs or {}))

    model = make_retnet(SIZE)
    for products, expected in ((matmul_products, "ieee"), (linear_products, "bf16")):
        seen.clear()
        setting.fp32_precision = "bf16"
        work = products(model, 5)()
        with Watch():
            work()
        assert set(seen) == {expected}
        assert setting.fp32_precision == "bf16"


def test_compiled_ones_stand_beside_the_plain_ones() -> None:
    model = make_retnet(SIZE)
    both = with_compiled([Ours("RetNet", model), Ours("RetNet parallel", model, mode="parallel")])
    assert [one.name for one in both] == ["RetNet", "RetNet compiled", "RetNet parallel"]


def test_decoding_starts_from_the_same_memory_each_time(monkeypatch) -> None:
    contender = Ours("RetNet", make_retnet(SIZE))
    seen = []
    decode = contender.decode

    def spy(memory, token):
        seen.append(memory.get_seq_length())
        return decode(memory, token)

    monkeypatch.setattr(contender, "decode", spy)
    prepare = contender.decoding(torch.zeros(1, 7, dtype=torch.int64), 3)
    prepare()()
    prepare()()
    assert seen == [7, 8, 9] * 2


def test_our_kernel_has_its_gradients(monkeypatch) -> None:
    plan, results = Plan(CPU, torch.float32, rounds=1), Results()
    kernels.kernels(plan, results)
    assert "need a GPU" in results.absent[kernels.FLA]
    names = {"RetNet chunkwise": kernels.chunkwise(None)}
    (piece,) = kernels.kernel_pieces((1, 9, 2, 4), names, plan)
    assert piece.tokens == 9
    piece.prepare()()


@pytest.mark.parametrize("package", [TORCHSCALE, YET_ANOTHER])
def test_other_peoples_models_compute_one_thing_in_all_forms(package) -> None:
    """What is timed as a decode step continues what is timed as prefill."""
    pytest.importorskip(package.replace("-", "_"))
    field = Field(CPU, torch.float32)
    add_others(field, SIZE, forms=True)
    parallel, chunkwise = (one for one in field.contenders if one.name.startswith(package))
    ids = torch.randint(300, (2, 9), generator=torch.Generator().manual_seed(0))
    assert parallel.loss(ids, ids).item() == pytest.approx(chunkwise.loss(ids, ids).item(), 1e-4)
    with torch.inference_mode():
        parallel.model.eval()
        memory = chunkwise.remember(ids[:, :-1], 1)
        step = chunkwise.decode(memory, ids[:, -1])
        whole = chunkwise.remember(ids, 0)
        again = chunkwise.decode(whole, ids[:, 0])
    assert step.shape == again.shape == (2, 300)


def test_the_stand_in_for_timm_is_only_torchscales() -> None:
    pytest.importorskip("torchscale")
    if importlib.util.find_spec("timm"):
        pytest.skip("timm itself is installed")
    add_others(Field(CPU, torch.float32), SIZE, forms=False)
    assert "timm" not in sys.modules
    drop_path = importlib.import_module("torchscale.component.droppath").drop_path
    with pytest.raises(NotImplementedError, match="drop path is off"):
        drop_path()


@pytest.mark.slow
def test_memory_of_a_process_of_its_own_grows_with_the_tokens() -> None:
    plan = Plan(CPU, torch.float32, size=Size(64, 2, 2, 512))
    ours = torch.ones(300_000_000)  # what the process that asks has held counts for nothing
    del ours
    few, many = (memory._in_own_process("RetNet", rows, 256, plan) for rows in (1, 32))
    assert 5 * few < many
