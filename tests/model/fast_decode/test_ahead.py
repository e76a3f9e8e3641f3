"""Decode steps that are compiled ahead of time and kept: with a stand-in for the compiler, which
runs what it was given with the constants that it is told, and once with torch's own."""

import copy
import gc
import os
import shutil
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from retnet.generation import generate, prefill
from retnet.model.fast_decode import ahead, quantised
from retnet.model.fast_decode.ahead import AheadOfTime
from retnet.model.fast_decode.step import DecodeStep
from retnet.model.fast_decode.weights import MOST_LEFT
from retnet.model.quantised import quantised_format, replace_linears
from tests.generation.builders import tiny_model
from tests.model.fast_decode.cases import random_ids

never_dropped: list[torch.Tensor] = []


class Loaded:
    """What the stand-in makes of a package."""

    def __init__(self, exported: Any) -> None:
        self.exported = exported

    @property
    def loader(self) -> "Loaded":
        return self

    def get_constant_fqns(self) -> list[str]:
        return list(self.exported.constants)

    def load_constants(self, constants: dict[str, torch.Tensor], **options: bool) -> None:
        assert options == {"check_full_update": True, "user_managed": True}
        self.constants = constants
        never_dropped.extend(constants.values())  # as torch 2.13 does

    def boxed_run(self, inputs: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        """With the strides built in, as the compiler does it."""
        pairs = zip(inputs, self.exported.example_inputs[0], strict=True)
        given = iter([x.as_strided(y.shape, y.stride()) for x, y in pairs])
        arguments = [
            self.constants[spec.target] if spec.target else next(given)
            for spec in self.exported.graph_signature.input_specs
        ]
        return self.exported.graph_module(*arguments)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """All that the stand-in has compiled."""
    made: list[Any] = []

    def compile(exported: Any, *, package_path: str, inductor_configs: dict[str, Any]) -> None:
        Path(package_path).write_text(str(len(made)))
        made.append(exported)

    def load(path: str) -> Loaded:
        return Loaded(made[int(Path(path).read_text())])  # a ValueError where it was damaged

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compile)
    monkeypatch.setattr(torch._inductor, "aoti_load_package", load)
    return made


def refused(*args: Any, **options: Any) -> torch.Tensor:
    raise AssertionError("the step went the other way")


def run(
    model: Any, folder: Path, rows: int = 1, otherwise: Any = refused, **tolerance: float
) -> AheadOfTime:
    """Some tokens by the step, as by the plain one; the same states afterwards.

    Of quantised weights the model's own pass is the plain one: it rounds no activation.
    """
    ids, cache = random_ids(rows, 9), model.new_cache()
    prefill(model, ids[:, :6], cache)
    plain, plain_cache = plain_step(model), copy.deepcopy(cache)
    step = DecodeStep(model)
    step.faster = AheadOfTime(step, otherwise, folder)
    with torch.inference_mode():
        for t in range(6, 9):
            expected = plain(ids[:, t], plain_cache)
            torch.testing.assert_close(step(ids[:, t], cache), expected, **tolerance)
    for mine, other in zip(cache.tensors().values(), plain_cache.tensors().values(), strict=True):
        torch.testing.assert_close(mine, other, **tolerance)
    return step.faster


def plain_step(model: Any) -> Any:
    if quantised_format(model) is None:
        return DecodeStep(model)
    return lambda tokens, cache: model(tokens[:, None], past_key_values=cache).logits[:, 0]


# rwkv: of whose weights some tensors are made; performer: whose projection is one
SLOW = (pytest.param(mixer, marks=pytest.mark.slow) for mixer in ("rwkv", "performer"))


@pytest.mark.parametrize("mixer", ["retention", *SLOW])
def test_a_kept_program_takes_the_weights_of_the_next_model(
    mixer: str, compiled: list[Any], tmp_path: Path
) -> None:
    run(tiny_model(mixer), tmp_path / "steps")
    run(tiny_model(mixer, seed=1), tmp_path / "steps")
    assert len(compiled) == 1
    assert sorted(f.suffix for f in (tmp_path / "steps").iterdir()) == [".json", ".pt2"]


