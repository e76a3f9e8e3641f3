"""The products of a few rows with int8, int4 and bfloat16 that torch has, behind one call.

Each is made of a layer's stored tensors and takes rows [rows, in], in float32; torch's own
operators are private, and ``quantised`` asks each for a small product before it is used.
"""

import functools
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quantised import GROUP, Stored, dequantise, int4_values
from .compilers import compile_often
from .weights import Bfloat16Product, Packed, Product, as_operator, int4_product, row_product

OUTPUTS = 16  # that torch's int4 operators have a multiple of
LEAST = 1e-30  # the largest activation of a row counts as no less
REST = 254  # parts of a step of int8, in which what it leaves over is counted: a half is 127


def scaled_row_product(x: Tensor, stored: Stored, inputs: int) -> Tensor:
    """``row_product`` with the weight that bf16 or int8 stands for; its outputs are scaled."""
    y = row_product(x, stored["values"][:, :inputs])
    return y * stored["scale"] if "scale" in stored else y


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
        self.stored = stored

    def __call__(self, x: Tensor) -> Tensor:
        values = self.made(to_bfloat16)(self.stored["values"])
        return F.linear(x.to(torch.bfloat16), values) * self.stored["scale"].float()

    def made(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """What is called in a function's place."""
        return function


class Int8Compiled(Int8Expanded):
    """The same as compilers make it; of one row by ``row_product``, which expands nothing.

    (Microseconds for 16,384 x 4,096 and the other way round on an NVIDIA H100, whose product with
    bfloat16 weights takes 50: one row 41 and 27, more rows 124; as ``Int8Expanded`` 236.)
    """

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) > 1:
            return super().__call__(x)
        return self.made(scaled_row_product)(x, self.stored, self.stored["values"].shape[1])

    def made(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """As a part of what is being compiled, or compiled by itself."""
        return function if torch.compiler.is_compiling() else _compiled(function)


_compiled = functools.cache(compile_often)


def to_bfloat16(values: Tensor) -> Tensor:
    """The same numbers; compilers read and write them at the memory's speed."""
    return values.to(torch.bfloat16)


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
