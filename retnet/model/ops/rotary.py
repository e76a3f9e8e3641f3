"""Rotary positions: the angles, and their application to queries and keys.

Retention's xPos is used without its scale (the decay plays that part), so it is plain rotation:
channel pairs (a, b) of the token at position n become (a cos n*theta - b sin n*theta,
b cos n*theta + a sin n*theta).
"""

import torch
from torch import Tensor

ROTARY_LAYOUTS = ("interleaved", "half")
ROTARY_FREQUENCIES = ("linspace", "standard")


def rotary_theta(
    head_dim: int, *, frequencies: str, base: float, device: torch.device | None = None
) -> Tensor:
    """The angle by which each channel pair turns from one position to the next.

    Args:
        head_dim: K, even.
        frequencies: ``"linspace"``: theta = base^(-linspace(0, 1, K/2)), both ends included, the
            official RetNet's; ``"standard"``: theta_i = base^(-2i/K), Llama's.
        base: The longest wavelength is about 2 pi * base tokens.
        device: Where the result is wanted; one that has float64.

    Returns:
        float64 [K/2].
    """
    half = head_dim // 2
    if frequencies == "linspace":
        exponent = torch.linspace(0, 1, half, dtype=torch.float64, device=device)
    elif frequencies == "standard":
        exponent = torch.arange(half, dtype=torch.float64, device=device) / half
    else:
        raise ValueError(
            f"rotary_frequencies ({frequencies!r}) must be one of {ROTARY_FREQUENCIES}"
        )
    return torch.pow(base, -exponent)


def rotary_angles(positions: Tensor, head_dim: int, *, frequencies: str, base: float) -> Tensor:
    """Positions int64 [B, T] -> rotation angles float64 [B, T, K/2], exact at any position.

    They are on the CPU where the device of ``positions`` has no float64.
    """
    if positions.device.type == "mps":
        positions = positions.cpu()
    theta = rotary_theta(head_dim, frequencies=frequencies, base=base, device=positions.device)
    return positions.to(torch.float64)[..., None] * theta


def rotation(angles: Tensor, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of [B, T, K/2] angles as [B, 1, T, K/2], for ``Rotation``."""
    cos, sin = angles.cos(), angles.sin()
    return cos.to(device, dtype)[:, None], sin.to(device, dtype)[:, None]


class Rotation:
    """Turns the channel pairs of queries or keys.

    Args:
        cos, sin: [B or 1, H or 1, T, K/2].
        layout: ``"interleaved"`` pairs channels (2i, 2i+1), ``"half"`` pairs (i, i + K/2).
    """

    def __init__(self, cos: Tensor, sin: Tensor, layout: str) -> None:
        self.cos, self.sin, self.layout = cos, sin, layout
        # an interleaved pair is a complex number and its rotation a product: one pass over the
        # memory (compilers fuse the real form, and know no complex numbers)
        in_pairs = layout == "interleaved" and not torch.compiler.is_compiling()
        self.factor = torch.complex(cos, sin) if in_pairs else None

    def scaled(self, scale: float | Tensor) -> "Rotation":
        """The rotation that also multiplies by ``scale``."""
        return Rotation(self.cos * scale, self.sin * scale, self.layout)

    def __call__(self, x: Tensor) -> Tensor:
        """[B, H, T, K] -> [B, H, T, K], in the wider dtype of x and the rotation."""
        if self.factor is not None and not torch.compiler.is_compiling():
            x = x.to(torch.promote_types(x.dtype, self.cos.dtype))
            if not torch.is_grad_enabled():  # which these views have none for
                return (x.view(x.dtype.to_complex()) * self.factor).view(x.dtype)
            pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
            return torch.view_as_real(pairs * self.factor).flatten(-2)
        cos, sin = self.cos, self.sin
        if self.layout == "interleaved":
            a, b = x[..., 0::2], x[..., 1::2]
            return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
