"""x W^T for the few rows x of a decode step, by the fastest of the products that torch has for it.

* Very few: the product's time is that of reading W, which both of torch's libraries do at a third
  to a half of the memory's speed. As a batch of products with blocks of W it comes near to it.
  (GB/s for one row of width 1,024, 2 threads, AMD Zen 5: 22 as one product of MKL's, 30 of
  oneDNN's, 42 as x W^T in blocks, 63 as W x^T in blocks.)
* More: where oneDNN has the products (see ``takes_onednn``), packed beforehand in its own layout,
  at the price of a copy. Its products of few rows that are not packed are slow.

On other devices, and for other types, it is ``F.linear``.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.batched import batched_product

BLOCKS = 16  # of W; measured: anything from 8 to 64 is as fast
MOST_LEFT = 4  # rows up to which W x^T in blocks is the faster way, above it x W^T
MOST_ROWS = 64  # of a product in blocks; more rows are a matrix product like any other


def lay_out_for_decoding(model: nn.Module) -> None:
    """Store the weights that a step multiplies together one after the other, in place."""
    for module in model.modules():
        linears = joint_layers(module)
        if len(linears) > 1 and len(joint_weights(linears)) > 1:
            whole = torch.cat([linear.weight.detach() for linear in linears])
            parts = whole.split([linear.out_features for linear in linears])
            for linear, part in zip(linears, parts, strict=True):
                linear.weight.data = part


def joint_layers(module: nn.Module) -> list[nn.Linear]:
    """The linear layers of a mixer or feed-forward network that read its input."""
    found = (getattr(module, name) for name in getattr(module, "joint", ()))
    return [linear for linear in found if linear is not None]


def joint_weights(linears: Sequence[nn.Linear]) -> list[Tensor]:
    """Their weights; as a single matrix [sum of out, in] where they are stored as one."""
    weights = [linear.weight.detach() for linear in linears]
    first, inputs = weights[0], weights[0].shape[1]
    offset = first.storage_offset()
    for weight in weights:
        same = weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same and weight.is_contiguous() and weight.storage_offset() == offset):
            return weights
        offset += weight.numel()
    outputs = sum(weight.shape[0] for weight in weights)
    return [first.as_strided((outputs, inputs), (inputs, 1))]


def takes_onednn(weight: Tensor) -> bool:
    """Whether torch gives products with this weight to oneDNN."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and onednn_is_on()


def onednn_is_on() -> bool:
    """Whether float32 products on the CPU go to oneDNN; ``retnet.machine`` says when they do."""
    return bool(_onednn().fp32_precision == "bf16")


def switch_onednn(on: bool) -> None:
    """Give them to oneDNN, or not."""
    _onednn().fp32_precision = "bf16" if on else "none"


def _onednn() -> Any:
    return torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


class Product:
    """x W^T for [rows, in]: a weight [out, in], without gradients; packed where it pays."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.packed: PackedWeight | None = None
        self.most_in_blocks = MOST_LEFT if takes_onednn(weight) else MOST_ROWS

    def pack(self, rows: int) -> None:
        """Make a copy for products with that many rows, where it pays."""
        if rows > MOST_LEFT and takes_onednn(self.weight):
            self.packed = PackedWeight(self.weight, rows)

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, in] -> [rows, out]."""
        rows = x.shape[0]
        if rows > MOST_LEFT and self.packed is not None:
            return self.packed(x)
        most = MOST_LEFT if torch.compiler.is_compiling() else self.most_in_blocks
        if rows <= most and _has_blocks(self.weight):
            return _in_blocks(x, self.weight)
        return F.linear(x, self.weight)


class PackedWeight:
    """A copy of a float32 weight [out, in] in the layout of oneDNN's kernels.

    Products of another number of rows than ``rows`` are right, but may be slower.
    """

    def __init__(self, weight: Tensor, rows: int) -> None:
        # what torch.compile makes of a frozen linear layer; torch has no public name for it
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        self.weight = weight
        self.key = next(_keys)
        self.operator = _operator()
        _packed_weights[self.key] = self

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, in] -> [rows, out]."""
        if torch.compiler.is_compiling():
            y: Tensor = self.operator(x, self.key, self.weight.shape[0])
            return y
        return _packed_linear(x, self.key, self.weight.shape[0])


# Compilers know no packed tensors: to them it is an operator of ours, that of this number.
_keys = itertools.count()
_packed_weights: WeakValueDictionary[int, PackedWeight] = WeakValueDictionary()
_library: list[torch.library.Library] = []  # whose operators go when it goes


@functools.cache
def _operator() -> Callable[..., Any]:
    """``_packed_linear`` as an operator; each copy of this module has one of its own."""
    name = f"{__name__.replace('.', '_')}::packed_linear"
    _library.append(library := torch.library.Library(name.split("::")[0], "FRAGMENT"))
    library.define("packed_linear(Tensor x, int key, int outputs) -> Tensor")
    library.impl("packed_linear", _packed_linear, "CPU")
    torch.library.register_fake(
        name, lambda x, key, outputs: x.new_empty(x.shape[0], outputs), lib=library
    )
    operator: Callable[..., Any] = getattr(torch.ops, library.ns).packed_linear.default
    return operator


def _packed_linear(x: Tensor, key: int, outputs: int) -> Tensor:
    weight = _packed_weights[key].packed
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return y


def _has_blocks(weight: Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.float64)
        and weight.shape[0] >= BLOCKS
        and weight.is_contiguous()
        and not torch.is_autocast_enabled("cpu")
    )


def _in_blocks(x: Tensor, weight: Tensor) -> Tensor:
    """[rows, in] -> [rows, out]."""
    rows, inputs = x.shape
    whole = weight.shape[0] // BLOCKS * BLOCKS
    blocks = weight if whole == weight.shape[0] else weight[:whole]
    blocks = blocks.view(BLOCKS, -1, inputs)
    if rows <= MOST_LEFT:
        # MKL wants the strides of a transposed matrix, also where compilers think them irrelevant
        columns = x.contiguous().as_strided((BLOCKS, inputs, rows), (0, 1, inputs))
        y = batched_product(blocks, columns)
        y = y.view(1, whole) if rows == 1 else y.view(whole, rows).t().contiguous()
    else:
        y = batched_product(x.expand(BLOCKS, -1, -1), blocks.mT)
        y = y.transpose(0, 1).contiguous().view(rows, whole)
    if whole == weight.shape[0]:
        return y
    return torch.cat((y, F.linear(x, weight[whole:])), dim=1)
