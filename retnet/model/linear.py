"""x W^T on a CPU, by the fastest of the products that torch has for that many rows x.

* Many rows: torch gives a float32 matrix product to MKL, whose kernels leave half of some
  processors' arithmetic unused (AVX-512 on AMD's), and a convolution to oneDNN, whose kernels do
  not. A linear layer is a convolution of one pixel: the same numbers up to rounding, the same
  gradients, through public functions. On an AMD Zen 5 it takes less than half of the time.
* Few rows: rearranging W for a convolution would cost more than the product. As W x^T it is the
  rows that are rearranged, and W is read as it lies: also twice as fast, where the product is large
  enough to pay for the call.
  Packed beforehand in oneDNN's own layout it is faster still (``pack``), at the price of a copy.
* Very few: the product's time is that of reading W, which MKL does at a third of the memory's
  speed, sharing the work badly between threads. As a batch of products with blocks of W it does
  neither. (GB/s for one row of width 1,024, 2 threads, AMD Zen 5: 22 as one product, 42 as x W^T in
  blocks, 63 as W x^T in blocks; for 16 rows 9, 15 and 13, and 33 as a convolution.)

On other devices, and for other types, it is ``F.linear``.
"""

import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCKS = 16  # of W; measured: anything from 8 to 64 is as fast
MOST_LEFT = 4  # rows up to which W x^T is the faster way, above it x W^T
MOST_ROWS = 64  # of a product in blocks; more rows are a matrix product like any other
MIN_TOKENS = 256  # from which x is rearranged for a convolution, with fewer it is W
MIN_PRODUCTS = 2**24  # multiplications from which a convolution of few rows pays for its call
IMAGES = 16  # that the tokens are dealt to: with fewer, torch takes no oneDNN in a single thread

PLAIN = (Tensor, nn.Parameter)  # other classes (quantised, sharded) know their own products


def _made_by_intel() -> bool:
    listing = Path("/proc/cpuinfo")
    text = listing.read_text() if listing.exists() else platform.processor()
    return "GenuineIntel" in text


# On Intel's own processors MKL uses all there is.
_HAS_KERNELS = (
    platform.machine() in ("x86_64", "AMD64")
    and not _made_by_intel()
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
    and torch.backends.mkldnn.is_available()
)


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
    if rows >= MIN_TOKENS:
        if _has_kernels(x, weight):
            y = F.conv2d(_pixels(x), weight[:, :, None, None], bias)
            return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)
    elif rows > 0 and bias is None:
        few = _few_rows(x.reshape(rows, -1), weight)
        if few is not None:
            return few.view(*x.shape[:-1], -1)
    return F.linear(x, weight, bias)


def linear_gradients(
    x: Tensor, weight: Tensor, slope: Tensor, *, of_weight: bool = True
) -> tuple[Tensor, Tensor | None]:
    """The gradients of ``linear``, for who has no graph: those of x and (or None) of the weight.

    Args:
        x: [N, in].
        weight: [out, in].
        slope: [N, out], the gradient of the result.
        of_weight: Whether the weight's is wanted.
    """
    if x.shape[0] < MIN_TOKENS or not _has_kernels(x, weight):
        return slope @ weight, slope.T @ x if of_weight else None
    kernel = weight[:, :, None, None]
    x_slope, weight_slope, _ = torch.ops.aten.convolution_backward(
        _pixels(slope), _pixels(x), kernel, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1,
        [True, of_weight, False],
    )  # fmt: skip
    x_slope = x_slope.permute(0, 2, 3, 1).reshape(x.shape)
    return x_slope, weight_slope.view(weight.shape) if of_weight else None


class PackedWeight:
    """A copy of a weight in the layout of oneDNN's kernels, without gradients.

    Args:
        weight: [out, in], float32 on a CPU.
        rows: Of the products; with another number they are right, but may be slower.
    """

    def __init__(self, weight: Tensor, rows: int) -> None:
        # what torch.compile makes of a frozen linear layer; torch has no public name for it
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, in] -> [rows, out]."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, None, "none", [], "")
        return y


def pack(weight: Tensor | PackedWeight, rows: int) -> Tensor | PackedWeight:
    """The weight packed for products with that many rows, or as it is where that is not slower."""
    if isinstance(weight, Tensor) and rows > MOST_LEFT and _has_kernels(weight):
        return PackedWeight(weight, rows)
    return weight


def product(x: Tensor, weight: Tensor | PackedWeight) -> Tensor:
    """``linear`` for a weight that may be packed: [rows, in] -> [rows, out]."""
    return linear(x, weight) if isinstance(weight, Tensor) else weight(x)


def _few_rows(x: Tensor, weight: Tensor) -> Tensor | None:
    """[rows, in] -> [rows, out]; None where no way is faster than a plain product."""
    rows = x.shape[0]
    if rows > MOST_LEFT and torch.compiler.is_compiling():
        return None
    large = rows > MOST_LEFT and rows * weight.numel() >= MIN_PRODUCTS
    if large and _has_kernels(x, weight):
        y = F.conv2d(_pixels(weight), x[:, :, None, None])  # [images, rows, 1, out / images]
        return y.transpose(0, 1).reshape(rows, -1).contiguous()
    return _in_blocks(x, weight) if rows <= MOST_ROWS and _has_blocks(weight) else None


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


def _has_kernels(*tensors: Tensor) -> bool:
    """Whether oneDNN's products of these are the faster ones."""
    return (
        _HAS_KERNELS
        and all(
            type(x) in PLAIN and x.device.type == "cpu" and x.dtype == torch.float32
            for x in tensors
        )
        and not torch.is_autocast_enabled("cpu")
        and bool(torch.backends.mkldnn.enabled)
    )


def _pixels(x: Tensor) -> Tensor:
    """[..., width] as images whose channels lie together in memory: [images, width, 1, pixels]."""
    tokens = x.numel() // x.shape[-1]
    images = IMAGES if tokens % IMAGES == 0 else 1
    return x.reshape(images, 1, tokens // images, x.shape[-1]).permute(0, 3, 1, 2)
