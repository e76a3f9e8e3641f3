"""The backward pass of our own: what it is given and what it keeps."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from retnet.model.ops.chunkwise import ChunkRetention, mix_chunks
from retnet.model.ops.decay import ChunkDecays, chunk_decays, head_log_decay


def inputs(chunks: int, chunk_size: int, width: int, **flags: Tensor | None) -> tuple:
    """q, k, v and state of two rows and two heads, and their decays; the last chunk is full."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(2, 2, *shape, generator=generator, dtype=torch.float64).requires_grad_()

    tokens = (chunks, chunk_size)
    leaves = normal(*tokens, width), normal(*tokens, width), normal(*tokens, 2 * width)
    decays = chunk_decays(
        head_log_decay("paper", 2), chunks * chunk_size, chunk_size,
        flags.get("valid"), flags.get("resets"),
    )  # fmt: skip
    return (*leaves, normal(width, 2 * width)), decays


def kept(function: Callable[[], object]) -> int:
    """Bytes of the storages that a backward pass is going to need."""
    sizes: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        results = function()
    assert results
    return sum(sizes.values())


@pytest.mark.parametrize("flags", [(), ("valid",), ("resets",), ("valid", "resets")])
def test_it_is_the_plain_form(flags: tuple[str, ...]) -> None:
    random = torch.rand(2, 12, generator=torch.Generator().manual_seed(1))
    leaves, decays = inputs(4, 3, 2, **{name: random < 0.5 for name in flags})
    mine, plain = ChunkRetention.apply(*leaves, *decays), mix_chunks(*leaves, decays)
    torch.testing.assert_close(mine, plain, rtol=1e-12, atol=1e-12)
    slopes = [torch.randn_like(x) for x in plain[:2]]
    grads = (torch.autograd.grad(x[:2], leaves, slopes) for x in (mine, plain))
    for own, expected in zip(*grads, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-12)


def test_it_keeps_no_scores() -> None:
    """Inputs, decays and a state for each chunk; autograd keeps every product beside them."""
    leaves, decays = inputs(16, 64, 16)
    plain, mine = (
        kept(lambda: mix_chunks(*leaves, decays)),
        kept(lambda: ChunkRetention.apply(*leaves, *decays)),
    )
    needed = sum(x.nbytes for x in (*leaves, *decays) if x is not None)
    states = 2 * 2 * 16 * (16 * 32) * 8
    assert mine == needed + states
    assert mine < 0.6 * plain


def test_the_states_on_the_way_have_no_gradient() -> None:
    leaves, decays = inputs(2, 3, 2)
    assert [x.requires_grad for x in ChunkRetention.apply(*leaves, *decays)] == [True, True, False]


def test_decays_between_chunks_are_those_of_their_edges() -> None:
    """g^(tokens from a chunk's end to a later edge), one edge more than there are chunks."""
    log_decay = head_log_decay(0.5, 1)
    decays = chunk_decays(log_decay, 7, 3, None, None)
    assert isinstance(decays, ChunkDecays)
    expected = [[0, 0, 0], [1, 0, 0], [0.5**3, 1, 0], [0.5**4, 0.5, 1]]
    assert decays.between[0, 0].tolist() == [pytest.approx(row) for row in expected]
    assert decays.from_start[0, 0, :, 0].tolist() == pytest.approx([1, 0.5**3, 0.5**6, 0.5**7])
