"""What no implementation can beat on this machine, measured in the same rounds.

Training needs at least the matrix products of its linear layers, decoding at least one look at
every weight, and one look at and one write to every state.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.contenders import Prepare
from retnet.model.quantised import QuantisedLinear


def linear_products(model: nn.Module, tokens: int, dtype: torch.dtype | None = None) -> Prepare:
    """The products of all linear layers, forward and backward, and nothing else.

    Per layer [out, in] and N tokens: Y = X W^T, dX = dY W, dW = dY^T X, by the library that the
    process gives its products to. Tied embeddings count once, as the output layer.

    Args:
        model: Whose layers and device.
        tokens: N.
        dtype: Of all operands; the model's when None.
    """
    weights, rows = _linear_layers(model, tokens, dtype)

    def work() -> None:
        for weight in weights:
            rows[weight.shape[1]] @ weight.T
        for weight in weights:
            slope = rows[weight.shape[0]]
            slope @ weight
            slope.T @ rows[weight.shape[1]]

    return lambda: work


def matmul_products(model: nn.Module, tokens: int) -> Prepare:
    """``linear_products`` by ``torch.mm`` into memory that is reserved before, float32 by MKL."""
    weights, rows = _linear_layers(model, tokens)
    results = {width: torch.empty_like(x) for width, x in rows.items()}
    gradients = [torch.empty_like(weight) for weight in weights]

    def work() -> None:
        with _torchs_own_choice():
            for weight in weights:
                torch.mm(rows[weight.shape[1]], weight.T, out=results[weight.shape[0]])
            for weight, gradient in zip(weights, gradients, strict=True):
                outer, inner = weight.shape
                torch.mm(rows[outer], weight, out=results[inner])
                torch.mm(rows[outer].T, rows[inner], out=gradient)

    return lambda: work


@contextmanager
def _torchs_own_choice() -> Iterator[None]:
    """Float32 products on the CPU without ``retnet.machine.use_fast_products``."""
    setting: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, setting.fp32_precision = setting.fp32_precision, "ieee"
    try:
        yield
    finally:
        setting.fp32_precision = before


def _linear_layers(
    model: nn.Module, tokens: int, dtype: torch.dtype | None = None
) -> tuple[list[Tensor], dict[int, Tensor]]:
    """The weights, and random rows [N, width] of every width that occurs."""
    layers = [x for x in model.modules() if isinstance(x, nn.Linear)]
    weights = [layer.weight.detach().to(dtype or layer.weight.dtype) for layer in layers]
    widths = {size for weight in weights for size in weight.shape}
    return weights, {width: torch.randn(tokens, width).to(weights[0]) for width in widths}


def linear_flops(model: nn.Module, tokens: int) -> int:
    """Floating-point operations of ``linear_products``."""
    layers = [x for x in model.modules() if isinstance(x, nn.Linear)]
    return 6 * tokens * sum(layer.weight.numel() for layer in layers)


def decode_bytes(model: nn.Module, state_bytes: int) -> int:
    """Bytes that one decoding step moves: weights read, states read and written.

    The embedding is a look-up of one row; tied to the output layer, it is read as that.

    Args:
        model: Its linear layers and norms are counted.
        state_bytes: Of all layers.
    """
    embeddings = {id(x.weight) for x in model.modules() if isinstance(x, nn.Embedding)}
    embeddings -= {id(x.weight) for x in model.modules() if isinstance(x, nn.Linear)}
    weights = [x for x in model.parameters() if id(x) not in embeddings]
    quantised = (x for x in model.modules() if isinstance(x, QuantisedLinear))
    weights += [x for layer in quantised for x in layer.stored.values()]
    return sum(x.nbytes for x in weights) + 2 * state_bytes


def reading(num_bytes: int, device: torch.device, times: int) -> Prepare:
    """Read a block of memory ``times`` times, as fast as it goes: its sum, by all threads.

    A block that fits a cache is read from there, as weights that fit are.
    """
    block = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    total = torch.empty((), device=device)

    def work() -> Tensor:
        for _ in range(times):
            torch.sum(block, dim=0, out=total)
        return total

    def prepare() -> Callable[[], object]:
        return work

    return prepare
