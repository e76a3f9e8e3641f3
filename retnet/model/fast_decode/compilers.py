"""How a step's functions are given to ``torch.compile``."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

MOST_COMPILED = 256  # shapes, or models and numbers of rows, of a function in a process


def compile_often(function: Callable[..., Tensor], dynamic: bool = False) -> Callable[..., Tensor]:
    """``torch.compile``, up to MOST_COMPILED times; its argument for that came after torch 2.11."""
    options: dict[str, Any] = {"options": {"guard_filter_fn": _guards_of_arguments}}
    has_limit = "recompile_limit" in inspect.signature(torch.compile).parameters
    if has_limit:
        options["recompile_limit"] = MOST_COMPILED
    compiled = torch.compile(function, dynamic=dynamic, fullgraph=True, **options)
    if has_limit:
        return compiled
    # config.patch would do the same, in 30 microseconds a token instead of 1
    set_limit = torch._dynamo.config._make_closure_patcher(recompile_limit=MOST_COMPILED)

    def limited(*args: Any) -> Tensor:
        reset_limit = set_limit()
        try:
            return compiled(*args)
        finally:
            reset_limit()

    return limited


def _guards_of_arguments(guards: Sequence[Any]) -> list[bool]:
    """Which conditions are checked at each call: of a ``DecodeStep`` itself only its number.

    It does not change once it is made, but for the packing before its first step of many rows, and
    its number stands for all of it. Looking through all weights takes a tenth of a small step.
    """
    names = (guard.name for guard in guards)
    return ["self" not in name or name == "self.number" for name in names]
