"""How torch and the C library are set up.

Freed memory is kept: counted in page faults of other processes. Products by oneDNN keep all digits.
"""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import retnet.training.run as run
from retnet import cli, machine
from retnet.errors import UserError
from retnet.machine import memory_of, set_up_compiler, steps_folder, use_fast_products
from retnet.training.config import Config
from tests.model.conftest import make_model, random_ids

SETTING = torch.backends.mkldnn.matmul
WITHOUT = SETTING.fp32_precision  # after the imports
CPU = torch.device("cpu")

FAULTS = """
import resource, sys
import torch
from retnet.machine import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def use():
    torch.ones(10_000_000)  # 40 MB
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):  # small blocks that settle in between may move it a few times
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")


def faults(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", FAULTS, *arguments], capture_output=True, text=True, env=env
    )


@needs_glibc
@pytest.mark.slow
def test_large_blocks_are_mapped_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    kept, given_back = (int(faults(how).stdout) for how in ("keep", "leave"))
    assert given_back > 10_000 and kept < given_back / 4


@needs_glibc
@pytest.mark.slow
def test_the_users_own_settings_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "4")
    refused = faults("keep")
    assert refused.returncode and "AssertionError" in refused.stderr


def test_training_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class AskedError(Exception):
        pass

    def ask() -> None:
        raise AskedError

    monkeypatch.setattr(run, "keep_freed_memory", ask)
    with pytest.raises(AskedError):
        run.train(Config())


def test_the_memory_of_a_device() -> None:
    found = memory_of(torch.device("cpu"))
    assert found is None or found > 2**28
    assert memory_of(torch.device("meta")) is None


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if oneDNN's kernels were the faster ones here; they are right on every CPU."""
    monkeypatch.setattr(machine, "_has_kernels", lambda: True)


def exact_products() -> None:
    """Set the switch, or skip."""
    if not use_fast_products():
        pytest.skip("a CPU whose products round to bfloat16 when they may")
    assert SETTING.fp32_precision == "bf16"


def test_importing_sets_nothing() -> None:
    assert WITHOUT != "bf16"


def test_entry_points_set_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(cli, "use_fast_products", lambda: calls.append(1))
    assert cli.run(lambda argv: len(calls), []) == 1


def test_all_digits_are_kept(kernels: None) -> None:
    """Float64 says how far float32 products may be off; bfloat16 would be 10,000 times as far."""
    exact_products()
    a, b = torch.randn(8, 64, 512), torch.randn(8, 512, 96)
    exact = a.double() @ b.double()
    for found, expected in ((torch.bmm(a, b), exact), (a[0] @ b[0], exact[0])):
        assert (found - expected).abs().max() < 2e-4 < (expected - expected.bfloat16()).abs().max()


def test_it_is_set_once(kernels: None) -> None:
    exact_products()
    assert use_fast_products()
    assert SETTING.fp32_precision == "bf16"


@pytest.mark.parametrize(("have", "exact"), [(True, False), (False, True)])
def test_it_is_not_set_where_it_costs(
    have: bool, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Digits, or time."""
    monkeypatch.setattr(machine, "_has_kernels", lambda: have)
    monkeypatch.setattr(machine, "_keeps_all_digits", lambda: exact)
    assert not use_fast_products()
    assert SETTING.fp32_precision == WITHOUT


def test_rounded_products_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: real(a.bfloat16(), b.bfloat16()).float())
    assert not machine._multiplies_exactly()


def test_the_question_is_answered_whatever_is_on() -> None:
    """Modes in which nothing is computed, another default type and device."""
    ask = machine._keeps_all_digits.__wrapped__
    with FakeTensorMode(), torch.device("meta"), torch.inference_mode():
        assert ask() == machine._keeps_all_digits()
    torch.set_default_dtype(torch.float64)
    try:
        assert ask() == machine._keeps_all_digits()
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("own", ["none", "ieee", "tf32"])
def test_the_question_leaves_the_setting_as_it_was(own: str) -> None:
    SETTING.fp32_precision = own
    machine._keeps_all_digits.__wrapped__()
    assert SETTING.fp32_precision == own


@pytest.mark.parametrize("mixer", ["retention", "attention"])
def test_a_training_step_with_it_and_without(mixer: str, kernels: None) -> None:
    """The same loss and gradients; so with one thread and with two."""
    model, ids = make_model(mixer, torch.float32), random_ids(2, 64)
    before, results = torch.get_num_threads(), []
    try:
        for fast, threads in ((False, 1), (True, 1), (True, 2)):
            torch.set_num_threads(threads)
            if fast:
                exact_products()
            loss = model(ids, labels=ids, return_logits=False).loss
            results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("key", ["max_autotune", "max_autotune_gemm"])
def test_autotuning_compilers_are_left_the_choice(key: str) -> None:
    """They ask for the precision in a way that knows no setting of one library alone."""
    import torch._inductor.config as compiler

    SETTING.fp32_precision = "bf16"
    set_up_compiler(torch.device("meta"), "--compile")
    assert SETTING.fp32_precision == "bf16"
    with compiler.patch(**{key: True}):
        set_up_compiler(torch.device("meta"), "--compile")
    assert SETTING.fp32_precision == "none"


def test_no_compiler_is_said_with_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"--compile needs a C\+\+ compiler .*no-such-compiler"):
        set_up_compiler(CPU, "--compile")


def test_where_compiled_steps_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert steps_folder() == Path("/caches/retnet/steps")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: Path("/home/me"))
    assert steps_folder() == Path("/home/me/.cache/retnet/steps")

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert steps_folder() is None
