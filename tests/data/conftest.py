"""Fixtures of the data package's tests: no network, and specs with a cache of their own."""

from collections.abc import Callable
from pathlib import Path

import pytest

from retnet.data import DataSpec


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def spec_for(tmp_path: Path) -> Callable[..., DataSpec]:
    """A spec with byte tokens, short windows and a cache of its own."""

    def make(source: Path | str, **options: object) -> DataSpec:
        defaults = {"tokenizer": "bytes", "seq_len": 8, "cache_dir": str(tmp_path / "cache")}
        return DataSpec(source=str(source), **{**defaults, **options})  # type: ignore[arg-type]

    return make
