"""torch.compile: no graph breaks, the same numbers."""

import shutil

import pytest
import torch

from tests.model.conftest import CONTENDERS, make_model, random_ids

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


QUICK = ("retention",)  # tracing takes seconds
EACH = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CONTENDERS
]


@pytest.mark.parametrize("mixer", EACH)
def test_forward_and_decode_trace_without_graph_breaks(mixer: str) -> None:
    """The eager backend traces like the others, but compiles nothing."""
    model = make_model(mixer)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    ids = random_ids(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        assert torch.allclose(compiled(ids, use_cache=False).logits, model(ids).logits)
        masked = compiled(ids, attention_mask=mask, segment_ids=ids // 30, use_cache=False).logits
        expected = model(ids, attention_mask=mask, segment_ids=ids // 30).logits
        assert torch.allclose(masked, expected)
        cache = model.new_cache(max_length=20)
        model(ids[:, :10], past_key_values=cache)
        parts = [compiled(ids[:, t : t + 1], past_key_values=cache).logits for t in (10, 11)]
        assert torch.allclose(torch.cat(parts, 1), model(ids).logits[:, 10:])


@needs_compiler
@pytest.mark.slow
def test_compiled_training_step_gives_the_same_gradients(mixer: str) -> None:
    torch._dynamo.reset()
    model = make_model(mixer, torch.float32)
    ids = random_ids(2, 24)

    def gradients(forward) -> list[torch.Tensor]:
        model.zero_grad()
        forward(ids, labels=ids, use_cache=False).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    for a, b in zip(gradients(torch.compile(model)), gradients(model), strict=True):
        assert torch.allclose(a, b, atol=1e-4 * b.abs().max().item() + 1e-7)


def test_forward_never_asks_the_device_for_a_number(mixer: str) -> None:
    """On the meta device every host synchronisation is an error."""
    model = make_model(mixer, torch.float32).to("meta")
    ids = torch.zeros(2, 12, dtype=torch.int64, device="meta")
    model(ids, attention_mask=ids, segment_ids=ids, position_ids=ids, labels=ids)
    cache = model.new_cache()
    model(ids, past_key_values=cache)
    model(ids[:, :1], past_key_values=cache, attention_mask=ids[:, :1])
