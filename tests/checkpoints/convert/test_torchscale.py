"""Whole models of the official code, converted, compute what it does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from retnet import RetNetForCausalLM, cli
from retnet.checkpoints.convert.torchscale import Told, from_torchscale
from retnet.commands import generate
from retnet.model.ops.decay import head_log_decay
from tests.checkpoints.convert.references import (
    REFERENCE,
    change_weights,
    convert,
    largest,
    outputs_of,
    source_folder,
    wider,
)

SWISH, GELU = "torchscale_swish_tied", "torchscale_gelu_untied_scaled"
# their normalisation of scores cancels in the head norm up to its eps, 1e-12 and 1e-6
TOLERANCE = {SWISH: 1e-8, GELU: 3e-4}
FLAGS = ("--activation", "swish", "--scale-embedding", "no", "--norm-eps", "1e-12")


@pytest.mark.parametrize("case", TOLERANCE)
def test_logits(case: str, tmp_path: Path) -> None:
    source = source_folder(case, tmp_path / "theirs")
    assert convert("from-torchscale", source, tmp_path / "ours") == 0
    model: Any = RetNetForCausalLM.from_pretrained(tmp_path / "ours").double().eval()
    outputs = outputs_of(case)
    with torch.no_grad():
        for mode in model.config.mixer_class.modes:
            found = model(outputs["input_ids"], mode=mode).logits
            assert largest(found - outputs["logits_exact_rel_pos"]) < TOLERANCE[case]
            if case == SWISH:
                expected = outputs["recurrent_logits_exact_rel_pos"]
                assert largest(found - expected) < TOLERANCE[case]
    assert model.config.tie_word_embeddings == (case == SWISH)
    assert ("lm_head.weight" in load_file(tmp_path / "ours/model.safetensors")) != (case == SWISH)


def test_options_in_place_of_a_configuration(tmp_path: Path, capsys) -> None:
    """A pickled file of fairseq's names, of which the buffers tell the heads."""
    weights = load_file(REFERENCE / f"{SWISH}.model.safetensors")
    file = tmp_path / "retnet.pt"
    torch.save(
        {f"decoder.{k}": x for k, x in weights.items()} | {"decoder.version": torch.ones(1)}, file
    )
    assert convert("from-torchscale", file, tmp_path / "ours") == 2
    words = "--norm-eps NUMBER, or"
    assert words in capsys.readouterr().err
    assert convert("from-torchscale", file, tmp_path / "ours", *FLAGS) == 0
    told = Told(config=REFERENCE / f"{SWISH}.config.json")
    expected = from_torchscale(file, told).config
    found = RetNetForCausalLM.config_class.from_pretrained(tmp_path / "ours")
    keys = ("num_heads", "ffn", "scale_embedding", "norm_eps", "head_norm_eps", "value_size")
    assert [getattr(found, k) for k in keys] == [getattr(expected, k) for k in keys]
    gelu = Told(None, 4, "gelu", True, 1e-6)
    bare = {k: x for k, x in weights.items() if "rel_pos" not in k}
    torch.save(bare, file)
    config = from_torchscale(file, gelu).config
    assert (config.num_heads, config.ffn, config.scale_embedding) == (4, "geglu", True)
    assert (config.norm_eps, config.head_norm_eps) == (1e-6, 1e-6)


def test_an_option_comes_before_the_configuration(tmp_path: Path) -> None:
    source = source_folder(SWISH, tmp_path / "theirs")
    config = from_torchscale(source, Told(activation="relu", norm_eps=1e-3)).config
    assert (config.ffn, config.norm_eps, config.scale_embedding) == ("reglu", 1e-3, False)


def test_the_port_of_syncdoth_with_the_decays_of_its_language_models(
    tmp_path: Path, capsys
) -> None:
    """Its names are torchscale's after model., its output layer is lm_head."""
    told = {"model_type": "retnet", "use_lm_decay": True, "use_glu": True}
    source = source_folder(SWISH, tmp_path / "theirs", **told)

    def port(weights: dict) -> dict:
        weights["lm_head.weight"] = weights.pop("output_projection.weight").clone()
        renamed = {k if k == "lm_head.weight" else f"model.{k}": x for k, x in weights.items()}
        return renamed | {"model.retnet_rel_pos.decay": head_log_decay("log_linear", 2).float()}

    change_weights(source, port)
    assert convert("inspect", source) == 0
    assert (
        "format       the format of syncdoth/RetNet (model_type retnet)" in capsys.readouterr().out
    )
    assert convert("from-torchscale", source, tmp_path / "ours") == 0
    weights = load_file(tmp_path / "ours/model.safetensors")
    first = load_file(REFERENCE / f"{SWISH}.model.safetensors")
    assert torch.equal(
        weights["model.layers.1.ffn.gate_proj.weight"], first["layers.1.ffn.fc1.weight"]
    )
    told = json.loads((tmp_path / "ours/config.json").read_text())
    assert told["decay"] == "log_linear"
    bare = source_folder(SWISH, tmp_path / "bare", model_type="retnet", use_lm_decay=True)
    change_weights(bare, lambda w: {k: x for k, x in port(w).items() if "rel_pos" not in k})
    assert from_torchscale(bare, Told()).config.decay == "log_linear"


