"""x W^T by the faster of the two libraries that torch calls on a CPU.

torch gives a float32 matrix product to MKL, whose kernels leave half of some processors' arithmetic
unused (AVX-512 on AMD's), and a convolution to oneDNN, whose kernels do not. A linear layer is a
convolution with a kernel of one pixel, its tokens the pixels: the same numbers up to rounding, the
same gradients, through public functions. On an AMD Zen 5 it takes less than half of the time, with
AVX-2 kernels 0.9 of it; see ``python -m benchmarks.speed train``.
"""

import platform

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIN_TOKENS = 256  # with fewer, rearranging the weights costs more than the product
IMAGES = 16  # that the tokens are dealt to: with fewer, torch takes no oneDNN in a single thread

_HAS_KERNELS = (
    platform.machine() in ("x86_64", "AMD64")
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
    if not _as_convolution(x, weight):
        return F.linear(x, weight, bias)
    y = F.conv2d(_pixels(x), weight[:, :, None, None], bias)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


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
    if not _as_convolution(x, weight):
        return slope @ weight, slope.T @ x if of_weight else None
    kernel = weight[:, :, None, None]
    x_slope, weight_slope, _ = torch.ops.aten.convolution_backward(
        _pixels(slope), _pixels(x), kernel, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1,
        [True, of_weight, False],
    )  # fmt: skip
    x_slope = x_slope.permute(0, 2, 3, 1).reshape(x.shape)
    return x_slope, weight_slope.view(weight.shape) if of_weight else None


def _as_convolution(x: Tensor, weight: Tensor) -> bool:
    return (
        _HAS_KERNELS
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() >= MIN_TOKENS * x.shape[-1]
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and bool(torch.backends.mkldnn.enabled)
    )


def _pixels(x: Tensor) -> Tensor:
    """[..., width] as images whose channels lie together in memory: [images, width, 1, pixels]."""
    tokens = x.numel() // x.shape[-1]
    images = IMAGES if tokens % IMAGES == 0 else 1
    return x.reshape(images, 1, tokens // images, x.shape[-1]).permute(0, 3, 1, 2)
