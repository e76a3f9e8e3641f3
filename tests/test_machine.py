"""How much memory there is; freed memory is kept: counted in page faults of other processes."""

import platform
import subprocess
import sys

import pytest
import torch

import retnet.training.run as run
from retnet.machine import memory_of
from retnet.training.config import Config

FAULTS = """
import resource, sys
import torch
from retnet.machine import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def use():
    torch.ones(20_000_000)  # 80 MB
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(30):  # small blocks that settle in between may move it a few times
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")


def faults(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", FAULTS, *arguments], capture_output=True, text=True, env=env
    )


@needs_glibc
def test_large_blocks_are_mapped_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    kept, given_back = (int(faults(how).stdout) for how in ("keep", "leave"))
    assert given_back > 10_000 and kept < given_back / 4


@needs_glibc
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
