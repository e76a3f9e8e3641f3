"""x W^T for the few rows x of a decode step where W is quantised, see ``model.quantised``.

torch has operators that read the stored numbers as they are, for bfloat16 activations (for float32
ones they are many times slower than a plain product). They are private: before one is used it is
asked for a small product, and where it is absent or answers otherwise the plain product takes over,
of the weight as it would be without quantisation; ``problem`` says so.

* Very few rows: the time is that of reading W, so the fewer bytes the better.
* More: on a CPU that computes in bfloat16 a copy of W in that type, packed by oneDNN, is faster.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quantised import GROUP, QuantisedLinear, Stored, dequantise, int4_values, quantise
from .weights import MOST_LEFT, PackedWeight, bfloat16_product, joined, packs_bfloat16

MOST_DIRECT = 16  # rows up to which a product that is not packed reads the stored numbers
TOLERANCE = 0.02  # of the largest output: activations and outputs are rounded to 8 bits
OUTPUTS = 16  # that torch's int4 operators have a multiple of
Operands = tuple[Tensor, ...]


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
        device = self.stored["values"].device.type
        self.problem = _problem(self.weights, device)
        self.operands: Operands = ()
        if not self.problem:
            self.operands = OPERATORS[self.weights, device][0](self.stored)

    @property
    def tensors(self) -> Sequence[Tensor]:
        """All that it holds, for compilers."""
        return (*self.stored.values(), *self.operands)

    @property
    def packed_bytes(self) -> int:
        """What a packed copy takes."""
        return 2 * self.outputs * self.inputs

    def pack(self, rows: int) -> None:
        """Make a copy for products with that many rows, where it pays."""
        values = self.stored["values"]
        if rows <= MOST_LEFT or not packs_bfloat16(values.device):
            return
        if self.weights == "int8":  # whose values are exact in bfloat16: scaled afterwards
            weight = values.to(torch.bfloat16)
        else:
            weight = dequantise(self.weights, self.stored, self.inputs, torch.float32).bfloat16()
        self.packed = PackedWeight(weight, rows)

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, in] -> [rows, out]."""
        rows = x.shape[0]
        if rows > MOST_LEFT and self.packed is not None:
            y = self.packed(self._narrow(x)).to(x.dtype)
            return y * self.stored["scale"] if self.weights == "int8" else y
        if self.problem or (rows > MOST_DIRECT and self.weights != "bf16"):
            return self._plain(x)
        operator = OPERATORS[self.weights, x.device.type][1]
        return operator(self._narrow(x), *self.operands)[:, : self.outputs].to(x.dtype)

    def _narrow(self, x: Tensor) -> Tensor:
        """In bfloat16, filled up with zeros as the weight is."""
        missing = 0 if self.weights == "bf16" else -self.inputs % GROUP
        y = x.to(torch.bfloat16)
        return F.pad(y, (0, missing)) if missing else y

    def _plain(self, x: Tensor) -> Tensor:
        weight = dequantise(self.weights, self.stored, self.inputs, torch.float32)
        if x.device.type == "cpu":
            return F.linear(x, weight.to(x.dtype))
        return F.linear(x.to(torch.bfloat16), weight.to(torch.bfloat16)).to(x.dtype)


def _together(layers: Sequence[QuantisedLinear]) -> Stored:
    """The tensors of layers as of one layer; copied where they are not stored so."""
    found: Stored = {}
    for name in layers[0].stored:
        parts = [layer.stored[name] for layer in layers]
        whole = joined(parts)
        found[name] = torch.cat(parts) if whole is None else whole
    return found


def _bf16_operands(stored: Stored) -> Operands:
    return (stored["values"],)


def _int8_operands(stored: Stored) -> Operands:
    return stored["values"], stored["scale"]


def _int8_product(x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    y: Tensor = torch._weight_int8pack_mm(x, values, scale)
    return y


def _int4_lines(stored: Stored) -> tuple[Tensor, Tensor]:
    """The values uint8 [out', in], and scales and zeros [groups, out', 2]; out' filled up."""
    more = -stored["values"].shape[0] % OUTPUTS
    values, lines = int4_values(stored["values"]), torch.stack((stored["scale"], stored["zero"]), 2)
    values, lines = F.pad(values, (0, 0, 0, more)), F.pad(lines, (0, 0, 0, 0, 0, more))
    return values, lines.transpose(0, 1).contiguous()


def _int4_operands_cpu(stored: Stored) -> Operands:
    values, lines = _int4_lines(stored)
    return torch._convert_weight_to_int4pack_for_cpu(values.int(), 1), lines


def _int4_product_cpu(x: Tensor, packed: Tensor, lines: Tensor) -> Tensor:
    y: Tensor = torch._weight_int4pack_mm_for_cpu(x, packed, GROUP, lines)
    return y


def _int4_operands_cuda(stored: Stored) -> Operands:
    values, lines = _int4_lines(stored)
    tiles = 2  # of 16 inputs each, which every multiple of 32 has
    return torch._convert_weight_to_int4pack(values[:, ::2] << 4 | values[:, 1::2], tiles), lines


def _int4_product_cuda(x: Tensor, packed: Tensor, lines: Tensor) -> Tensor:
    y: Tensor = torch._weight_int4pack_mm(x, packed, GROUP, lines)
    return y


# by format and kind of device: what makes the operands, and the product of [rows, in] with them
OPERATORS: dict[tuple[str, str], tuple[Callable[[Stored], Operands], Callable[..., Tensor]]] = {
    ("bf16", "cpu"): (_bf16_operands, bfloat16_product),
    ("bf16", "cuda"): (_bf16_operands, F.linear),
    ("int8", "cpu"): (_int8_operands, _int8_product),
    ("int8", "cuda"): (_int8_operands, _int8_product),
    ("int4", "cpu"): (_int4_operands_cpu, _int4_product_cpu),
    ("int4", "cuda"): (_int4_operands_cuda, _int4_product_cuda),
}


@functools.cache
def _problem(weights: str, device: str) -> str:
    """Why torch's operator for a format is not used on a kind of device; empty where it is."""
    if (weights, device) not in OPERATORS:
        return f"torch has no {weights} product for {device}"
    prepare, multiply = OPERATORS[weights, device]
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 96, generator=generator, device="cpu")
    stored = quantise(weight, weights)
    plain = dequantise(weights, stored, 96, torch.float64)
    try:
        operands = prepare({name: x.to(device) for name, x in stored.items()})
        for rows in (1, 3):
            x = torch.randn(rows, 96, generator=generator, device="cpu").bfloat16()
            y: Any = multiply(x.to(device), *operands)
            expected = F.linear(x.double(), plain)
            difference = (y.cpu().double() - expected).abs().max() / expected.abs().max()
            if not difference <= TOLERANCE:
                return f"torch's {weights} product for {device} answers wrongly"
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        return f"torch's {weights} product for {device} fails ({str(error).splitlines()[0][:80]})"
    return ""
