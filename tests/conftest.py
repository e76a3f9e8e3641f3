"""Fixtures of tests that look at more than one package."""

import gc
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

AT_THE_START = torch.backends.mkldnn.matmul.fp32_precision


def pytest_collection_finish() -> None:
    """Modules stay: a collection need not look at them (accelerate asks for one in each run)."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints, and files with something wrong, for all that only read them."""
    from tests.places import make_places  # imports everything: not for tests of one part

    return make_places(tmp_path_factory.mktemp("places"))


@pytest.fixture(autouse=True)
def _torchs_own_products() -> Iterator[None]:
    """Entry points set which library multiplies, for their process: no test hands that on."""
    setting = torch.backends.mkldnn.matmul
    setting.fp32_precision = AT_THE_START  # a fixture of several tests may have run one
    yield
    setting.fp32_precision = AT_THE_START


@pytest.fixture(autouse=True)
def _pythons_own_ctrl_c() -> Iterator[None]:
    """Entry points decide about Ctrl-C for their process: no test hands that on."""
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)