def test_tokens_that_are_a_column(compiled: list[Any], tmp_path: Path) -> None:
    """Those that a sampler draws for several samples are."""
    model, drawn = tiny_model("retention"), random_ids(3, 3)
    assert drawn[:, 0].tolist() != drawn[0].tolist()
    cache = model.new_cache()
    prefill(model, random_ids(3, 6), cache)
    step = DecodeStep(model)
    step.faster = AheadOfTime(step, refused, tmp_path)
    with torch.inference_mode():
        expected = DecodeStep(model)(drawn[:, 0], copy.deepcopy(cache))
        torch.testing.assert_close(step(drawn[:, 0], cache), expected)
    assert compiled


@pytest.mark.parametrize("ending", [".pt2", pytest.param(".json", marks=pytest.mark.slow)])
def test_what_is_damaged_is_compiled_anew(ending: str, compiled: list[Any], tmp_path: Path) -> None:
    model = tiny_model("retention")
    run(model, tmp_path)
    (kept,) = tmp_path.glob(f"*{ending}")
    whole = kept.read_bytes()
    kept.write_text("?")
    run(model, tmp_path)
    assert len(compiled) == 2
    assert len(kept.read_bytes()) == len(whole)


def test_a_folder_that_cannot_be_written(compiled: list[Any], tmp_path: Path, caplog: Any) -> None:
    (tmp_path / "file").touch()
    with caplog.at_level("INFO"):
        run(tiny_model("retention"), tmp_path / "file" / "steps")
    assert len(compiled) == 1
    assert "the compiled step is not kept for later" in caplog.text


