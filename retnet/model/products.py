"""float32 matrix products on a CPU, by the library that computes them fastest.

torch gives them to MKL, whose kernels leave half of some processors' arithmetic unused (AVX-512 on
AMD's). oneDNN's do not, and torch asks oneDNN for a product where its operands may be rounded to
bfloat16 (``torch.backends.mkldnn.matmul.fp32_precision``). Its kernels do that where the processor
has matrix units for it (AMX, only Intel's), and everywhere else compute in float32 as always. So
where MKL is slow the permission costs no digit; ``_is_exact`` makes sure before the first product.
On an AMD Zen 5 a product takes half of the time, a batch of small ones 0.4 of it.
"""

import functools
import platform
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

PLAIN = (Tensor, nn.Parameter)  # other classes (quantised, sharded) know their own products


def _made_by_intel() -> bool:
    listing = Path("/proc/cpuinfo")
    text = listing.read_text() if listing.exists() else platform.processor()
    return "GenuineIntel" in text


# On Intel's own processors MKL uses all there is.
_HAS_KERNELS = (
    platform.machine() in ("x86_64", "AMD64")
    and not _made_by_intel()
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
    and torch.backends.mkldnn.is_available()
)


def fast_products(device: torch.device) -> AbstractContextManager[None]:
    """float32 products on a CPU go to oneDNN meanwhile, where that is faster and as exact.

    Of operators that multiply matrices inside, such as attention, too. A backward pass that is not
    ``matmul``'s has to run in it as well. (A compiler that tries several products, max-autotune,
    can't be called in it: it asks torch for the precision in a way that knows no such mixture.)
    """
    if device.type != "cpu" or torch.compiler.is_compiling() or not _HAS_KERNELS:
        return nullcontext()
    return _permission if _is_exact() else nullcontext()


class _Permission:
    """torch's own setting while anybody, in whatever thread, is inside; then as it was before.

    What was before is what counted: a value inherited from a more general setting becomes the
    setting's own.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0
        self.before = "none"

    def __enter__(self) -> None:
        with self.lock:
            if self.inside == 0:
                self.before = _setting().fp32_precision
                _setting().fp32_precision = "bf16"
            self.inside += 1

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                _setting().fp32_precision = self.before


def _setting() -> Any:
    return torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


_permission = _Permission()


@functools.cache
def _is_exact() -> bool:
    """Whether products keep all digits although they need not."""
    # in a thread of its own, where no mode that only pretends to compute is on
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_keeps_all_digits).result()


def _keeps_all_digits() -> bool:
    one = torch.eye(64, dtype=torch.float32, device="cpu")
    digits = torch.arange(64 * 64, dtype=torch.float32, device="cpu").view(64, 64)
    digits = 1 + digits * torch.finfo(torch.float32).eps
    with _permission:
        batch = torch.bmm(digits.expand(4, 64, 64), one.expand(4, 64, 64))
        return all(torch.equal(x, digits) for x in (digits @ one, *batch))


def are_fast(*tensors: Tensor) -> bool:
    """Whether ``fast_products`` makes products of these faster."""
    return (
        not torch.compiler.is_compiling()
        and _HAS_KERNELS
        and all(
            type(x) in PLAIN and x.device.type == "cpu" and x.dtype == torch.float32
            for x in tensors
        )
        and not torch.is_autocast_enabled("cpu")
        and bool(torch.backends.mkldnn.enabled)
        and _is_exact()
    )


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with the same leading dimensions, its gradients by ``fast_products`` too.

    Inside of ``fast_products`` the backward pass is taken to run there as well, and torch's own,
    which costs less to call than ours, to do as well.

    Args:
        a: [..., N, K].
        b: [..., K, M].
    """
    if _permission.inside or not are_fast(a, b):
        return a @ b
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        y: Tensor = _Matmul.apply(a, b)
        return y
    with _permission:
        return a @ b


class _Matmul(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        with _permission:
            return a @ b

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        a, b = inputs
        a_counts, b_counts = ctx.needs_input_grad
        ctx.save_for_backward(a if b_counts else None, b if a_counts else None)
        # the gradient of b lies in memory as b does, which may be a transposed weight
        ctx.as_it_lies = b.is_contiguous()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        a_slope = b_slope = None
        if ctx.needs_input_grad[0]:
            a_slope = matmul(slope, b.mT)
        if ctx.needs_input_grad[1]:
            b_slope = matmul(a.mT, slope) if ctx.as_it_lies else matmul(slope.mT, a).mT
        return a_slope, b_slope
