"""Retention alone, forward and backward, against flash-linear-attention's kernels on a GPU."""

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.contenders import Prepare
from benchmarks.measure import TRAIN, Piece, Plan, Results, measure
from retnet.model.configuration import RetNetConfig
from retnet.model.decay import head_log_decay
from retnet.model.retention import retention_chunkwise

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
    names: dict[str, Kernel] = {"RetNet chunkwise": chunkwise}
    try:
        names[FLA] = _fla_kernel()
    except ImportError as error:
        results.absent[FLA] = str(error)
    for shape in shapes:
        measure(TRAIN, kernel_pieces(shape, names, plan), plan, results)


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


def chunkwise(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Ours, from and to the layout [B, T, H, .] that the linear layers make."""
    log_decay = head_log_decay("paper", q.shape[2], q.device)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scaled = k * q.shape[3] ** -0.5
    size = RetNetConfig(hidden_size=q.shape[1] * q.shape[3], num_heads=q.shape[1]).chunk_size
    out, _ = retention_chunkwise(q, scaled, v, log_decay, chunk_size=size)
    return out.transpose(1, 2).to(q.dtype)


def _fla_kernel() -> Kernel:
    operation = importlib.import_module("fla.ops.retention").chunk_retention

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = operation(q, k, v)[0]
        return out

    return kernel
