"""What torch makes of a model for elsewhere: exported, traced, quantised."""

import pytest
import torch

from tests.model.conftest import CONTENDERS, make_model, random_ids


def last_logits(model, ids, **options):
    with torch.no_grad():
        return model(ids, use_cache=False, **options).logits


@pytest.mark.parametrize(
    "mixer",
    [
        name if name in ("retention", "attention") else pytest.param(name, marks=pytest.mark.slow)
        for name in CONTENDERS
    ],
)
def test_export_with_any_length(mixer: str) -> None:
    """In the parallel form: the others unroll their chunks, and are as long as the example."""
    model = make_model(mixer, torch.float32)
    options = {"mode": "parallel"} if "parallel" in CONTENDERS[mixer].modes else {}
    example = {"input_ids": random_ids(1, 12), "use_cache": False} | options
    any_length = bool(options) or not CONTENDERS[mixer].modes
    length = {1: torch.export.Dim("length", min=2, max=512)} if any_length else None
    shapes = dict.fromkeys(example) | {"input_ids": length}
    exported = torch.export.export(model, (), example, dynamic_shapes=shapes, strict=False).module()
    for length in (2, 33, model.config.longest or 300) if any_length else (12,):
        ids = random_ids(1, length)
        found = exported(input_ids=ids, use_cache=False, **options).logits
        assert torch.allclose(found, last_logits(model, ids), atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_trace(model) -> None:
    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(ids, use_cache=False).logits

    traced = torch.jit.trace(Logits(), (random_ids(1, 12),), check_trace=False)
    for length in (3, 12, 20):
        ids = random_ids(1, length)
        assert torch.allclose(traced(ids), last_logits(model, ids), atol=1e-10)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_dynamic_quantisation_takes_every_linear_layer(mixer: str) -> None:
    model = make_model(mixer, torch.float32)
    linears = sum(type(module) is torch.nn.Linear for module in model.modules())
    small = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    kind = torch.ao.nn.quantized.dynamic.Linear
    assert sum(type(module) is kind for module in small.modules()) == linears > 0
    ids = random_ids(1, 12)
    expected = last_logits(model, ids)
    error = (last_logits(small, ids) - expected).std()
    assert 0 < error < 0.2 * expected.std()
    how = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    assert small.generate(ids, **how).shape == (1, 17)
