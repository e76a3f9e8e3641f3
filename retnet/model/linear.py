"""x W^T by the fastest of the products that torch has for that many rows x, on a CPU.

* Many rows: ``products.matmul``.
* Few rows: reading W as it lies, W x^T, is a better shared work than x W^T, where it is large.
  Packed beforehand in oneDNN's own layout it is faster still (``pack``), at the price of a copy.
* Very few: the product's time is that of reading W, which both libraries do at a third to a half
  of the memory's speed. As a batch of products with blocks of W it comes near to it. (GB/s for one
  row of width 1,024, 2 threads, AMD Zen 5: 22 as one product of MKL's, 30 of oneDNN's, 42 as
  x W^T in blocks, 63 as W x^T in blocks.)

On other devices, and for other types, it is ``F.linear``.
"""

import itertools
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .products import PLAIN, are_fast, matmul

BLOCKS = 16  # of W; measured: anything from 8 to 64 is as fast
MOST_LEFT = 4  # rows up to which W x^T in blocks is the faster way, above it x W^T
MOST_ROWS = 64  # of a product in blocks; more rows are a matrix product like any other
FEW_TOKENS = 256  # of which W x^T is the faster product
MIN_PRODUCTS = 2**24  # multiplications from which it is


class Linear(nn.Linear):
    """``nn.Linear`` by ``linear``."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b.

    Args:
        x: [..., in].
        weight: [out, in].
        bias: [out].
    """
    rows = x.numel() // x.shape[-1]
    if rows > MOST_LEFT and are_fast(x, weight):
        flat = x.reshape(rows, -1)
        if rows < FEW_TOKENS and rows * weight.numel() >= MIN_PRODUCTS:
            y = matmul(weight, flat.T).T.contiguous()
        else:
            y = matmul(flat, weight.T)
        y = y.view(*x.shape[:-1], -1)
        return y if bias is None else y + bias
    most = MOST_LEFT if torch.compiler.is_compiling() else MOST_ROWS
    if 0 < rows <= most and bias is None and _has_blocks(weight):
        return _in_blocks(x.reshape(rows, -1), weight).view(*x.shape[:-1], -1)
    return F.linear(x, weight, bias)


class PackedWeight:
    """A weight with a copy in the layout of oneDNN's kernels, without gradients.

    Args:
        weight: [out, in], float32 on a CPU; very few rows are multiplied with it as it is.
        rows: Of the products; with another number they are right, but may be slower.
    """

    def __init__(self, weight: Tensor, rows: int) -> None:
        # what torch.compile makes of a frozen linear layer; torch has no public name for it
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
        self.weight = weight
        self.key = next(_keys)
        _packed_weights[self.key] = self

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, in] -> [rows, out]."""
        if x.shape[0] <= MOST_LEFT:
            return linear(x, self.weight)
        if torch.compiler.is_compiling():
            y: Tensor = torch.ops.retnet.packed_linear(x, self.key, self.weight.shape[0])
            return y
        return _packed_linear(x, self.key, self.weight.shape[0])


# Compilers know no packed tensors: to them it is an operator of ours, that of this number.
_keys = itertools.count()
_packed_weights: WeakValueDictionary[int, PackedWeight] = WeakValueDictionary()
_library = torch.library.Library("retnet", "DEF")
_library.define("packed_linear(Tensor x, int key, int outputs) -> Tensor")


@torch.library.impl(_library, "packed_linear", "CPU")
def _packed_linear(x: Tensor, key: int, outputs: int) -> Tensor:
    weight = _packed_weights[key].packed
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return y


@torch.library.register_fake("retnet::packed_linear", lib=_library)
def _like_packed_linear(x: Tensor, key: int, outputs: int) -> Tensor:
    return x.new_empty(x.shape[0], outputs)


def pack(weight: Tensor | PackedWeight, rows: int) -> Tensor | PackedWeight:
    """The weight packed for products with that many rows, or as it is where that is not slower."""
    if isinstance(weight, Tensor) and rows > MOST_LEFT and are_fast(weight):
        return PackedWeight(weight, rows)
    return weight


def product(x: Tensor, weight: Tensor | PackedWeight) -> Tensor:
    """``linear`` for a weight that may be packed: [rows, in] -> [rows, out]."""
    return linear(x, weight) if isinstance(weight, Tensor) else weight(x)


def _has_blocks(weight: Tensor) -> bool:
    return (
        type(weight) in PLAIN
        and weight.device.type == "cpu"
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
        y = bmm(blocks, columns).view(whole, rows)
        y = y.view(1, whole) if rows == 1 else y.t().contiguous()
    else:
        y = bmm(x.expand(BLOCKS, -1, -1), blocks.mT)
        y = y.transpose(0, 1).contiguous().view(rows, whole)
    if whole == weight.shape[0]:
        return y
    return torch.cat((y, F.linear(x, weight[whole:])), dim=1)


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """``torch.bmm``, under a name that torch.compile calls as it is.

    It writes loops of its own for a bmm with one row or column, which are slower on a CPU.
    """
    return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0)
