"""What the machine has, and how torch and the C library are set up for it."""

import ctypes
import functools
import logging
import os
import platform
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from retnet.errors import UserError

logger = logging.getLogger(__name__)

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h
_NEVER = 2**31 - 1
_STATUS = Path("/proc/self/status")


def memory_of(device: torch.device) -> int | None:
    """Bytes of memory of a device, whoever uses them now; None where it cannot be told."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def largest_resident_size() -> int:
    """Bytes of this process so far.

    Linux's ru_maxrss counts the process that started this one too, which may be larger than this
    one ever gets; VmHWM does not.
    """
    if _STATUS.exists():
        line = next(x for x in _STATUS.read_text().splitlines() if x.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource  # which not every system has

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_memory(device: torch.device) -> int:
    """Bytes of a device's memory that this process used at most; on the CPU all of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return largest_resident_size()


def keep_freed_memory() -> bool:
    """Make glibc keep freed blocks for the next tensor instead of returning them to the system.

    By default a block of 32 MiB or more is mapped for each use and unmapped after it, and every use
    begins with a page fault per 4 KiB. Activations of long rows are such blocks; what it
    is worth, benchmarks/RESULTS.md says (the column of the default allocator). The process's
    resident memory stays at its peak. Other C libraries, and settings that the user made by
    MALLOC_* or GLIBC_TUNABLES, are left alone. Returns whether something was set.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, _NEVER))


def use_fast_products() -> bool:
    """Give this process's float32 matrix products on the CPU to the faster of torch's libraries.

    torch gives them to MKL, whose kernels leave half of some processors' arithmetic unused (AVX-512
    on AMD's). oneDNN's do not, and torch asks oneDNN for a product where its operands may be
    rounded to bfloat16 (``torch.backends.mkldnn.matmul.fp32_precision``). Its kernels do that where
    the processor has matrix units for it (AMX, only Intel's), and everywhere else compute in
    float32 as always. So where MKL is slow the permission costs no digit; that is made sure of
    here, and where one digit is lost, or on Intel's processors, nothing is set. On an AMD Zen 5 a
    product takes half of the time, a batch of small ones 0.4 of it. Returns whether it was set.
    """
    if _setting().fp32_precision == "bf16" or not (_has_kernels() and _keeps_all_digits()):
        return _setting().fp32_precision == "bf16"
    _setting().fp32_precision = "bf16"
    return True


def _setting() -> Any:
    return torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


def _has_kernels() -> bool:
    """Whether oneDNN's float32 kernels are the faster ones here."""
    listing = Path("/proc/cpuinfo")
    text = listing.read_text() if listing.exists() else platform.processor()
    return (
        platform.machine() in ("x86_64", "AMD64")
        and "GenuineIntel" not in text  # there MKL uses all there is
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkldnn.is_available()
    )


@functools.cache
def _keeps_all_digits() -> bool:
    """Whether products keep all digits although they need not."""
    # in a thread of its own, where no mode that only pretends to compute is on
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_multiplies_exactly).result()


def _multiplies_exactly() -> bool:
    one = torch.eye(64, dtype=torch.float32, device="cpu")
    digits = torch.arange(64 * 64, dtype=torch.float32, device="cpu").view(64, 64)
    digits = 1 + digits * torch.finfo(torch.float32).eps
    before, _setting().fp32_precision = _setting().fp32_precision, "bf16"
    try:
        batch = torch.bmm(digits.expand(4, 64, 64), one.expand(4, 64, 64))
        return all(torch.equal(x, digits) for x in (digits @ one, *batch))
    finally:
        _setting().fp32_precision = before


# instruction sets to which oneDNN may be limited that have no products of bfloat16
WITHOUT_BFLOAT16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI")


def computes_in_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16, and oneDNN, which would do it, is not kept from it."""
    limits = (os.environ.get(name, "") for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"))
    if not torch.backends.mkldnn.is_available() or any(
        limit.upper() in WITHOUT_BFLOAT16 for limit in limits
    ):
        return False
    abilities = torch.cpu.get_capabilities()
    return any(bool(has) for name, has in abilities.items() if name.endswith("bf16"))


def steps_folder() -> Path | None:
    """Where compiled decode steps are kept for later processes; None for a user without a home."""
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        return None
    return Path(base) / "retnet" / "steps"


def set_up_compiler(device: torch.device, key: str) -> None:
    """Find a C++ compiler for torch.compile, for which ``key`` asks; a ``UserError`` without one.

    With max-autotune the compiler asks torch for the precision of products in a way that knows no
    setting of one library alone: ``use_fast_products`` is undone then.
    """
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "cl"]
    if device.type == "cpu" and not any(shutil.which(name) for name in names):
        raise UserError(
            f"{key} needs a C++ compiler and finds none ({', '.join(names)}): install one, or "
            "leave it out"
        )
    import torch._inductor.config as compiler  # takes a while

    chosen = compiler.max_autotune or compiler.max_autotune_gemm
    if chosen and _setting().fp32_precision == "bf16":
        _setting().fp32_precision = "none"
        logger.info("max-autotune: float32 products are left to torch's own choice of library")
