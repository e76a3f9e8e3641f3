"""x W^T for the few rows x of a decode step where W is quantised, see ``model.quantised``.

torch has operators that read the stored numbers as they are. They are private, and right on some
processors only: before one is used it is asked for a small product, and where each is absent or
answers otherwise the plain product takes over, of the weight as it would be without quantisation;
``problem`` says so.

* Very few rows: the time is that of reading W, so the fewer bytes the better.
* Where W is small, what comes before and after int8's product takes longer than the product: there
  W is expanded to float32 once.
* More: on a CPU that computes in bfloat16 a copy of W in that type, packed by oneDNN, is faster.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quantised import GROUP, QuantisedLinear, Stored, dequantise, int4_values, quantise
from .weights import (
    MOST_LEFT,
    Bfloat16Product,
    Packed,
    PackedWeight,
    Product,
    as_operator,
    int4_product,
    joined,
    packs_bfloat16,
)

SMALL = 2**19  # weights of int8 up to which float32's product takes less time than int8's
MOST_DIRECT = 64  # rows up to which a product that is not packed reads the stored numbers
TOLERANCE = 0.01  # of the largest output: activations and outputs are rounded to bfloat16
OUTPUTS = 16  # that torch's int4 operators have a multiple of
LEAST = 1e-30  # the largest activation of a row counts as no less
REST = 254  # parts of a step of int8, in which what it leaves over is counted: a half is 127

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


class Bfloat16:
    """Of activations rounded to bfloat16."""

    def __init__(self, stored: Stored) -> None:
        self.product = Bfloat16Product(stored["values"])

    def __call__(self, x: Tensor) -> Tensor:
        return self.product(x.to(torch.bfloat16))


class Int8(Packed):
    """FBGEMM's product of int8 with int8, which adds up in int32: for CPUs that have it (VNNI).

    The activations are two rows of int8, what the first leaves over being the second: 15 bits.
    """

    def __init__(self, stored: Stored) -> None:
        values, scale = stored["values"], stored["scale"].double()
        with warnings.catch_warnings(action="ignore"):  # torch has plans for quantised tensors
            whole = torch._make_per_channel_quantized_tensor(
                values, scale, torch.zeros(len(values), dtype=torch.long), 0
            )
            self.weight = torch.ops.quantized.linear_prepack(whole, None)
        super().__init__(len(values))

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, in] -> [rows, out]; all but the product itself is seen by compilers."""
        # each row in steps of its own, so that none depends on what stands beside it
        largest = torch.linalg.vector_norm(x, float("inf"), dim=1, keepdim=True).clamp_min_(LEAST)
        rows, x = len(x), x * (127 / largest)
        nearest = x.round()
        y = super().__call__(torch.cat((nearest, (x - nearest).mul_(REST))))
        return torch.add(y[:rows], y[rows:], alpha=1 / REST).mul_(largest.div_(127))

    def multiply(self, x: Tensor) -> Tensor:
        """[rows, in] -> [rows, out], of the integers nearest to x, which are from -127 to 127."""
        product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        y: Tensor = product(x, 1.0, 128, self.weight)
        return y


class Expanded:
    """float32's product with the weight that int8 stands for."""

    def __init__(self, stored: Stored) -> None:
        whole = stored["values"].shape[1]
        self.product = Product(dequantise("int8", stored, whole, torch.float32))
        self.tensors = self.product.tensors

    def __call__(self, x: Tensor) -> Tensor:
        return self.product(x)


class Int8Bfloat16:
    """torch's product of bfloat16 with int8 (many times slower with float32)."""

    def __init__(self, stored: Stored) -> None:
        self.tensors = stored["values"], stored["scale"]

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = torch._weight_int8pack_mm(x.to(torch.bfloat16), *self.tensors)
        return y


class Int8Expanded:
    """bfloat16's product with the values, expanded at each token; scaled afterwards.

    For GPUs, where torch's own product takes ten times as long as one with bfloat16 weights.
    """

    def __init__(self, stored: Stored) -> None:
        self.tensors = stored["values"], stored["scale"].float()

    def __call__(self, x: Tensor) -> Tensor:
        values, scale = self.tensors
        return F.linear(x.to(torch.bfloat16), values.to(torch.bfloat16)) * scale


class Int4:
    """torch's product of bfloat16 with int4 on a CPU."""

    def __init__(self, stored: Stored) -> None:
        values, lines = _int4_lines(stored)
        self.tensors = torch._convert_weight_to_int4pack_for_cpu(values.int(), 1), lines
        self.operator = as_operator("int4_product")

    def __call__(self, x: Tensor) -> Tensor:
        product = self.operator if torch.compiler.is_compiling() else int4_product
        y: Tensor = product(x.to(torch.bfloat16), *self.tensors)
        return y


class Int4Cuda:
    """torch's product of bfloat16 with int4 on a GPU."""

    def __init__(self, stored: Stored) -> None:
        values, lines = _int4_lines(stored)
        tiles = 2  # of 16 inputs each, which every multiple of 32 has
        packed = torch._convert_weight_to_int4pack(values[:, ::2] << 4 | values[:, 1::2], tiles)
        self.tensors = packed, lines

    def __call__(self, x: Tensor) -> Tensor:
        packed, lines = self.tensors
        y: Tensor = torch._weight_int4pack_mm(x.to(torch.bfloat16), packed, GROUP, lines)
        return y


def _int4_lines(stored: Stored) -> tuple[Tensor, Tensor]:
    """The values uint8 [out', in], and scales and zeros [groups, out', 2]; out' filled up."""
    more = -stored["values"].shape[0] % OUTPUTS
    values, lines = int4_values(stored["values"]), torch.stack((stored["scale"], stored["zero"]), 2)
    values, lines = F.pad(values, (0, 0, 0, more)), F.pad(lines, (0, 0, 0, 0, 0, more))
    return values, lines.transpose(0, 1).contiguous()


Operator = Callable[[Stored], Any]
COPYING = (Int8, Expanded, Int4, Int4Cuda)  # those that make something of the weight
# by format and kind of device, the fastest first
FASTEST: dict[tuple[str, str], tuple[Operator, ...]] = {
    ("bf16", "cpu"): (Bfloat16,),
    ("bf16", "cuda"): (Bfloat16,),
    ("int8", "cpu"): (Int8, Int8Bfloat16),
    ("int8", "cuda"): (Int8Expanded,),
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
