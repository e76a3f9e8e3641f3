"""Small models of both kinds."""

from typing import Any

import pytest
import torch

from retnet.model import MIXERS
from retnet.model.mixers.base import Mixer
from retnet.model.models import model_class
from tests.generation.builders import fill_zeros

VOCAB = 61
ROW_BYTES = 3 * 8  # of a cache for each row beside the layers' states: three integers
PAD, BOS, EOS = 60, 59, 58


# models of which layers differ, or that a key makes another one: the contract holds for them too
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "hybrid": ("retention", {"attention_layers": [1]}),
    "hybrid-window": ("gated_retention", {"attention_layers": [0], "attention_window": 5}),
    "attention-window": ("attention", {"attention_window": 5}),
    "grouped": (
        "retention",
        {"num_kv_heads": 1, "head_norm_affine": True, "scale_embedding": True, "ffn": "geglu"},
    ),
    "ablated": ("retention", {"gate": False, "head_norm": "none", "decay": 1}),
}
CONTENDERS: dict[str, type[Mixer]] = MIXERS | {
    name: MIXERS[mixer] for name, (mixer, _) in VARIANTS.items()
}


# of the variants one by default; the others, which share its code, with the slow tests
QUICK = (*MIXERS, "hybrid-window")
EACH: list[Any] = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CONTENDERS
]


def make_model(mixer: str, dtype: torch.dtype = torch.float64, seed: int = 0, **values: Any):
    """A fresh two-layer model in eval mode, its weights large enough to matter.

    mixer: Of ``CONTENDERS``.
    """
    torch.manual_seed(seed)
    mixer, own = VARIANTS.get(mixer, (mixer, {}))
    values = own | values
    keys = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2}
    keys |= {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    own = {"chunk_size": 5, "aft_window": 3, "aft_rank": 4}
    keys |= {k: v for k, v in own.items() if k in MIXERS[mixer].options.__dataclass_fields__}
    if MIXERS[mixer].positions == "learned":
        keys["max_position_embeddings"] = 64  # the table is a part of the layers
    kind: Any = model_class(mixer)
    model = kind(kind.config_class(**keys | values))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(2)
    fill_zeros(model)
    return model.to(dtype).eval()


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    """Ordinary token ids."""
    return torch.randint(0, EOS, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=EACH)
def mixer(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(mixer: str):
    return make_model(mixer)
