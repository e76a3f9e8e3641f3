"""Where autocast must not reach."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast switched off: positions, decays, states and head norms are never below float32."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):  # the common case
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
