"""The start of a program, whose imports take seconds: no more of them than needed, and Ctrl-C."""

import ast
import builtins
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.mark.parametrize("entry", ["train", "generate", "compare"])
def test_interrupted_imports_are_one_line(entry: str, capsys, monkeypatch) -> None:
    real = builtins.__import__

    def interrupted(name: str, *args, **options) -> ModuleType:
        if name.startswith("retnet."):
            raise KeyboardInterrupt
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", interrupted)
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(f"{entry}.py", run_name="__main__")
        signal.raise_signal(signal.SIGINT)  # it came again; nothing is left to interrupt
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert ended.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


# what is imported when it is used, as it takes seconds or may not be there
HEAVY = {"matplotlib", "datasets", "pandas", "pyarrow", "wandb", "tensorboard", "trackio", "mlflow",
         "aim", "peft", "openai", "fastapi", "uvicorn", "lm_eval", "scipy", "sklearn"}  # fmt: skip


STARTED = Path("retnet/serve/app.py")  # is imported when the server starts


def imported_at_once(path: Path) -> set[str]:
    """The packages that a module imports when it is imported itself, not in its functions."""
    found, nodes = set(), [*ast.parse(path.read_text()).body]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module).partition(".")[0])
        elif isinstance(node, ast.If | ast.Try | ast.With):
            nodes += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
    return found


def test_no_module_imports_what_is_heavy() -> None:
    modules = [*Path("retnet").rglob("*.py")]
    assert len(modules) > 100
    assert imported_at_once(STARTED) & HEAVY == {"fastapi"}
    for path in modules:
        assert path == STARTED or not imported_at_once(path) & HEAVY, path


@pytest.mark.slow
def test_what_a_start_imports() -> None:
    """Neither by ourselves nor by the libraries below: the package, and --help of all commands."""
    program = f"""
import runpy, sys
import retnet
for name in ("train", "generate", "compare"):
    sys.argv = [name + ".py", "--help"]
    try:
        runpy.run_path(name + ".py", run_name="__main__")
    except SystemExit as end:
        assert not end.code
print(sorted({HEAVY!r}.intersection(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr == "[]\n" and done.stdout.count("usage: ") == 3
