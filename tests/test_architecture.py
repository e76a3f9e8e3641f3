"""Imports between the packages point one way."""

import ast
from pathlib import Path

import pytest

LEAVES = {"cli", "errors", "files", "machine", "paths"}
PACKAGES = ("model", "data", "checkpoints", "generation", "evaluation", "training", "experiments")
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "cli": {"errors"},
    "files": {"errors"},
    "machine": {"errors"},
    "paths": {"errors"},
    "model": set(),
    **{name: LEAVES | set(PACKAGES[:i]) for i, name in enumerate(PACKAGES) if i},
}


def imported_parts(file: Path) -> set[str]:
    """First words after "retnet." in a file's absolute imports."""
    parts = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            modules = [node.module or ""]
            if node.module == "retnet":
                modules = [f"retnet.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            continue
        parts |= {name.split(".")[1] for name in modules if name.startswith("retnet.")}
    return parts


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_imports_point_one_way(part: str) -> None:
    files = sorted(Path("retnet", part).rglob("*.py")) or [Path("retnet", f"{part}.py")]
    for file in files:
        assert imported_parts(file) <= MAY_IMPORT[part] | {part}, file


def test_every_part_has_its_place() -> None:
    found = {path.stem for path in Path("retnet").iterdir() if path.name[0] not in "._"}
    assert found == MAY_IMPORT.keys()


def test_the_model_folder_can_travel_alone() -> None:
    """Remote code: flat relative imports only, nothing else of the package."""
    for file in Path("retnet/model").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level <= 1, file
                assert node.level == 0 or "." not in (node.module or ""), file
                assert not (node.module or "").startswith("retnet"), file
