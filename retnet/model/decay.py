"""The decay of each retention head: fixed numbers, never parameters, computed only here.

Decays are close to 1 (1 - 2^-9 and nearer), where bfloat16 knows nothing but 1.0. So they are kept
as logarithms, computed in float64 inside every forward pass, and no cast of the model reaches them.
"""

import math

import torch
from torch import Tensor

DECAY_SCHEDULES = ("paper", "log_linear")


def head_log_decay(
    decay: str | float, num_heads: int, device: torch.device | str | None = None
) -> Tensor:
    """The natural logarithm of each head's decay.

    Args:
        decay: ``"paper"``: 1 - 2^(-5-h) for head h (arXiv 2307.08621, section 2.1 equation 8);
            ``"log_linear"``: 1 - exp(linspace(ln 1/32, ln 1/512, H)), the schedule of the paper's
            experiments; a number in (0, 1]: the same decay for all heads (1 is no decay).
        num_heads: H.
        device: Where the result is wanted.

    Returns:
        float64 [H] (float32 where the device has no float64).
    """
    wide = torch.float32 if torch.device(device or "cpu").type == "mps" else torch.float64
    if isinstance(decay, str):
        if decay == "paper":
            forget = torch.exp2(-5.0 - torch.arange(num_heads, dtype=wide, device=device))
        elif decay == "log_linear":
            ends = math.log(1 / 32), math.log(1 / 512)
            forget = torch.linspace(*ends, num_heads, dtype=wide, device=device).exp()
        else:
            raise ValueError(
                f"decay ({decay!r}) must be one of {DECAY_SCHEDULES}, or a number in (0, 1]"
            )
        return torch.log1p(-forget)  # log(1 - x) would lose x below 2^-24 in float32
    return torch.full((num_heads,), math.log(decay), dtype=wide, device=device)


def head_windows(decay: str | float, num_heads: int) -> list[float]:
    """How far each head looks back: 1 / (1 - decay) tokens, infinite without decay."""
    forget = -torch.expm1(head_log_decay(decay, num_heads))
    return [1 / f if f > 0 else math.inf for f in forget.tolist()]
