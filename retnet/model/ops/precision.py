"""What is never computed below float32, and where autocast must not reach."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What is accumulated for a model of this dtype: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast switched off: positions, decays, states and head norms are never below float32."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):  # the common case
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def products_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 under such an autocast, for products whose operands may be rounded; else None."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    narrow = torch.get_autocast_dtype(device.type)
    return narrow if narrow == torch.bfloat16 else None


def for_products(x: Tensor) -> Tensor:
    """x in the type of the products that are to read it: cast once, however many they are."""
    return x.to(products_dtype(x.device) or x.dtype)


def in_full_precision(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that runs with autocast off on the device of its first tensor."""

    @functools.wraps(function)
    def wrapped(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        with full_precision(x.device):
            return function(x, *args, **kwargs)

    return wrapped
