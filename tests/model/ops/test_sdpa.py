"""Which of torch's kernels for softmax attention may be taken."""

import pytest
import torch
from torch.backends import cuda

from retnet.model.ops.sdpa import for_any_length


@pytest.fixture(params=[True, False])
def allowed(request):
    """Whether cuDNN's kernels are."""
    before = cuda.cudnn_sdp_enabled()
    cuda.enable_cudnn_sdp(request.param)
    yield request.param
    cuda.enable_cudnn_sdp(before)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_those_planned_for_each_length_are_left_out_on_a_gpu(device: str, allowed: bool) -> None:
    with for_any_length(torch.device(device)):
        assert cuda.cudnn_sdp_enabled() is (allowed and device == "cpu")
    assert cuda.cudnn_sdp_enabled() is allowed


def test_also_after_an_error(allowed: bool) -> None:
    with pytest.raises(ZeroDivisionError), for_any_length(torch.device("cuda")):
        raise ZeroDivisionError
    assert cuda.cudnn_sdp_enabled() is allowed
