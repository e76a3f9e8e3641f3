"""Which versions of the libraries were tried, said in one way everywhere."""

import tomllib
import warnings
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from retnet.checkpoints.adapter import PEFT
from retnet.versions import TRIED, warn_of_untried

ROOT = Path(__file__).parents[1]


def listed(file: str) -> dict[str, SpecifierSet]:
    lines = (ROOT / file).read_text().splitlines()
    found = (Requirement(line) for line in lines if line and line[0] not in "#-")
    return {requirement.name: requirement.specifier for requirement in found}


def test_requirements_are_the_tried_ranges() -> None:
    required = listed("requirements.txt")
    for name, (first, end) in TRIED.items():
        assert required[name] == SpecifierSet(f">={first},<{end}")


def test_the_constraints_are_within_them() -> None:
    required = listed("requirements.txt") | listed("requirements-dev.txt")
    for name, pinned in listed("constraints.txt").items():
        (exact,) = pinned
        assert exact.operator == "==" and exact.version in required[name]


def test_an_extra_is_what_the_tests_run_with() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tried = listed("requirements-dev.txt")
    extras = [Requirement(line) for of in project["optional-dependencies"].values() for line in of]
    shared = [extra for extra in extras if extra.name in tried]
    assert {extra.name for extra in shared} >= {"peft", "tensorboard"}
    assert all(extra.specifier == tried[extra.name] for extra in shared)


def test_what_is_installed_is_no_reason_to_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_untried()


@pytest.mark.parametrize("tried", [("1", "2.0"), ("9000", "9001")])
def test_older_and_newer_ones_are_warned_of(tried: tuple[str, str]) -> None:
    with pytest.warns(UserWarning, match="torch 2.* was not tried"):
        warn_of_untried({"torch": tried, "no-such-library": tried})


def test_a_message_asks_for_the_peft_that_was_tried() -> None:
    asked = Requirement(PEFT)
    assert asked.specifier == listed("requirements-dev.txt")[asked.name]
