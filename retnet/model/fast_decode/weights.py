"""x W^T for the few rows x of a decode step, by the fastest of the products that torch has for it.

* Very few: the product's time is that of reading W, which both of torch's libraries do at a third
  to a half of the memory's speed. As a batch of products with blocks of W it comes near to it.
  (GB/s for one row of width 1,024, 2 threads, AMD Zen 5: 22 as one product of MKL's, 30 of
  oneDNN's, 42 as x W^T in blocks, 63 as W x^T in blocks.)
* More: where oneDNN has the products (see ``takes_onednn``), packed beforehand in its own layout,
  at the price of a copy. Its products of few rows that are not packed are slow.
* bfloat16: torch's own product of a matrix and a single row, at half of the time of float32 (which
  is hidden behind oneDNN's, 2.2 times as slow); of more rows packed, where the processor has it.
* A single row in a compiled step: the sum that it is (``row_product``), which the compiler puts in
  one loop with what is computed around it.

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
from ..quantised import GROUP, QuantisedLinear

BLOCKS = 16  # of W; measured: anything from 8 to 64 is as fast
MOST_LEFT = 4  # rows up to which W x^T in blocks is the faster way, above it x W^T
MOST_ROWS = 64  # of a product in blocks; more rows are a matrix product like any other


def lay_out_for_decoding(model: nn.Module) -> None:
    """Store the weights that a step multiplies together one after the other, in place."""
    for module in model.modules():
        for layers in runs(joint_layers(module)):
            if isinstance(layers[0], QuantisedLinear):
                for name in layers[0].stored:
                    parts = _laid_out([layer.stored[name] for layer in layers])
                    for layer, part in zip(layers, parts, strict=True):
                        layer.register_buffer(name, part)
            else:
                parts = _laid_out([layer.weight.detach() for layer in layers])
                for layer, part in zip(layers, parts, strict=True):
                    layer.weight.data = part


def _laid_out(parts: list[Tensor]) -> Sequence[Tensor]:
    """The same tensors, one after the other in memory."""
    if joined(parts) is not None:
        return parts
    return torch.cat(parts).split([len(part) for part in parts])


def joint_layers(module: nn.Module) -> list[Any]:
    """The linear layers of a mixer or feed-forward network that read its input."""
    found = (getattr(module, name) for name in getattr(module, "joint", ()))
    return [linear for linear in found if linear is not None]


def runs(layers: Sequence[Any]) -> list[list[Any]]:
    """The layers in order, those of one kind that follow each other together."""
    return [list(run) for _, run in itertools.groupby(layers, key=type)]


def joint_weights(linears: Sequence[Any]) -> list[Tensor]:
    """Their weights; as a single matrix [sum of out, in] where they are stored as one."""
    weights = [linear.weight.detach() for linear in linears]
    whole = joined(weights)
    return weights if whole is None else [whole]


def joined(parts: Sequence[Tensor]) -> Tensor | None:
    """Tensors that are stored one after the other as one; None where they are not."""
    first = parts[0]
    offset = first.storage_offset()
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same and part.is_contiguous() and part.storage_offset() == offset):
            return None
        offset += part.numel()
    rows = sum(len(part) for part in parts)
    return first.as_strided((rows, *first.shape[1:]), first.stride())


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


def packs_bfloat16(device: torch.device) -> bool:
    """Whether oneDNN computes in bfloat16 there."""
    has = device.type == "cpu" and torch.backends.mkldnn.is_available()
    return has and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Product:
    """x W^T for [rows, in]: a weight [out, in], without gradients; packed where it pays."""

    problem = ""  # nothing is missing to it

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.packed: PackedWeight | None = None
        self.bfloat16 = Bfloat16Product(weight) if weight.dtype == torch.bfloat16 else None
        self.most_in_blocks = MOST_LEFT if takes_onednn(weight) else MOST_ROWS

    @property
    def tensors(self) -> Sequence[Tensor]:
        """All that it holds, for compilers."""
        return (self.weight,)

    @property
    def packed_bytes(self) -> int:
        """What a packed copy takes."""
        return self.weight.nbytes

    def pack(self, rows: int) -> None:
        """Make a copy for products with that many rows (above MOST_LEFT), where it pays."""
        narrow = self.weight.dtype == torch.bfloat16 and packs_bfloat16(self.weight.device)
        if narrow or takes_onednn(self.weight):
            self.packed = PackedWeight(self.weight, rows)

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, in] -> [rows, out]."""
        rows = x.shape[0]
        if rows > MOST_LEFT and self.packed is not None:
            return self.packed(x)
        if rows == 1 and takes_sum(self.weight):
            return row_product(x, self.weight).to(x.dtype)
        if self.bfloat16 is not None:
            return self.bfloat16(x)
        most = MOST_LEFT if torch.compiler.is_compiling() else self.most_in_blocks
        if rows <= most and _has_blocks(self.weight):
            return _in_blocks(x, self.weight)
        return F.linear(x, self.weight)


