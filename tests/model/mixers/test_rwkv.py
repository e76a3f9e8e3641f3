"""What is RWKV's own: state, initialisation, precision, its channel mixing."""

import copy

import pytest
import torch

from retnet import RWKVConfig, RWKVForCausalLM
from retnet.generation import decode_one, make_step, prefill
from retnet.model import MIXERS
from retnet.training.optimizer import build_optimizer
from retnet.training.spec import TrainSpec
from tests.model.conftest import make_model, random_ids

FFNS = ("rwkv", "gelu", "swiglu")


def fresh(**values) -> RWKVForCausalLM:
    torch.manual_seed(0)
    return RWKVForCausalLM(RWKVConfig(**{"vocab_size": 61, "hidden_size": 48} | values))


def state_bytes(cache) -> int:
    parts = [part for layer in cache.layers for part in (layer.mixer, layer.ffn)]
    return sum(x.nbytes for part in parts for x in part.values())


@pytest.mark.parametrize(("ffn", "vectors"), [("rwkv", 5), ("gelu", 4)])
def test_the_state_has_five_vectors(ffn: str, vectors: int) -> None:
    """4 without the channel mixing; shifts have the activations' type, sums float32."""
    for dtype, width in ((torch.float32, 4), (torch.float64, 8)):
        cache = make_model("rwkv", dtype, ffn=ffn)(random_ids(3, 7), use_cache=True).past_key_values
        assert state_bytes(cache) == 2 * 3 * vectors * 32 * width
    cache = make_model("rwkv", torch.bfloat16, ffn=ffn)(random_ids(1, 7)).past_key_values
    mixer, shifts = cache.layers[0].mixer, [part["shift"] for part in (cache.layers[0].mixer,)]
    shifts += [cache.layers[0].ffn["shift"]] if ffn == "rwkv" else []
    assert {x.dtype for x in shifts} == {torch.bfloat16}
    assert {mixer[name].dtype for name in ("num", "den", "max")} == {torch.float32}


@pytest.mark.parametrize("ffn", FFNS)
def test_a_layer_has_12_d2_matrix_parameters(ffn: str) -> None:
    layer = fresh(ffn=ffn).model.layers[0]
    count = sum(p.numel() for p in layer.parameters() if p.dim() == 2)
    assert abs(count - 12 * 48**2) <= 48
    assert fresh().config.intermediate_size == 168  # 3.5 d
    assert fresh(hidden_size=50).config.hidden_size == 50  # it has no heads to divide


def test_the_authors_initialisation() -> None:
    model = fresh(num_hidden_layers=3)
    for index, layer in enumerate(model.model.layers):
        mixer, ffn = layer.mixer, layer.ffn
        for linear in (mixer.k_proj, mixer.r_proj, mixer.o_proj, ffn.r_proj, ffn.down_proj):
            assert not linear.weight.any()
        eye = torch.eye(48)
        assert torch.allclose(mixer.v_proj.weight @ mixer.v_proj.weight.T, eye, atol=1e-5)
        up = ffn.up_proj.weight
        assert torch.allclose(up.T @ up, 3.5 * eye, atol=1e-4)
        for part in (mixer, ffn):
            for name, value in part.vectors().items():
                assert torch.equal(getattr(part, name), value.float()), (index, name)
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(1e-4, rel=0.05)
    assert model.model.layers[0].mixer.mix_v[-1] < model.model.layers[2].mixer.mix_v[-1]
    one = fresh(num_hidden_layers=1).model.layers[0].mixer
    assert one.time_decay.isfinite().all() and one.mix_v.equal(one.mix_k)
    tied = fresh(tie_word_embeddings=True)
    assert tied.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_decay_and_bonus_stay_float32_and_are_not_decayed() -> None:
    """Also when all else becomes bfloat16, on any way; no digit is lost on the way back."""
    model = fresh()
    before = {name: model.get_parameter(name).clone() for name in model.wide_names()}
    assert len(before) == 2 * model.config.num_hidden_layers
    model(random_ids(1, 4), labels=random_ids(1, 4)).loss.backward()
    for change in (lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.to(torch.bfloat16)):
        narrow = change(copy.deepcopy(model))
        for name, parameter in narrow.named_parameters():
            assert (parameter.dtype == torch.float32) == (name in before), name
            assert parameter.grad is None or parameter.grad.dtype == parameter.dtype
        assert all(narrow.float().get_parameter(n).equal(x) for n, x in before.items())
    assert {p.dtype for p in model.double().parameters()} == {torch.float64}
    groups = build_optimizer(model, TrainSpec()).param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(p) for p in model.parameters() if p.dim() == 2}


@pytest.mark.parametrize("ffn", FFNS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_step_is_the_forward_pass(ffn: str, dtype: torch.dtype) -> None:
    model, ids = make_model("rwkv", dtype, ffn=ffn), random_ids(3, 12)
    cache, step = model.new_cache(), make_step(model)
    prefill(model, ids[:, :7], cache)
    plain, error = copy.deepcopy(cache), []
    for t in range(7, 12):
        expected = decode_one(model, ids[:, t], plain).double()
        error.append((step(ids[:, t], cache).double() - expected).abs().max() / expected.std())
    assert step.path == "fast step"
    assert max(error) < (1e-9 if dtype == torch.float64 else 0.05)
    for mine, theirs in zip(cache.layers, plain.layers, strict=True):
        for part in ("mixer", "ffn"):
            for name, x in getattr(theirs, part).items():
                assert (getattr(mine, part)[name] - x).abs().max() <= 2 * max(error) * x.abs().max()


@pytest.mark.parametrize("mode", MIXERS["rwkv"].modes)
def test_a_loud_late_token_changes_nothing_before_it(mode: str) -> None:
    model = make_model("rwkv")
    embedded = model.model.embed_tokens(random_ids(1, 12)).detach()
    for layer in model.model.layers:
        layer.mixer.k_proj.weight.data.mul_(200)  # keys of some hundreds
    loud = embedded.clone()
    loud[:, 8:] = loud[:, 8:].flip(-1) * 100
    with torch.no_grad():
        quiet, after = (model(inputs_embeds=x, mode=mode).logits for x in (embedded, loud))
    assert after.isfinite().all() and quiet[:, :8].equal(after[:, :8])
    assert (quiet[:, 8:] - after[:, 8:]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("chunk_size", 1, r"chunk_size \(1\) must be at least 2"),
        ("chunk_size", 0, r"chunk_size \(0\) must be a whole number"),
        ("positions", "rotary", r"positions \('rotary'\) has no meaning for rwkv"),
        ("ffn", "rwvk", r"ffn \('rwvk'\) must be one of .*reglu, rwkv; did you mean 'rwkv'"),
    ],
)
def test_mistakes(key: str, value: object, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        RWKVConfig(**{key: value})
