"""Gated retention, the next step of the RetNet's authors (gRet of YOCO, arXiv 2405.05254, 2.2).

Retention whose decay is a function of the token: g_t = sigmoid(x_t W_d)^(1/16) for each head. The
rest is retention's: rotated queries and keys, a norm of each head, a swish gate, the same state.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..configuration import option
from ..documents import TokenInfo
from ..ops.precision import full_precision, wide_dtype
from .base import RotaryStep, State
from .retention import MultiScaleRetention, RetentionOptions, RetentionShared

ROOT = 16  # of the sigmoid: a fresh decay of 1/2 becomes 0.96


class GatedRetentionOptions(RetentionOptions):
    """Its own defaults, as its authors have them: values as wide as queries, no mean in the norm."""

    head_norm: str = option("rmsnorm", "groupnorm, rmsnorm or none")
    