class Bfloat16Product:
    """x W^T of bfloat16, for a weight [out, in] as it is."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, in] -> [rows, out]."""
        if self.weight.device.type != "cpu" or len(x) > 1 or torch.compiler.is_compiling():
            return F.linear(x, self.weight)
        return _one_row(x, self.weight)


def takes_sum(weight: Tensor) -> bool:
    """Whether the product of one row with a weight is to be ``row_product``."""
    autocast = torch.is_autocast_enabled("cpu")
    return torch.compiler.is_compiling() and weight.device.type == "cpu" and not autocast


def row_product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T [1, out] of one row [1, in] and W [out, in], float32 or wider, as compilers want it.

    They read W once, of whatever type, and need no memory for what it is in float32.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    # with strides of its own x is stored first: else it would be computed for each output anew
    x = x.to(wide).contiguous().as_strided(x.shape, (x.shape[1], 1))
    return (weight.to(wide) * x).sum(1)[None]


def _one_row(x: Tensor, weight: Tensor) -> Tensor:
    """By torch's own product, to which it turns where oneDNN is off."""
    onednn: Any = torch.backends.mkldnn
    if not onednn.enabled:  # perhaps by another thread, whose it is to switch it on again
        return torch.mv(weight, x[0])[None]
    onednn.enabled = False
    try:
        return torch.mv(weight, x[0])[None]
    finally:
        onednn.enabled = True


class Packed:
    """A copy of a weight of ``outputs`` rows in a layout that only its own product knows.

    ``key`` stands for it in what compilers make: a tensor, which each process has its own of.
    """

    def __init__(self, outputs: int) -> None:
        self.outputs, number = outputs, next(_keys)
        self.key = torch.tensor(number, device="cpu")
        self.operator = as_operator("packed_linear")
        _packed_weights[number] = self

    def multiply(self, x: Tensor) -> Tensor:
        """[rows, in] -> [rows, out], of the type of x."""
        raise NotImplementedError

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, in] -> [rows, out]."""
        if torch.compiler.is_compiling():
            y: Tensor = self.operator(x, self.key, self.outputs)
            return y
        return self.multiply(x)


class PackedWeight(Packed):
    """A copy of a float32 or bfloat16 weight [out, in] in the layout of oneDNN's kernels.

    Products of another number of rows than ``rows`` are right, but may be slower.
    """

    def __init__(self, weight: Tensor, rows: int) -> None:
        # what torch.compile makes of a frozen linear layer; torch has no public name for it
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        super().__init__(len(weight))

    def multiply(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")
        return y


def int4_product(x: Tensor, packed: Tensor, lines: Tensor) -> Tensor:
    """torch's product of bfloat16 [rows, in] with packed int4 and its scales and zeros on a CPU."""
    y: Tensor = torch._weight_int4pack_mm_for_cpu(x, packed, GROUP, lines)
    return y


# Compilers know no packed tensors, and give the product of int4 a constant that no program for
# later processes can have: to them these are operators of ours, which find a packed weight by its
# number.
_keys = itertools.count()
_packed_weights: WeakValueDictionary[int, Packed] = WeakValueDictionary()
_libraries: list[torch.library.Library] = []  # whose operators go when they go


@functools.cache
def as_operator(name: str) -> Callable[..., Any]:
    """A function of this module as an operator; each copy of the module has its own."""
    arguments, work, fake = OPERATORS[name]
    _libraries.append(library := torch.library.Library(__name__.replace(".", "_"), "FRAGMENT"))
    library.define(f"{name}({arguments}) -> Tensor")
    library.impl(name, work, "CPU")
    torch.library.register_fake(f"{library.ns}::{name}", fake, lib=library)
    operator: Callable[..., Any] = getattr(getattr(torch.ops, library.ns), name).default
    return operator


OPERATORS: dict[str, tuple[str, Callable[..., Tensor], Callable[..., Tensor]]] = {
    "packed_linear": (
        "Tensor x, Tensor key, int outputs",
        lambda x, key, outputs: _packed_weights[key.item()].multiply(x),
        lambda x, key, outputs: x.new_empty(x.shape[0], outputs),
    ),
    "int4_product": (
        "Tensor x, Tensor packed, Tensor lines", int4_product,
        lambda x, packed, lines: x.new_empty(x.shape[0], lines.shape[1]),
    ),
}  # fmt: skip


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
