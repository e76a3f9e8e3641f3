"""Which of torch's kernels for softmax attention may be taken."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.backends import cuda


@contextmanager
def for_any_length(device: torch.device) -> Iterator[None]:
    """On a GPU without cuDNN's kernels, which are planned anew for every number of keys.

    A step of a growing cache has another number at each token: planning took 40 ms of it (H200,
    torch 2.11), beside 0.3 ms of a small model's own work.
    """
    if device.type != "cuda" or not cuda.cudnn_sdp_enabled():
        yield
        return
    cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        cuda.enable_cudnn_sdp(True)
