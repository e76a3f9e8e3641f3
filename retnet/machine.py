"""What the machine has and how its C library hands memory out."""

import ctypes
import os

import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h
_NEVER = 2**31 - 1


def memory_of(device: torch.device) -> int | None:
    """Bytes of memory of a device, whoever uses them now; None where it cannot be told."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def keep_freed_memory() -> bool:
    """Make glibc keep freed blocks for the next tensor instead of returning them to the system.

    By default a block of 32 MiB or more is mapped for each use and unmapped after it, and every use
    begins with a page fault per 4 KiB. Activations of long rows are such blocks; what it
    is worth, benchmarks/RESULTS.md says (the column of the default allocator). The process's
    resident memory stays at its peak. Other C libraries, and settings that the user made by
    MALLOC_* or GLIBC_TUNABLES, are left alone.

    Returns:
        Whether something was set.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, _NEVER))
