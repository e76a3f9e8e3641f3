"""Low-rank factors beside a model's weights, and the sums that its checkpoints hold."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from retnet.checkpoints import Progress, Snapshot, load_checkpoint_state, save_checkpoint
from retnet.checkpoints.lora import add_lora, check_base, factors, merged
from retnet.data import load_tokenizer
from retnet.errors import UserError
from retnet.training.config import load_config
from retnet.training.optimizer import build_optimizer
from tests.generation.builders import tiny_model

pytest.importorskip("peft")
IDS = torch.arange(9)[None]


def adapted(seed: int = 0) -> Any:
    """A model whose factors do something; the weights beside them are the same for all seeds."""
    model = tiny_model("retention", dtype=torch.float32)
    add_lora(model, 3)
    torch.manual_seed(seed)
    for factor in factors(dict(model.named_parameters())).values():
        factor.data.normal_()
    return model


def test_the_sums_are_what_the_adapted_model_computes() -> None:
    model = adapted()
    a, b = (
        model.get_parameter(f"model.layers.1.mixer.q_proj.lora_{x}.default.weight") for x in "AB"
    )
    found, plain = merged(model, model.state_dict()), tiny_model("retention", dtype=torch.float32)
    name = "model.layers.1.mixer.q_proj.weight"
    expected = plain.state_dict()[name] + 2 * b @ a  # of any rank
    torch.testing.assert_close(found[name], expected)
    plain.load_state_dict(found)
    torch.testing.assert_close(plain(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


def test_the_base_of_the_sums_is_recognised() -> None:
    model = adapted()
    sums = merged(model, model.state_dict())
    check_base(model, sums, Path("c"))
    sums["model.layers.0.ffn.up_proj.weight"] += 0.01
    words = r"is not the base that checkpoint \(c\) .*: model.layers.0.ffn.up_proj.weight differs"
    with pytest.raises(UserError, match=words):
        check_base(model, sums, Path("c"))


def test_factors_come_back_from_beside_the_sums(tmp_path: Path) -> None:
    one, other = adapted(1), adapted(2)
    train = load_config(None, []).train
    steps = [build_optimizer(model, train) for model in (one, other)]
    one(IDS, labels=IDS).loss.backward()
    steps[0].step()
    snapshot = Snapshot(load_tokenizer("bytes"), {"source": "somewhere"})
    save_checkpoint(tmp_path / "c", one, one, steps[0], Progress(step=1), snapshot)
    assert not factors(load_file(tmp_path / "c/model.safetensors"))
    load_checkpoint_state(tmp_path / "c", other, steps[1])
    for name, weight in one.state_dict().items():
        assert weight.equal(other.state_dict()[name]), name
    (tmp_path / "c/lora.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no lora.safetensors: go on from one in checkpoints/"):
        load_checkpoint_state(tmp_path / "c", other, steps[1])