def test_the_programs_that_were_used_last_are_kept(
    compiled: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of three: the first is used once more; of an unfinished copy nothing stays."""
    monkeypatch.setattr(ahead, "MOST_KEPT", 2)
    model = tiny_model("retention")
    (tmp_path / "unfinished").touch()

    def names() -> set[str]:
        return {file.name for file in tmp_path.iterdir()}

    def grow_older() -> None:
        for file in tmp_path.iterdir():
            then = file.stat().st_mtime - 60
            os.utime(file, (then, then))

    grow_older()
    run(model, tmp_path, 1)
    first = names() - {"unfinished"}
    grow_older()
    run(model, tmp_path, 2)
    second = names() - first
    assert len(second) == 2
    grow_older()
    run(model, tmp_path, 1)
    assert names() == first | second
    grow_older()
    run(model, tmp_path, 3)
    assert names() > first
    assert len(names()) == 4
    assert not names() & second


def test_who_goes_the_other_way(compiled: list[Any], tmp_path: Path, caplog: Any) -> None:
    """Many rows, and what the compiler fails at; it is not asked twice."""
    model = tiny_model("retention")
    plain = DecodeStep._compute
    many = run(model, tmp_path, MOST_LEFT + 1, plain)
    assert many.programs == {MOST_LEFT + 1: None}
    assert not compiled
    with pytest.MonkeyPatch.context() as patch, caplog.at_level("INFO"):
        patch.setattr(torch.export, "export", refused)
        failed = run(model, tmp_path, 2, plain)
    assert failed.programs == {2: None}
    assert caplog.text.count("not ahead of time: the step went the other way") == 1
    assert not list(tmp_path.iterdir())


def test_all_that_a_program_depends_on_is_in_its_name() -> None:
    def key(model: Any, rows: int = 1) -> str:
        held = [torch.zeros(rows, 2)]
        return AheadOfTime(DecodeStep(model), refused, Path())._key(rows, held)

    model = tiny_model("retention")
    keys = [key(model), key(model, 2), key(tiny_model("retention", dtype=torch.float32))]
    changed = tiny_model("retention")
    changed.config.norm_eps *= 2
    keys.append(key(changed))
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    keys.append(key(model))
    torch.set_num_threads(threads)
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    keys.append(key(model))
    torch.backends.mkldnn.matmul.fp32_precision = "none"
    assert len(set(keys)) == len(keys)
    assert key(tiny_model("retention", seed=1)) == keys[0]


def test_a_program_that_computes_something_else_is_not_taken(
    compiled: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    model = tiny_model("retention")
    other = Loaded.boxed_run
    monkeypatch.setattr(Loaded, "boxed_run", lambda *given: [x * 1.01 for x in other(*given)])
    with caplog.at_level("INFO"):
        run(model, tmp_path, 1, DecodeStep._compute)
    assert "it computes something else" in caplog.text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("factor", "taken"), [(1.01, True), (1.03, False)])
def test_steps_that_round_activations_are_further_apart(
    factor: float, taken: bool, compiled: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("retention", dtype=torch.float32)
    replace_linears(model, "bf16")
    other = Loaded.boxed_run
    monkeypatch.setattr(Loaded, "boxed_run", lambda *given: [x * factor for x in other(*given)])
    run(model, tmp_path, 1, DecodeStep._compute, rtol=0.05, atol=0.05)
    assert bool(list(tmp_path.iterdir())) == taken


def test_a_kept_program_that_computes_something_else_is_made_anew(
    compiled: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    model = tiny_model("retention")
    run(model, tmp_path)
    other = Loaded.boxed_run

    def spoilt(program: Loaded, inputs: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        factor = 1.01 if program.exported is compiled[0] else 1.0
        return [x * factor for x in other(program, inputs)]

    monkeypatch.setattr(Loaded, "boxed_run", spoilt)
    with caplog.at_level("INFO"):
        run(model, tmp_path)
    assert len(compiled) == 2
    assert "is compiled anew: it computes something else" in caplog.text


def test_a_kept_program_takes_the_packed_weights_of_the_next_model(
    compiled: list[Any], tmp_path: Path, packed_int8: None
) -> None:
    """Those are no tensors: the program has a tensor that stands for each."""
    for seed in range(2):
        model = tiny_model("retention", dtype=torch.float32, seed=seed)
        replace_linears(model, "int8")
        run(model, tmp_path, rows=2, atol=1e-3, rtol=0)
    assert len(compiled) == 1
    assert "packed_linear" in str(compiled[0].graph)


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_a_program_of_one_row_rounds_no_activation(
    weights: str, compiled: list[Any], tmp_path: Path, packed_int8: None
) -> None:
    model = tiny_model("retention", dtype=torch.float32)
    replace_linears(model, weights)
    run(model, tmp_path)
    assert "packed_linear" not in str(compiled[0].graph)


@pytest.fixture
def packed_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    """FBGEMM's product for small layers too."""
    if problem := quantised._problem(quantised.Int8, "int8", "cpu"):
        pytest.skip(problem)
    monkeypatch.setattr(quantised, "SMALL", 0)


def test_a_compiled_step_that_is_dropped_leaves_nothing_in_memory(
    compiled: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, as one that is not compiled; the stand-in has only the first model's weights."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    run(tiny_model("retention"), tmp_path)
    for folder in (None, tmp_path):
        check_dropped(folder)
    assert len(compiled) == 1


def check_dropped(folder: Path | None) -> None:
    model = tiny_model("retention", seed=1)
    ids, cache = random_ids(1, 9), model.new_cache()
    prefill(model, ids[:, :8], cache)
    gc.disable()
    try:
        step = DecodeStep(model).compile(folder)
        with torch.inference_mode():
            step(ids[:, 8], cache)
        weight = weakref.ref(step.embedding)
        memory = StorageWeakRef(step.embedding.untyped_storage())
        del step
        assert weight() is None
        del model, cache
        gc.collect()
        assert memory.expired()
    finally:
        gc.enable()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("mixer", ["retention", "gated_retention", "linear", "rwkv"])
def test_torchs_own_compiler(mixer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second time nothing is compiled."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, ids = tiny_model(mixer, dtype=torch.float32), random_ids(1, 6)
    expected = list(generate(model, ids, max_new_tokens=8))
    assert list(generate(model, ids, max_new_tokens=8, compile=True)) == expected
    assert len(list((tmp_path / "retnet" / "steps").iterdir())) == 2
    monkeypatch.setattr(torch.export, "export", refused)
    monkeypatch.setattr(torch, "compile", lambda *args, **options: refused)
    run(model, tmp_path / "retnet" / "steps")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
def test_torchs_own_compiler_with_quantised_weights(
    weights: str, tmp_path: Path, packed_int8: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda *args, **options: refused)
    for seed in range(2):
        model = tiny_model("retention", dtype=torch.float32, seed=seed)
        replace_linears(model, weights)
        # int4's product rounds activations
        run(model, tmp_path, **({"atol": 0.06, "rtol": 0} if weights == "int4" else {}))
        monkeypatch.setattr(torch.export, "export", refused)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_torchs_own_compiler_for_several_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch, "compile", lambda *args, **options: refused)
    model, ids = tiny_model("retention", dtype=torch.float32), random_ids(1, 6)
    expected = list(generate(model, ids, max_new_tokens=8, num_samples=3))
    assert list(generate(model, ids, max_new_tokens=8, num_samples=3, compile=True)) == expected
