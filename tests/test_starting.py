"""Ctrl-C while a program starts: its imports take seconds."""

import builtins
import runpy
import signal
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
