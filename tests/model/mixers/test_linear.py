"""Linear attention and FAVOR+ as mixers: the authors' numbers, causality, sizes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from retnet.model import MIXERS
from retnet.model.documents import describe_tokens
from retnet.model.mixers.linear import LinearAttention
from retnet.model.models import model_class
from tests.model.conftest import make_model, random_ids

REFERENCE = Path(__file__).parents[1] / "ops" / "reference" / "linear"
FEATURES = [m for m in MIXERS if issubclass(MIXERS[m], LinearAttention)]
each = pytest.mark.parametrize("mixer", FEATURES)


def make_mixer(mixer: str, **values: Any) -> Any:
    config: Any = model_class(mixer).config_class
    keys: dict[str, Any] = {"hidden_size": 24, "num_heads": 3, "num_hidden_layers": 1}
    torch.manual_seed(0)
    return MIXERS[mixer](config(**keys | {"vocab_size": 8, "chunk_size": 8} | values)).double()


@pytest.mark.parametrize("mode", LinearAttention.modes)
def test_the_authors_layer(mode: str) -> None:
    case = load_file(REFERENCE / "layer_t37.safetensors")
    weights = load_file(REFERENCE / "layer_t37.model.safetensors")
    mixer = make_mixer("linear", hidden_size=48, positions="none")
    names = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "out"}
    for ours, theirs in names.items():
        getattr(mixer, ours).weight.data = weights[f"{theirs}_projection.weight"].double()
    out, state = mixer(case["x"].double(), mode=mode)
    assert (out - case["out"]).abs().max() < 1e-12
    if "state_s" in case:
        assert (state["state"][..., :-1] - case["state_s"]).abs().max() < 1e-11


@each
def test_loud_late_keys_change_nothing_before(mixer: str) -> None:
    """Exponents of hundreds: with a maximum over all time the early outputs would be lost."""
    part = make_mixer(mixer)
    hidden = torch.randn(2, 30, 24, dtype=torch.float64)
    loud = hidden.clone()
    loud[:, 11:] *= 200
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        part = part.to(dtype)
        for mode in part.modes:
            out, _ = part(hidden.to(dtype), mode=mode)
            late, _ = part(loud.to(dtype), mode=mode)
            assert torch.isfinite(late).all()
            assert (out[:, :11] - late[:, :11]).abs().max() <= tolerance


@each
def test_rows_side_by_side_are_rows_alone(mixer: str) -> None:
    model, ids = make_model(mixer, num_hidden_layers=1), random_ids(3, 7)
    with torch.no_grad():
        together, alone = model.new_cache(), [model.new_cache() for _ in range(3)]
        for t in range(7):
            out = model(ids[:, t : t + 1], past_key_values=together).logits
            for row, cache in enumerate(alone):
                one = model(ids[row : row + 1, t : t + 1], past_key_values=cache).logits
                assert (out[row] - one[0]).abs().max() < 1e-12


@each
def test_the_size_of_the_state(mixer: str) -> None:
    """H D (M + 1) numbers; of m features and one maximum per head H (m (M + 1) + 1)."""
    model = make_model(mixer, torch.float32)
    config = model.config
    numbers = config.num_heads * config.head_dim * (config.head_dim + 1)
    if "num_features" in config.__dataclass_fields__:
        numbers = config.num_heads * (config.num_features * (config.head_dim + 1) + 1)
    for length in (1, 300):
        cache = model(random_ids(2, length), use_cache=True).past_key_values
        tensors = [x for name, x in cache.tensors().items() if ".mixer." in name]
        assert sum(x.nbytes for x in tensors) == 2 * 2 * 4 * numbers


@each
def test_a_model_has_twelve_squares_in_a_layer(mixer: str) -> None:
    kind: Any = model_class(mixer)
    with torch.device("meta"):
        model = kind(kind.config_class(hidden_size=64, num_hidden_layers=2))
    weights = [p for p in model.model.layers.parameters() if p.dim() == 2]
    assert sum(p.numel() for p in weights) == 2 * 12 * 64**2


@each
def test_learned_positions_rotate_nothing(mixer: str) -> None:
    part = make_mixer(mixer, positions="learned", max_position_embeddings=16)
    hidden = torch.randn(1, 6, 24, dtype=torch.float64)
    far = describe_tokens(hidden, position_ids=torch.arange(6)[None] + 5)
    assert torch.equal(part(hidden)[0], part(hidden, part.shared(far, {})[0])[0])
