"""The figures printed before a run."""

import pytest
import torch

from retnet import RetNetConfig, RetNetForCausalLM, TransformerConfig
from retnet.training.build import build_model
from retnet.training.summary import count_parameters, estimate_memory

SIZE = {"hidden_size": 64, "num_hidden_layers": 3, "num_heads": 2, "vocab_size": 300}


def saved_bytes(model: torch.nn.Module, batch: int, length: int) -> int:
    """What a real forward pass keeps for the backward pass, parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes, held = {}, []

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in own:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            held.append(x)
        return x

    ids = torch.zeros(batch, length, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(ids, shift_labels=ids, return_logits=False)
    return sum(sizes.values())


@pytest.mark.parametrize("config", [RetNetConfig(**SIZE), TransformerConfig(**SIZE)])
@pytest.mark.parametrize(("batch", "length"), [(2, 64), (1, 400)])
def test_the_dry_run_finds_what_a_real_one_keeps(config, batch: int, length: int) -> None:
    model = build_model(config).train()
    estimate = estimate_memory(config, batch_size=batch, seq_len=length)
    assert estimate["weights"] == 4 * count_parameters(model)["total"] == estimate["gradients"]
    assert estimate["optimizer"] == 2 * estimate["weights"]
    assert estimate["activations"] == pytest.approx(saved_bytes(model, batch, length), rel=0.15)


def test_more_rows_more_memory_and_checkpointing_less() -> None:
    config = RetNetConfig(**SIZE)
    few, many, less = (
        estimate_memory(config, batch_size=b, seq_len=64, gradient_checkpointing=c)["activations"]
        for b, c in ((2, False), (8, False), (8, True))
    )
    assert 3 * few < many < 5 * few
    assert less < many / 2


def test_the_model_itself_is_not_touched() -> None:
    torch.manual_seed(0)
    a = RetNetForCausalLM(RetNetConfig(**SIZE))
    state = torch.get_rng_state()
    estimate_memory(a.config, batch_size=1, seq_len=8)
    assert torch.equal(state, torch.get_rng_state())
