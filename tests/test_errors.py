"""What a user did wrong is one line; what is out of memory is told apart."""

from pathlib import Path

import pytest
import torch

from retnet.errors import UserError, is_out_of_memory, os_errors


def test_errors_of_the_system_are_one_line(tmp_path: Path) -> None:
    message = r"^--json \(x\) cannot be written \(No such file or directory\): name another file$"
    with (
        pytest.raises(UserError, match=message) as caught,
        os_errors("--json (x) cannot be written", "name another file"),
    ):
        (tmp_path / "none/x").write_text("")
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    with pytest.raises(UserError, match=r"problem \(no number\): fix"), os_errors("problem", "fix"):
        raise OSError("no number")
    with pytest.raises(KeyError), os_errors("problem", "fix"):
        raise KeyError  # a bug keeps its traceback


def test_out_of_memory() -> None:
    assert is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**58)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes differ"))
