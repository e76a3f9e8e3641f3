"""Fixtures of tests that look at more than one package."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints, and files with something wrong, for all that only read them."""
    from tests.places import make_places  # imports everything: not for tests of one part

    return make_places(tmp_path_factory.mktemp("places"))
