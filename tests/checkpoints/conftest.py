"""A checkpoint folder, and a copy of it to spoil."""

import shutil
from pathlib import Path

import pytest

from tests.generation.builders import save_checkpoint


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("saved") / "final", record={"key": 1})


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))