def test_a_converted_model_generates(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """With a scaled embedding and another activation, by the fast step."""
    source = source_folder(GELU, tmp_path / "theirs")
    change_weights(source, wider)
    assert convert("from-torchscale", source, tmp_path / "ours", "--tokenizer", "bytes") == 0
    argv = [str(tmp_path / "ours"), "--prompt", "a", "--max-new-tokens", "4", "--greedy"]
    assert cli.run(generate.main, argv) == 0
    assert "fast step" in capsys.readouterr().err
    assert cli.run(generate.main, [str(source), "--prompt", "a"]) == 2
    words = "torchscale's format (the official RetNet code): make it ours by python -m retnet.c"
    assert words in capsys.readouterr().err
    (source / "config.json").unlink()
    assert cli.run(generate.main, [str(source), "--prompt", "a"]) == 2
    assert f"from-torchscale {source} TARGET" in capsys.readouterr().err


REFUSED: dict[str, Any] = {
    "deepnorm": True, "multiway": True, "moe_freq": 2, "layernorm_embedding": True,
    "decoder_normalize_before": False, "no_output_layer": True, "use_glu": False,
}  # fmt: skip


@pytest.mark.parametrize("key", REFUSED)
def test_what_ours_does_not_compute_is_refused_by_its_key(key: str, tmp_path: Path, capsys) -> None:
    source = source_folder(SWISH, tmp_path / "theirs", **{key: REFUSED[key]})
    assert convert("from-torchscale", source, tmp_path / "ours") == 2
    (line,) = capsys.readouterr().err.splitlines()
    words = f"error: {source}/config.json: {key} ({REFUSED[key]}) is of a model that ours does not"
    assert line.startswith(words) and not (tmp_path / "ours").exists()


def test_other_weights_are_refused_by_what_differs(tmp_path: Path, capsys) -> None:
    weights = load_file(REFERENCE / f"{SWISH}.model.safetensors")
    one = torch.ones(2)
    odd: dict[str, tuple[dict, str]] = {
        "biased": (
            weights | {"layers.0.retention.q_proj.bias": one},
            "is torchscale's format of before September 2023 (layers.0.retention.q_proj.bias): its "
            "layers have biases, which ours do not have, so no converter",
        ),
        "experts": (
            weights | {"layers.1.moe_layer.gate.wg.weight": one},
            "has layers.1.moe_layer.gate.wg.weight, of a mixture of experts (moe_freq)",
        ),
        "ways": (
            weights | {"layers.1.retention.q_proj.A.weight": one},
            "has layers.1.retention.q_proj.A.weight, of a multiway network (multiway)",
        ),
        "norm": (
            weights | {"layernorm_embedding.weight": one},
            "has layernorm_embedding.weight, a norm after the embedding (layernorm_embedding)",
        ),
        "more": (weights | {"layers.0.odd": one}, "has layers.0.odd, which torchscale's RetNet"),
        "yet": (
            {"decoder.layers.0.linear1.weight": one, "decoder.layers.0.linear1.bias": one},
            "is yet-another-retnet's format (decoder.layers.0.linear1.bias): its keys are conjugat",
        ),
        "jamie": (
            {"retentions.0.retentions.0.W_Q": one},
            "is the format of Jamie-Stirling/RetNet: its positions are xPos with a scale",
        ),
        "nobody": ({"h.0.attn.weight": one}, "has no weights of a RetNet: name torchscale's"),
        "decays": (
            weights | {"retnet_rel_pos.decay": -one},
            "retnet_rel_pos.decay is of 2 heads with other decays",
        ),
        "angles": (
            weights | {"retnet_rel_pos.angle": 1.001 * weights["retnet_rel_pos.angle"]},
            "retnet_rel_pos.angle has other angles than 2 heads of width 32 turn by",
        ),
        "less": (
            {k: x for k, x in weights.items() if k != "layers.1.ffn.fc2.weight"},
            "what is model.layers.1.ffn.down_proj.weight here is missing (1 such)",
        ),
        "shape": (
            weights | {"layers.1.ffn.fc2.weight": torch.ones(64, 64)},
            "layers.1.ffn.fc2.weight is [64, 64] and must be [64, 128]",
        ),
        "top": ({k: x for k, x in weights.items() if "embed" not in k}, "has no embed_tokens.weig"),
    }
    for name, (content, words) in odd.items():
        torch.save(content, tmp_path / f"{name}.pt")
        assert convert("from-torchscale", tmp_path / f"{name}.pt", tmp_path / "new", *FLAGS) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and words in error, error
    for name, content in (("empty", b""), ("text", b"hello")):
        (tmp_path / f"{name}.pt").write_bytes(content)
        assert convert("from-torchscale", tmp_path / f"{name}.pt", tmp_path / "new", *FLAGS) == 2
        assert f"{name}.pt) is no file of torch.save: copy it" in capsys.readouterr().err
    for told, words in (
        ({"activation_fn": "tanh"}, "activation_fn (tanh) must be one of swish, gelu, relu"),
        ({"activation_fn": ["gelu"]}, "activation_fn (['gelu']) must be one of swish, gelu, relu"),
        ({"decoder_retention_heads": 3}, "retnet_rel_pos.decay is of 2 heads with other decays"),
        ({"decoder_retention_heads": 1}, "2^(-5-h) or the log-linear ones of 1: only those"),
        ({"decoder_retention_heads": "2"}, "decoder_retention_heads (2) must be a whole number"),
        ({"layernorm_eps": -1}, "norm_eps (-1) must be between 0 and 1"),
    ):
        source = source_folder(SWISH, tmp_path / words[:20], **told)
        assert convert("from-torchscale", source, tmp_path / "new") == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
