"""Ctrl-C while a program starts: its imports take seconds."""

import builtins
import runpy
from types import ModuleType

import pytest

from tests.places import MAINS


@pytest.mark.parametrize("entry", MAINS)
def test_interrupted_imports_are_one_line(entry: str, capsys, monkeypatch) -> None:
    real = builtins.__import__

    def interrupted(name: str, *args, **options) -> ModuleType:
        if name.startswith("retnet"):
            raise KeyboardInterrupt
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", interrupted)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(MAINS[entry].__code__.co_filename, run_name="__main__")
    assert ended.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"
