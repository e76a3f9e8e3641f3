"""The switch of the process under which weights are packed."""

import pytest
import torch

from retnet import machine


@pytest.fixture
def fast_products() -> None:
    """Float32 products by oneDNN: right on every CPU that keeps their digits, if not faster."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch without oneDNN")
    if not machine._keeps_all_digits():
        pytest.skip("a CPU whose products round to bfloat16 when they may")
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # every test ends without it
