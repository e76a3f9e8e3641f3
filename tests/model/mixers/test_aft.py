"""The attention-free transformer as a mixer: its variants, its state, its keys."""

import copy
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retnet import AFTConfig, AFTForCausalLM
from retnet.generation import decode_one, make_step, prefill
from retnet.model.ops.aft import aft_recurrent
from tests.model.batches import TOLERANCE, batches, cut, kept_rows, logits
from tests.model.conftest import ROW_BYTES, make_model, random_ids

VARIANTS: dict[str, dict[str, Any]] = {
    "local": {"aft_window": 3},
    "window 1": {"aft_window": 1},
    "simple": {"aft_variant": "simple", "aft_window": None},
    "simple, no positions": {"aft_variant": "simple", "aft_window": None, "positions": "none"},
    "full": {"aft_variant": "full", "aft_window": None},
    "full, no positions": {"aft_variant": "full", "aft_window": None, "positions": "none"},
}
MODELS = {name: make_model("aft", **keys) for name, keys in VARIANTS.items()}
variants = pytest.mark.parametrize("variant", VARIANTS)


@variants
@settings(max_examples=20, deadline=None)
@given(batch=batches(), data=st.data())
def test_every_variant_alone_packed_padded_and_in_pieces(
    variant: str, batch: dict, data: st.DataObject
) -> None:
    model, length = MODELS[variant], batch["input_ids"].shape[1]
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=3)))
    cache, parts = model.new_cache(), []
    for begin, end in itertools.pairwise([0, *cuts, length]):
        part = cut(batch, slice(begin, end))
        mode = data.draw(st.sampled_from([None, "parallel", "recurrent"]))
        ids = part.pop("input_ids")
        parts.append(logits(model, ids, **part, past_key_values=cache, mode=mode))
    out, keep = torch.cat(parts, dim=1), kept_rows(batch)
    segments = batch.get("segment_ids", torch.zeros_like(batch["input_ids"]))
    for row in range(out.shape[0]):
        columns = keep[row].nonzero().flatten().tolist()
        for _, group in itertools.groupby(columns, key=segments[row].tolist().__getitem__):
            document = list(group)
            alone = logits(model, batch["input_ids"][row, document][None])[0]
            assert (out[row, document] - alone).abs().max() < TOLERANCE


@variants
def test_gradients_through_the_state(variant: str) -> None:
    model, ids = MODELS[variant], random_ids(2, 9)

    def gradients(split: int, *modes: str) -> list[torch.Tensor]:
        cache, total = model.new_cache(), torch.zeros((), dtype=torch.float64)
        for part, mode in zip((slice(0, split), slice(split, 9)), modes, strict=True):
            out = model(ids[:, part], past_key_values=cache, mode=mode).logits
            total = total + (out * torch.linspace(-1, 1, 61, dtype=torch.float64)).sum()
        return list(torch.autograd.grad(total, list(model.parameters())))

    expected = gradients(1, "recurrent", "recurrent")
    for modes in (("parallel", "parallel"), ("recurrent", "parallel"), ("parallel", "recurrent")):
        for mine, theirs in zip(gradients(5, *modes), expected, strict=True):
            assert (mine - theirs).abs().max() < TOLERANCE


@variants
def test_the_step_is_the_forward_pass(variant: str) -> None:
    model, ids = copy.deepcopy(MODELS[variant]), random_ids(3, 16)
    plain = model.new_cache()
    prefill(model, ids[:, :7], plain)
    fast, step = copy.deepcopy(plain), make_step(model)
    places = {name: x.data_ptr() for name, x in fast.tensors().items()}
    for t in range(7, 16):
        expected = decode_one(model, ids[:, t], plain)
        assert (step(ids[:, t], fast) - expected).abs().max() < TOLERANCE
        assert step.path == "fast step"
    if not model.grows:
        assert places.items() >= {n: fast.tensors()[n].data_ptr() for n in places}.items()
    alone = model.new_cache()
    prefill(model, ids[1:2, :15], alone)
    assert (decode_one(model, ids[1:2, 15], alone) - expected[1]).abs().max() < TOLERANCE


@variants
def test_beams_and_left_padding(variant: str) -> None:
    model, ids = MODELS[variant], random_ids(2, 7)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    how = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    made = model.generate(ids, attention_mask=mask, **how)
    assert made.equal(model.generate(ids, attention_mask=mask, **how, use_cache=False))
    assert made[:1, 3:].equal(model.generate(ids[:1, 3:], **how))


