"""Groups of AdamW, and the course of the learning rate."""

import pytest
import torch

from retnet import RetNetConfig, RetNetForCausalLM
from retnet.training.optimizer import build_optimizer, learning_rate
from retnet.training.spec import TrainSpec


def test_matrices_are_decayed_and_vectors_are_not() -> None:
    model = RetNetForCausalLM(RetNetConfig(hidden_size=16, num_heads=2, vocab_size=20))
    spec = TrainSpec(weight_decay=0.3, beta1=0.8, beta2=0.9, learning_rate=0.5)
    optimizer = build_optimizer(model, spec)
    for group in optimizer.param_groups:
        assert {p.dim() >= 2 for p in group["params"]} == {group["weight_decay"] == 0.3}
        assert group["betas"] == (0.8, 0.9) and group["lr"] == 0.5
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))


@pytest.mark.parametrize("fused", [True, False])
def test_fused_is_passed_on_and_computes_the_same(fused: bool) -> None:
    results = []
    for choice in (fused, False):
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 4)
        optimizer = build_optimizer(layer, TrainSpec(fused_optimizer=choice))
        assert optimizer.defaults["fused"] is choice
        for _ in range(3):
            layer(torch.ones(1, 4)).sum().backward()
            optimizer.step()
        results.append(layer.weight)
    assert torch.allclose(*results, atol=1e-6)


def test_warm_up_then_down() -> None:
    for schedule, middle in (("cosine", 0.55), ("linear", 0.55), ("constant", 1.0)):
        spec = TrainSpec(
            learning_rate=1.0, warmup_steps=10, max_steps=110, schedule=schedule,
            final_learning_rate=0.1,
        )  # fmt: skip
        assert learning_rate(1, spec) == pytest.approx(0.1)
        assert learning_rate(10, spec) == 1.0
        assert learning_rate(60, spec) == pytest.approx(middle)
        end = 1.0 if schedule == "constant" else 0.1
        assert learning_rate(110, spec) == pytest.approx(end)
    quarter = learning_rate(35, TrainSpec(learning_rate=1.0, warmup_steps=10, max_steps=110))
    assert quarter == pytest.approx(0.1 + 0.9 * (1 + 0.5**0.5) / 2)
    assert learning_rate(1, TrainSpec(learning_rate=1.0, warmup_steps=0)) > 0.99
