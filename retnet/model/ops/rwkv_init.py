"""What RWKV-4's vectors start from, by layer and channel (RWKV-LM, RWKV-v4/src/model.py).

Each layer l of L begins with other time scales and another share of the token before: deeper ones
remember longer, and look less at the previous token. The code differs here from the paper's
appendix E (arXiv 2305.13048), which has the receptance's 1/2 as a factor instead of an exponent;
the code is what was trained. All results are float64 [d].
"""

import torch
from torch import Tensor


def time_decay(layer_idx: int, num_layers: int, width: int) -> Tensor:
    """The logarithm of the decay per token: from e^-5 in the first channel to e^3 in the last."""
    depth = _depth(layer_idx, num_layers)
    return -5 + 8 * (_channels(width) / max(width - 1, 1)) ** (0.7 + 1.3 * depth)


def time_first(width: int) -> Tensor:
    """The bonus of the current token: ln 0.3 and, in turn, half a nat less, as it is, and more."""
    zigzag = (_channels(width) + 1) % 3 - 1
    return torch.full_like(zigzag, 0.3).log() + 0.5 * zigzag


def time_mix(layer_idx: int, num_layers: int, width: int) -> dict[str, Tensor]:
    """The current token's share mu in what ``k``, ``v`` and ``r`` of the time mixing read."""
    share = _share(layer_idx, num_layers, width)
    return {"k": share, "v": share + 0.3 * _depth(layer_idx, num_layers), "r": share.sqrt()}


def channel_mix(layer_idx: int, num_layers: int, width: int) -> dict[str, Tensor]:
    """The current token's share mu in what ``k`` and ``r`` of the channel mixing read."""
    share = _share(layer_idx, num_layers, width)
    return {"k": share, "r": share.clone()}


def _channels(width: int) -> Tensor:
    return torch.arange(width, dtype=torch.float64)


def _depth(layer_idx: int, num_layers: int) -> float:
    """From 0 in the first layer to 1 in the last; 0 in the only one."""
    return layer_idx / max(num_layers - 1, 1)


def _share(layer_idx: int, num_layers: int, width: int) -> Tensor:
    return (_channels(width) / width) ** (1 - layer_idx / num_layers)
