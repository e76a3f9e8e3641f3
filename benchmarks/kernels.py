"""Retention alone, forward and backward: by form and chunk size, and against kernels on a GPU."""

import functools
import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.contenders import Prepare
from benchmarks.measure import FORMS, TRAIN, Piece, Plan, Results, measure
from retnet import RetNetConfig
from retnet.model.ops.decay import head_log_decay
from retnet.model.ops.retention import retention_chunkwise, retention_parallel

FLA = "flash-linear-attention"
SHAPES = ((8, 4096, 8, 128), (8, 4096, 8, 256))  # B, T, H, K; V = 2 K
Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k [B, T, H, K], v [B, T, H, V]


def kernel_case(shape: tuple[int, int, int, int]) -> str:
    rows, length, heads, width = shape
    return f"retention alone, B={rows} T={length} H={heads} K={width} V={2 * width}"


def kernels(plan: Plan, results: Results, shapes: tuple = SHAPES) -> None:
    """Both at each shape; on a CPU nothing, where those kernels do not run."""
    if plan.device.type != "cuda":
        results.absent[FLA] = f"its kernels need a GPU, the device is {plan.device.type}"
        return
    names: dict[str, Kernel] = {"RetNet chunkwise": chunkwise(None)}
    if plan.compiled:
        names["RetNet chunkwise compiled"] = torch.compile(chunkwise(None))
    try:
        names[FLA] = _fla_kernel()
    except ImportError as error:
        results.absent[FLA] = str(error)
    for shape in shapes:
        measure(TRAIN, kernel_pieces(shape, names, plan), plan, results)


def forms(plan: Plan, results: Results) -> None:
    """Chunk sizes on a long row, then the parallel form against them on short ones."""
    heads = plan.size.num_heads
    for width in plan.form_widths:
        for length in (plan.train_short, *plan.form_lengths):
            names = {f"chunks of {size}": chunkwise(size) for size in plan.form_chunks}
            if length in plan.form_lengths:
                names = {"parallel": parallel} | names
            shape = (max(1, plan.step_tokens // length), length, heads, width)
            measure(FORMS, kernel_pieces(shape, names, plan), plan, results)


def kernel_pieces(
    shape: tuple[int, int, int, int], names: dict[str, Kernel], plan: Plan
) -> list[Piece]:
    """Forward and backward of each kernel on the same random tensors."""
    rows, length, heads, width = shape
    generator = torch.Generator().manual_seed(0)
    q, k, v, slope = (
        torch.randn(rows, length, heads, size, generator=generator).to(plan.device, plan.dtype)
        for size in (width, width, 2 * width, 2 * width)
    )
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def step(kernel: Kernel) -> Prepare:
        def work() -> None:
            torch.autograd.grad(kernel(*inputs), inputs, slope)

        return lambda: work

    case = kernel_case(shape)
    return [Piece(case, name, rows * length, step(kernel)) for name, kernel in names.items()]


def chunkwise(chunk_size: int | None) -> Kernel:
    """Ours, with this chunk size or the default of such heads."""

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads, width = q.shape[2:]
        size = chunk_size or RetNetConfig(hidden_size=heads * width, num_heads=heads).chunk_size
        narrow = None if q.dtype == torch.float32 else q.dtype  # as under autocast
        form = functools.partial(retention_chunkwise, chunk_size=size, products=narrow)
        return _by_heads(form, q, k, v)

    return kernel


def parallel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Our form of all pairs."""
    return _by_heads(retention_parallel, q, k, v)


def _by_heads(form: Callable[..., tuple[Tensor, Tensor]], *inputs: Tensor) -> Tensor:
    """A form, from and to the layout [B, T, H, .] that the linear layers make."""
    q, k, v = (x.transpose(1, 2) for x in inputs)
    out, _ = form(q, k * q.shape[3] ** -0.5, v, head_log_decay("paper", q.shape[1], q.device))
    return out.transpose(1, 2).to(q.dtype)


def _fla_kernel() -> Kernel:
    operation = importlib.import_module("fla.ops.retention").chunk_retention

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = operation(q, k, v)[0]
        return out

    return kernel
