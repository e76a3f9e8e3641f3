"""How much memory there is."""

import os

import torch


def memory_of(device: torch.device) -> int | None:
    """Bytes of memory of a device, whoever uses them now; None where it cannot be told."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
