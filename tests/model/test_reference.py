"""Our RetNet computes the numbers of the official code and of flash-linear-attention.

The weights are renamed by the tables below. See reference/README.md for where they come from.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from retnet import RetNetConfig, RetNetForCausalLM

REFERENCE = Path(__file__).parent / "reference"

TORCHSCALE = {
    "retention_layer_norm": "mixer_norm",
    "retention.q_proj": "mixer.q_proj",
    "retention.k_proj": "mixer.k_proj",
    "retention.v_proj": "mixer.v_proj",
    "retention.g_proj": "mixer.g_proj",
    "retention.out_proj": "mixer.o_proj",
    "final_layer_norm": "ffn_norm",
    "ffn.fc1": "ffn.gate_proj",  # the activated branch
    "ffn.gate": "ffn.up_proj",
    "ffn.fc2": "ffn.down_proj",
}
FLA = {
    "attn_norm": "mixer_norm",
    "attn.q_proj": "mixer.q_proj",
    "attn.k_proj": "mixer.k_proj",
    "attn.v_proj": "mixer.v_proj",
    "attn.g_proj": "mixer.g_proj",
    "attn.o_proj": "mixer.o_proj",
    "mlp_norm": "ffn_norm",
    "mlp.gate_proj": "ffn.gate_proj",
    "mlp.up_proj": "ffn.up_proj",
    "mlp.down_proj": "ffn.down_proj",
}


def load(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    weights = load_file(REFERENCE / f"{name}.model.safetensors")
    return weights, load_file(REFERENCE / f"{name}.outputs.safetensors")


def renamed(weights: dict[str, Tensor], prefix: str, names: dict[str, str]) -> dict[str, Tensor]:
    result = {}
    for layer in range(2):
        for theirs, ours in names.items():
            weight = weights[f"{prefix}layers.{layer}.{theirs}.weight"]
            result[f"model.layers.{layer}.{ours}.weight"] = weight
    return result


def build(weights: dict[str, Tensor], **values) -> RetNetForCausalLM:
    config = RetNetConfig(
        vocab_size=97, hidden_size=64, num_hidden_layers=2, num_heads=2, chunk_size=8,
        norm="rmsnorm", ffn="swiglu", head_norm="rmsnorm", **values,
    )  # fmt: skip
    model = RetNetForCausalLM(config)
    model.load_state_dict(weights)
    return model.double().eval()


@pytest.fixture(scope="module")
def official() -> tuple[RetNetForCausalLM, dict[str, Tensor]]:
    weights, outputs = load("torchscale_swish_tied")
    state = renamed(weights, "", TORCHSCALE)
    state["model.embed_tokens.weight"] = weights["embed_tokens.weight"]
    state["lm_head.weight"] = weights["output_projection.weight"]
    state["model.norm.weight"] = weights["layer_norm.weight"]
    model = build(
        state, intermediate_size=128, norm_eps=1e-12, head_norm_eps=1e-12, tie_word_embeddings=True
    )
    return model, outputs


@pytest.mark.parametrize("mode", ["parallel", "chunkwise", "recurrent"])
def test_official_logits(official, mode: str) -> None:
    model, outputs = official
    with torch.no_grad():
        logits = model(outputs["input_ids"], mode=mode).logits
    # theirs normalises the scores, which the head norm cancels up to its eps: 1.3e-9
    assert (logits - outputs["logits_exact_rel_pos"]).abs().max() < 1e-8
    assert (logits - outputs["recurrent_logits_exact_rel_pos"]).abs().max() < 1e-8


@pytest.fixture(scope="module")
def fla() -> tuple[RetNetForCausalLM, dict[str, Tensor]]:
    weights, outputs = load("fla_fused_untied")
    state = renamed(weights, "model.", FLA)
    state["model.embed_tokens.weight"] = weights["model.embeddings.weight"]
    state["lm_head.weight"] = weights["lm_head.weight"]
    state["model.norm.weight"] = weights["model.norm.weight"]
    for layer in range(2):
        # their head norm has a weight, shared by the heads: it goes into the output projection
        scale = weights[f"model.layers.{layer}.attn.g_norm_swish_gate.weight"]
        state[f"model.layers.{layer}.mixer.o_proj.weight"] *= scale.repeat(2)
    rotary = {"rotary_layout": "half", "rotary_frequencies": "standard"}
    return build(state, intermediate_size=96, norm_eps=1e-6, head_norm_eps=1e-6, **rotary), outputs


@pytest.mark.parametrize("mode", ["parallel", "chunkwise", "recurrent"])
def test_flash_linear_attention_logits(fla, mode: str) -> None:
    model, outputs = fla
    with torch.no_grad():
        logits = model(outputs["input_ids"], mode=mode).logits
    # scaling the float32 output projection by the head norm's weight rounds: 1e-7
    assert (logits - outputs["logits_float64"]).abs().max() < 2e-6


def test_flash_linear_attention_left_padding(fla) -> None:
    model, outputs = fla
    mask = outputs["attention_mask"]
    with torch.no_grad():
        logits = model(outputs["padded_input_ids"], attention_mask=mask).logits
    difference = (logits - outputs["padded_logits_float64"])[mask.bool()]
    assert difference.abs().max() < 2e-6
