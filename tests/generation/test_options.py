"""The options that say how checkpoints are loaded."""

from argparse import ArgumentParser

import pytest
import torch

from retnet.errors import UserError
from retnet.generation import add_loading_options, loading_arguments


def options(*argv: str) -> dict:
    parser = ArgumentParser()
    add_loading_options(parser)
    return loading_arguments(parser.parse_args(argv))


def test_loading_options() -> None:
    chosen = options("--dtype", "bfloat16", "--device", "cpu", "--trust-remote-code")
    assert chosen == {
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "trust_remote_code": True,
        "base": None,
        "weights": "auto",
    }
    assert options("--base", "runs/a")["base"] == "runs/a"
    assert options("--weights", "int8")["weights"] == "int8"
    automatic = options()
    assert automatic["dtype"] is None
    assert automatic["device"].type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    "name",
    ["nonsense", "cuda:99", "hpu", "privateuseone", "mtia", "mkldnn", "xla", "meta", "", "1x"],
)
def test_a_device_that_is_not_there(name: str) -> None:
    with pytest.raises(UserError, match=rf"--device \({name}\) cannot be used"):
        options("--device", name)
