"""Fresh models know nothing: their first loss is ln(vocab_size)."""

import math

import pytest
import torch

from retnet import RetNetConfig, RetNetForCausalLM, TransformerConfig, TransformerForCausalLM
from retnet.model.models import PUBLIC, configuration

KINDS = [(configuration(model), model) for model in PUBLIC]


@pytest.mark.parametrize(("config", "kind"), KINDS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "size",
    [
        {"vocab_size": 259, "hidden_size": 128, "num_hidden_layers": 4},
        *(
            pytest.param(size, marks=pytest.mark.slow)
            for size in (
                {"vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 4},
                {"vocab_size": 8192, "hidden_size": 384, "num_hidden_layers": 6, "num_heads": 6},
                {"vocab_size": 500, "hidden_size": 2048, "num_hidden_layers": 1, "num_heads": 8},
            )
        ),
    ],
    ids=["128", "256", "384", "2048"],
)
@pytest.mark.parametrize("style", [{}, {"norm": "rmsnorm", "ffn": "swiglu"}], ids=["gelu", "glu"])
def test_first_loss(config, kind, tied: bool, size: dict, style: dict) -> None:
    torch.manual_seed(0)
    window = {"max_position_embeddings": 128}  # where positions are weights
    model = kind(config(**size, **style, **window, tie_word_embeddings=tied)).eval()
    ids = torch.randint(0, size["vocab_size"], (8, 64))
    with torch.no_grad():
        out = model(ids, labels=ids)
    # but for the token itself, which tied weights and a norm of the embedding make likely
    others = out.logits.scatter(2, ids[..., None], 0.0)
    assert others.std() <= 0.4
    assert abs(out.loss.item() - math.log(size["vocab_size"])) <= 0.1


def test_the_official_gains() -> None:
    torch.manual_seed(0)
    model = RetNetForCausalLM(RetNetConfig(hidden_size=256, num_heads=4))
    mixer = model.model.layers[0].mixer
    assert mixer.q_proj.weight.std().item() == pytest.approx(2**-2.5 * (2 / 512) ** 0.5, rel=0.02)
    assert mixer.v_proj.weight.std().item() == pytest.approx(2**-2.5 * (2 / 768) ** 0.5, rel=0.02)
    assert mixer.o_proj.weight.std().item() == pytest.approx(2**-1 * (2 / 768) ** 0.5, rel=0.02)
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(256**-0.5, rel=0.02)


def test_gpt2s_depth_scaling() -> None:
    torch.manual_seed(0)
    model = TransformerForCausalLM(TransformerConfig(hidden_size=256, num_hidden_layers=8))
    mixer = model.model.layers[0].mixer
    assert mixer.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert mixer.o_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.02)
