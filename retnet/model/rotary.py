"""Rotary positions: the angles, and their application to queries and keys.

Retention's xPos is used without its scale (the decay plays that part), so it is plain rotation:
channel pairs (a, b) of the token at position n become (a cos n*theta - b sin n*theta,
b cos n*theta + a sin n*theta).
"""

import torch
from torch import Tensor

ROTARY_LAYOUTS = ("interleaved", "half")
ROTARY_FREQUENCIES = ("linspace", "standard")


def rotary_angles(positions: Tensor, head_dim: int, *, frequencies: str, base: float) -> Tensor:
    """Rotation angles, exact at any position.

    Args:
        positions: int64 [B, T].
        head_dim: K, even.
        frequencies: ``"linspace"``: theta = base^(-linspace(0, 1, K/2)), both ends included, the
            official RetNet's; ``"standard"``: theta_i = base^(-2i/K), Llama's.
        base: The longest wavelength is about 2 pi * base tokens.

    Returns:
        float64 [B, T, K/2], on the CPU where the device of ``positions`` has no float64.
    """
    if positions.device.type == "mps":
        positions = positions.cpu()
    half = head_dim // 2
    if frequencies == "linspace":
        exponent = torch.linspace(0, 1, half, dtype=torch.float64, device=positions.device)
    elif frequencies == "standard":
        exponent = torch.arange(half, dtype=torch.float64, device=positions.device) / half
    else:
        raise ValueError(
            f"rotary_frequencies ({frequencies!r}) must be one of {ROTARY_FREQUENCIES}"
        )
    return positions.to(torch.float64)[..., None] * torch.pow(base, -exponent)


def rotation(angles: Tensor, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of [B, T, K/2] angles as [B, 1, T, K/2], for ``rotate``."""
    cos, sin = angles.cos(), angles.sin()
    return cos.to(device, dtype)[:, None], sin.to(device, dtype)[:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    """Rotate the channel pairs of x.

    Args:
        x: [B, H, T, K].
        cos, sin: [B or 1, 1, T, K/2]; the result has their dtype when it is the wider one.
        layout: ``"interleaved"`` pairs channels (2i, 2i+1), ``"half"`` pairs (i, i + K/2).

    Returns:
        [B, H, T, K].
    """
    if layout == "interleaved" and not torch.compiler.is_compiling():
        # a pair is a complex number and the rotation a product: one pass over the memory (compilers
        # fuse the real form below, and know no complex numbers)
        wide = torch.promote_types(x.dtype, cos.dtype)
        pairs = torch.view_as_complex(x.to(wide).unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)
    if layout == "interleaved":
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