@pytest.mark.parametrize(
    ("variant", "numbers"), [("local", 3 + 2 * 3), ("simple", 3), ("full", 2 * 20)]
)
def test_bytes_of_the_state(variant: str, numbers: int) -> None:
    """3 d, 3 d + 2 s d or 2 t d numbers, and the position of each kept token."""
    model = make_model("aft", torch.float32, **VARIANTS[variant])
    cache = model.new_cache()
    model(random_ids(2, 20), past_key_values=cache)
    kept = {"local": 3, "simple": 0, "full": 20}[variant]
    assert cache.num_bytes() == 2 * (2 * (numbers * 32 * 4 + kept * 8) + ROW_BYTES)
    assert model.grows == (variant == "full")


@variants
def test_loud_late_keys_change_nothing_before_them(variant: str) -> None:
    """Keys of about +-300, which no common maximum survives; T = 1 too."""
    model, ids = copy.deepcopy(MODELS[variant]).float(), random_ids(2, 33)
    for layer in model.model.layers:
        layer.mixer.k_proj.weight.data.mul_(100)
    whole = logits(model, ids)
    assert whole.isfinite().all()
    for mode in ("parallel", "recurrent"):
        for length in (1, 2, 17, 32):
            part = logits(model, ids[:, :length], mode=mode)
            assert (part - whole[:, :length]).abs().max() < 1e-4 * whole.abs().max()


def test_the_mixer_is_its_equation() -> None:
    """Against the sum over all pairs, in float64."""
    model, ids = MODELS["local"], random_ids(1, 11)
    mixer, x = model.model.layers[0].mixer, torch.randn(1, 11, 32, dtype=torch.float64)
    q, k, v = (f(x) for f in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    t = torch.arange(11)
    w = mixer.w_u[:11] @ mixer.w_v[:11].T
    w = w.where(t[:, None] - t < 3, 0.0).masked_fill(t > t[:, None], -torch.inf)
    weights = (k[:, None] + w[None, :, :, None]).softmax(2)
    expected = mixer.o_proj(torch.sigmoid(q) * (weights * v[:, None]).sum(2))
    out, _ = aft_recurrent(q, k, v, t[None], mixer.w_u, mixer.w_v, window=3)
    assert (mixer.o_proj(out) - expected).abs().max() < 1e-12
    assert logits(model, ids).shape == (1, 11, 61)


def test_one_layer_and_what_is_a_matrix() -> None:
    model = make_model("aft", num_hidden_layers=1, num_heads=1, hidden_size=30)
    mixer = model.model.layers[0].mixer
    assert mixer.w_u.shape == (64, 4) and set(mixer.no_matrices) == {"w_u", "w_v"}
    fresh = AFTForCausalLM(AFTConfig(vocab_size=9, max_position_embeddings=64)).model.layers[0]
    assert 0.09 < fresh.mixer.w_u.std() < 0.11
    assert make_model("aft", **VARIANTS["simple"]).model.layers[0].mixer.w_u is None


def test_layers_have_the_same_size_whatever_the_variant() -> None:
    sizes = [sum(p.numel() for p in model.parameters()) for model in MODELS.values()]
    assert max(sizes) < 1.01 * min(sizes)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"aft_window": 2049}, r"aft_window \(2049\) must be at most max_position_embeddings"),
        ({"aft_window": 0}, r"aft_window \(0\) must be a whole number of at least 1"),
        ({"aft_variant": "conv"}, r"aft_variant \('conv'\) must be one of local, simple, full"),
        ({"aft_variant": "simple", "aft_window": 3}, r"aft_window \(3\) has no meaning with"),
        ({"aft_rank": 0}, r"aft_rank \(0\)"),
        ({"positions": "rotary"}, r"positions \('rotary'\) has no meaning for aft"),
        ({"max_position_embeddings": 65536}, r"aft_rank \(64\), max_position_embeddings \(65536\)"),
    ],
)
def test_keys_that_make_no_model(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AFTConfig(**keys)


def test_defaults() -> None:
    config = AFTConfig()
    assert (config.aft_variant, config.aft_window, config.aft_rank) == ("local", 32, 64)
    assert config.positions == "learned" and config.longest == 2048
    assert AFTConfig(max_position_embeddings=8).aft_window == 8
    assert AFTConfig(aft_variant="full").aft_window is None
    assert AFTConfig(aft_variant="simple", positions="none").longest is None
