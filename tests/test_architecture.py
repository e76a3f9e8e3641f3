"""Imports point one way, the model travels alone, and a mixer's name is known to few."""

import ast
import importlib
import shutil
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch

from retnet.model.mixers import MIXERS
from retnet.model.models import PUBLIC, configuration

LEAVES = {"cli", "errors", "files", "interrupts", "machine", "paths", "terminal"}
PACKAGES = ("model", "data", "checkpoints", "generation", "evaluation", "training", "experiments",
            "commands")  # fmt: skip
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "cli": {"errors", "interrupts", "machine", "paths", "terminal"},
    "files": {"errors"},
    "machine": {"errors"},
    "paths": {"errors"},
    "versions": set(),
    "interrupts": set(),
    "terminal": {"errors"},
    "model": set(),
    **{name: LEAVES | set(PACKAGES[:i]) for i, name in enumerate(PACKAGES) if i},
    "serve": LEAVES | set(PACKAGES),
}
MODULES = {
    ".".join(path.with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(Path("retnet").rglob("*.py"))
}
# where a mixer may be spoken of by its name, besides packages' lists of what they give
KNOW_MIXERS = ("model/mixers/", "model/ops/", "model/models.py", "checkpoints/convert/",
               "experiments/")  # fmt: skip


def imports(module: str) -> Iterator[tuple[str, str]]:
    """All that a module imports of this package, also inside functions: modules and names."""
    path = MODULES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *(node.module or "").split(".")]).rstrip(".")
            for alias in node.names:
                whole = f"{source}.{alias.name}"
                if whole in MODULES:
                    yield whole, ""
                elif source in MODULES:
                    yield source, alias.name


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_imports_point_one_way(part: str) -> None:
    own = [name for name in MODULES if name.split(".")[1:2] == [part]]
    assert own
    for module in own:
        parts = {name.split(".")[1] for name, _ in imports(module) if "." in name}
        assert parts <= MAY_IMPORT[part] | {part}, module


def test_every_part_has_its_place() -> None:
    found = {path.stem for path in Path("retnet").iterdir() if path.name[0] not in "._"}
    assert found - {"py"} == MAY_IMPORT.keys()  # py.typed: types are given to whoever imports


def test_no_module_imports_itself_by_a_detour() -> None:
    graph = {module: {name for name, _ in imports(module)} for module in MODULES}
    for module, found in graph.items():
        # a package's list of what it gives is not what its own modules need
        found -= {".".join(module.split(".")[:i]) for i in range(1, len(module.split(".")))}
        found -= {module}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names them


def test_the_model_folder_can_travel_alone() -> None:
    """Relative imports inside of it, and nothing else of the package."""
    for module, path in MODULES.items():
        if not module.startswith("retnet.model"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            assert not any(name.split(".")[0] == "retnet" for name in names), path
        assert all(name.startswith("retnet.model") for name, _ in imports(module)), path


def test_the_model_runs_without_the_folder_for_speed(tmp_path: Path, monkeypatch) -> None:
    shutil.copytree("retnet/model", tmp_path / "bare_model")
    shutil.rmtree(tmp_path / "bare_model" / "fast_decode")
    monkeypatch.syspath_prepend(tmp_path)
    bare = importlib.import_module("bare_model")
    model = bare.RetNetForCausalLM(bare.RetNetConfig(vocab_size=9, hidden_size=8, num_heads=2))
    ids = torch.tensor([[1, 2, 3]])
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    made = model.eval().generate(ids, **options)
    assert made.equal(model.generate(ids, **options, use_cache=False))


def speaks_of_mixers(module: str) -> list[str]:
    """What a module imports, compares or asks isinstance of that belongs to one mixer."""
    own = {f"retnet.model.mixers.{name}" for name in ("base", "")}
    classes = {kind.__name__ for kind in MIXERS.values()}
    for model in PUBLIC:
        classes |= {kind.__name__ for kind in (model, model.model_class, configuration(model))}
    words = {*MIXERS, *(configuration(model).model_type for model in PUBLIC)}
    found = [
        f"import of {name or source}"
        for source, name in imports(module)
        if name in classes or (source.startswith("retnet.model.mixers.") and source not in own)
    ]
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Compare) and "schedule" not in ast.dump(node.left):
            constants = (part for part in ast.walk(node) if isinstance(part, ast.Constant))
            found += [f"comparison with {c.value!r}" for c in constants if c.value in words]
        elif isinstance(node, ast.Name | ast.Attribute):
            name = node.id if isinstance(node, ast.Name) else node.attr
            found += [name] if name in classes else []
    return found


@pytest.mark.parametrize("module", MODULES)
def test_only_its_own_rooms_know_a_mixer(module: str) -> None:
    path = MODULES[module]
    if path.name == "__init__.py" or path.as_posix().removeprefix("retnet/").startswith(
        KNOW_MIXERS
    ):
        return
    assert not speaks_of_mixers(module)


def test_the_rule_finds_what_breaks_it() -> None:
    assert "import of RetNetConfig" in speaks_of_mixers("retnet")
    assert "import of CausalAttention" in speaks_of_mixers("retnet.model.mixers")


def test_what_commands_log_is_heard() -> None:
    """The name of a module that runs as a command is __main__, and nobody listens to that."""
    for path in MODULES.values():
        text = path.read_text(encoding="utf-8")
        if '__name__ == "__main__"' in text:
            assert "getLogger(__name__)" not in text, path


def test_results_are_printed_in_one_place() -> None:
    """A bare ``print`` ends in a traceback where the disk is full, and ``| head`` leaves."""
    places = {"terminal.py", "generation/console.py", "commands/generate.py",  # as text_output
              "evaluation/memory.py"}  # fmt: skip  # to itself
    for path in MODULES.values():
        bare = [
            node.lineno
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "print"
            and not any(keyword.arg == "file" for keyword in node.keywords)
        ]
        assert not bare or str(path.relative_to("retnet")) in places, f"{path}: lines {bare}"
