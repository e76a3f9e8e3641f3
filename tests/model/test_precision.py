"""Low precision: nothing that must stay wide becomes narrow."""

import copy

import pytest
import torch

from retnet import RetNetForCausalLM
from retnet.model.mixers import MIXERS
from tests.model.conftest import make_model, random_ids

PARTS = {"mixer": ("q_proj", "k_proj", "v_proj", "g_proj"), "ffn": ("gate_proj", "up_proj")}


@pytest.fixture(scope="module")
def long_run():
    """Logits in float64 and of the bfloat16 copy, 1500 tokens."""
    wide = make_model("retention", torch.float32, hidden_size=64, num_heads=4, chunk_size=64)
    for parameter in wide.parameters():  # both compute with the same numbers
        parameter.data = parameter.data.bfloat16().float()
    ids = random_ids(2, 1500)
    with torch.no_grad():
        expected = copy.deepcopy(wide).double()(ids).logits
        narrow = copy.deepcopy(wide).bfloat16()(ids).logits.double()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = wide(ids).logits.double()
    return expected, {"weights": narrow, "autocast": mixed}


@pytest.mark.parametrize("kind", ["weights", "autocast"])
def test_bfloat16_is_as_good_far_out_as_at_the_beginning(long_run, kind: str) -> None:
    expected, outputs = long_run
    error = (outputs[kind] - expected).pow(2).mean(dim=(0, 2)).sqrt() / expected.std()
    assert error.mean() <= 0.04
    assert error[1250:].mean() <= 1.5 * error[:250].mean()


@pytest.mark.parametrize("kind", ["weights", "autocast"])
def test_the_modes_agree_in_bfloat16(kind: str) -> None:
    model = make_model("retention", torch.float32)
    ids = random_ids(1, 60)
    if kind == "weights":
        model = model.bfloat16()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind == "autocast"):
        outs = [model(ids, mode=m).logits.float() for m in ("parallel", "chunkwise", "recurrent")]
    for out in outs[1:]:
        assert (out - outs[0]).abs().max() < 0.1 * outs[0].std()


def test_no_cast_reaches_decays_and_angles(tmp_path) -> None:
    """There is nothing to cast: they are no parameters and no buffers."""
    model = make_model("retention", torch.float32)
    assert not list(model.buffers())
    assert not [name for name, _ in model.named_parameters() if "decay" in name or "rot" in name]
    model.save_pretrained(tmp_path)
    loaded = RetNetForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert loaded.dtype == torch.bfloat16
    ids = random_ids(1, 300)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model.bfloat16()(ids).logits)


@pytest.mark.parametrize(
    ("mixer", "kind"),
    [(name, kind) for name in MIXERS if name != "rwkv" for kind in PARTS],
)
def test_under_autocast_all_projections_read_one_cast_input(mixer: str, kind: str) -> None:
    """Where they have one: each of rwkv's mixes neighbours in another way."""
    model = make_model(mixer, torch.float32, ffn="swiglu")
    part, seen = getattr(model.model.layers[0], kind), list[torch.Tensor]()
    for name in PARTS[kind]:
        if (layer := getattr(part, name, None)) is not None:
            layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for narrow, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        seen.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow):
            model(random_ids(1, 5))
        assert len(seen) >= 1 and seen[0].dtype == dtype
        assert all(x is seen[0] for x in seen)
