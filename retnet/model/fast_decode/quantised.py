"""x W^T for the few rows x of a decode step where W is quantised, see ``model.quantised``.

torch has operators that read the stored numbers as they are. They are private, and right on some
processors only: before one is used it is asked for a small product, and where each is absent or
answers otherwise the plain product takes over, of the weight as it would be without quantisation;
``problem`` says so.

* Very few rows: the time is that of reading W, so the fewer bytes the better.
* Where W is small, what comes before and after int8's product takes longer than the product: there
  W is expanded to float32 once.
* One row in a compiled step: bf16 and int8 are read by ``row_product``, which rounds no activation.
* More: on a CPU that computes in bfloat16 a copy of W in that type, packed by oneDNN, is faster.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quantised import GROUP, QuantisedLinear, Stored, dequantise, quantise
from .quantised_operators import (
    Bfloat16,
    Expanded,
    Int4,
    Int4Cuda,
    Int8,
    Int8Bfloat16,
    Int8Compiled,
    Int8Expanded,
    scaled_row_product,
)
from .weights import MOST_LEFT, PackedWeight, joined, packs_bfloat16, takes_sum

SMALL = 2**19  # weights of int8 up to which float32's product takes less time than int8's
MOST_DIRECT = 64  # rows up to which a product that is not packed reads the stored numbers
TOLERANCE = 0.01  # of the largest output: activations and outputs are rounded to bfloat16

_Seen = tuple[ReferenceType[Tensor], int, int]  # a tensor, where its numbers are, their changes


class QuantisedProduct:
    """x W^T for [rows, in]: with the weights of layers of one format, one after the other.

    Attributes:
        problem: Why the plain product takes the place of torch's operator; empty where it does not.
    """

    def __init__(self, layers: Sequence[QuantisedLinear]) -> None:
        self.weights, self.inputs = layers[0].weights, layers[0].in_features
        self.outputs = sum(layer.out_features for layer in layers)
        self.stored = _together(layers)
        self.packed: PackedWeight | None = None
        kind, self.problem = _choose(self.weights, self.stored["values"].device.type)
        if kind is Int8 and self.outputs * self.inputs <= SMALL:
            kind = Expanded
        self.operator = None if kind is None else _made(kind, layers, self.stored)

    @property
    def tensors(self) -> Sequence[Tensor]:
        """All that it holds, for compilers."""
        return (*self.stored.values(), *getattr(self.operator, "tensors", ()))

    @property
    def packed_bytes(self) -> int:
        """What a packed copy takes."""
        return 2 * self.outputs * self.inputs

    def pack(self, rows: int) -> None:
        """Make a copy for products with that many rows (above MOST_LEFT), where it pays."""
        values = self.stored["values"]
        if not packs_bfloat16(values.device):
            return
        if self.weights == "int8":  # whose values are exact in bfloat16: scaled afterwards
            weight = values[:, : self.inputs].to(torch.bfloat16)
        else:
            weight = dequantise(self.weights, self.stored, self.inputs, torch.float32).bfloat16()
        self.packed = PackedWeight(weight, rows)

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, in] -> [rows, out]."""
        rows = x.shape[0]
        if rows > MOST_LEFT and self.packed is not None:
            y = self.packed(x.to(torch.bfloat16)).to(x.dtype)
            return y * self.stored["scale"] if self.weights == "int8" else y
        if rows == 1 and self.weights != "int4" and takes_sum(self.stored["values"]):
            return scaled_row_product(x, self.stored, self.inputs).to(x.dtype)
        if self.operator is not None and rows <= MOST_DIRECT:
            missing = 0 if self.weights == "bf16" else -self.inputs % GROUP
            wide = x.float()
            y = self.operator(F.pad(wide, (0, missing)) if missing else wide)
            return y[:, : self.outputs].to(x.dtype)
        dtype = torch.float32 if x.device.type == "cpu" else torch.bfloat16
        weight = dequantise(self.weights, self.stored, self.inputs, dtype)
        return F.linear(x.to(dtype), weight).to(x.dtype)


def _together(layers: Sequence[QuantisedLinear]) -> Stored:
    """The tensors of layers as of one layer; copied where they are not stored so."""
    found: Stored = {}
    for name in layers[0].stored:
        parts = [layer.stored[name] for layer in layers]
        whole = joined(parts)
        found[name] = torch.cat(parts) if whole is None else whole
    return found


Operator = Callable[[Stored], Any]
COPYING = (Int8, Expanded, Int4, Int4Cuda)  # those that make something of the weight
# by format and kind of device, the fastest first
FASTEST: dict[tuple[str, str], tuple[Operator, ...]] = {
    ("bf16", "cpu"): (Bfloat16,),
    ("bf16", "cuda"): (Bfloat16,),
    ("int8", "cpu"): (Int8, Int8Bfloat16),
    ("int8", "cuda"): (Int8Compiled, Int8Expanded),
    ("int4", "cpu"): (Int4,),
    ("int4", "cuda"): (Int4Cuda,),
}


# What was made for a row of layers, by the first: a model's steps share it, and it goes with them.
_kept: WeakKeyDictionary[QuantisedLinear, tuple[Any, list[_Seen]]] = WeakKeyDictionary()


def _made(kind: Operator, layers: Sequence[QuantisedLinear], stored: Stored) -> Any:
    """The operator for layers, made anew only where their tensors are others than before."""
    tensors = [x for layer in layers for x in layer.stored.values()]
    if kind not in COPYING or any(x.is_inference() for x in tensors):  # whose changes none counts
        return kind(stored)
    operator, seen = _kept.get(layers[0], (None, []))
    same = type(operator) is kind and len(seen) == len(tensors)
    if not (same and all(map(_is_seen, tensors, seen))):
        with torch.inference_mode(False), torch.no_grad():  # it may serve outside of that too
            operator = kind(stored)
        _kept[layers[0]] = operator, [(ref(x), x.data_ptr(), x._version) for x in tensors]
    return operator


def _is_seen(x: Tensor, seen: _Seen) -> bool:
    return seen[0]() is x and seen[1:] == (x.data_ptr(), x._version)


@functools.cache
def _choose(weights: str, device: str) -> tuple[Operator | None, str]:
    """The first operator that is right there; None and why, where there is none."""
    reason = f"torch has no {weights} product for {device}"
    for kind in FASTEST.get((weights, device), ()):
        reason = _problem(kind, weights, device)
        if not reason:
            return kind, ""
    return None, reason


def _problem(kind: Operator, weights: str, device: str) -> str:
    """Why an operator can't be used; empty where it can.

    Among the sums is one of the largest possible products, which some processors can't add.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 96, generator=generator, device="cpu")
    weight[0] = 1.0
    stored = quantise(weight, weights)
    plain = dequantise(weights, stored, 96, torch.float64)
    try:
        operator = kind({name: x.to(device) for name, x in stored.items()})
        for rows in (1, 3):
            x = torch.randn(rows, 96, generator=generator, device="cpu")
            x[0] = x[0].sign() if rows > 1 else 1.0
            y: Any = operator(x.to(device))[:, :48].cpu().double()
            expected = F.linear(x.double(), plain)
            if not (y - expected).abs().max() <= TOLERANCE * expected.abs().max():
                return f"torch's {weights} product for {device} answers wrongly"
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        said = str(error).splitlines()[0][:80]
        return f"torch's {weights} product for {device} fails ({said})"
    return ""
