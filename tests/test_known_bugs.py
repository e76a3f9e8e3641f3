"""One test for each class of bug that other implementations of RetNet have had.

Each check is run twice: on our code, and with the bug put in, where it must fail. Those that make
figures wrong (10 to 12) are in ``test_known_bugs_figures``.
"""

import functools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from retnet import RetNetForCausalLM
from retnet.model import decoder
from retnet.model.mixers import base
from retnet.model.mixers import retention as mixer_module
from retnet.model.ops import retention
from retnet.model.ops.decay import head_log_decay
from retnet.model.ops.rotary import rotary_angles, rotation
from tests.model.conftest import make_model, random_ids
from tests.model.recorders import LargestTensor

Patch = pytest.MonkeyPatch
MODES = ("parallel", "chunkwise", "recurrent")
# what the mixer calls for each
FORMS = {
    "parallel": "retention_parallel",
    "chunkwise": "retention_chunkwise",
    "recurrent": "retention_recurrent",
}
both_mixers = pytest.mark.parametrize("mixer", ["retention", "attention"])


def run(model, ids: Tensor, **arguments) -> Tensor:
    with torch.no_grad():
        return model(ids, **arguments).logits.double()


def continued(model, ids: Tensor, cuts: list[int], modes: list[str | None]) -> Tensor:
    """Logits of pieces that are handed over through a cache."""
    cache = model.new_cache()
    pieces = ids.tensor_split(cuts, dim=1)
    return torch.cat(
        [run(model, x, past_key_values=cache, mode=m) for x, m in zip(pieces, modes, strict=True)],
        dim=1,
    )


def fails(check: Callable[[], bool], patch: Patch, target: object, name: str, bug: object) -> bool:
    """Whether the check fails with the bug in place of ``target.name``."""
    with patch.context() as inside:
        inside.setattr(target, name, bug)
        return not check()


@pytest.mark.parametrize("precision", ["weights", "autocast"])
def test_bug_01_positions_in_low_precision(precision: str, monkeypatch: Patch) -> None:
    """Positions in the activations' dtype: past 256 bfloat16 skips every other one."""
    model = make_model("retention", torch.float32, hidden_size=64, num_heads=4, chunk_size=64)
    ids, autocast = random_ids(1, 1000), precision == "autocast"
    narrow = make_model(
        "retention",
        torch.float32 if autocast else torch.bfloat16,
        hidden_size=64,
        num_heads=4,
        chunk_size=64,
    )
    exact = run(model.double(), ids)[:, 768:]

    def check() -> bool:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            error = run(narrow, ids)[:, 768:] - exact
        return (error.pow(2).mean().sqrt() / exact.std()).item() < 0.05

    def in_bfloat16(positions: Tensor, *args, **kwargs) -> Tensor:
        return rotary_angles(positions.bfloat16().long(), *args, **kwargs)

    assert check()
    assert fails(check, monkeypatch, base, "rotary_angles", in_bfloat16)


def test_bug_02_decay_in_low_precision(monkeypatch: Patch, tmp_path: Path) -> None:
    """In bfloat16 the decays of heads 4-7 are 1.0; log(1 - 2^x) in float32 is 0 from head 20 on."""
    heads = 24
    wide = make_model("retention", torch.float32, hidden_size=2 * heads, num_heads=heads)
    wide.save_pretrained(tmp_path)
    loaded = RetNetForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    used: list[Tensor] = []
    real = mixer_module.retention_parallel
    monkeypatch.setattr(
        mixer_module, "retention_parallel", lambda *a, **k: used.append(a[3]) or real(*a, **k)
    )

    def check() -> bool:
        used.clear()
        for model in (loaded, wide.bfloat16()):
            run(model, random_ids(1, 4), mode="parallel")
        exact = torch.tensor([math.log1p(-(2.0 ** (-5 - h))) for h in range(heads)]).double()
        return all(((x.double() - exact) / exact).abs().max() < 1e-6 for x in used)

    def naive(decay, num_heads, device=None) -> Tensor:
        return torch.log(1 - torch.exp2(-5.0 - torch.arange(num_heads, dtype=torch.float32)))

    assert check()
    assert len(used) == 4  # two models of two layers
    assert fails(check, monkeypatch, mixer_module, "head_log_decay", naive)
    rounded = lambda *a: head_log_decay(*a).bfloat16()  # noqa: E731
    assert fails(check, monkeypatch, mixer_module, "head_log_decay", rounded)


@pytest.mark.parametrize("mode", MODES)
def test_bug_03_state_in_the_models_dtype(mode: str) -> None:
    """A sum of ones in bfloat16 sticks at 256."""
    one = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)
    form = {
        "parallel": retention.retention_parallel,
        "recurrent": retention.retention_recurrent,
        "chunkwise": functools.partial(retention.retention_chunkwise, chunk_size=3),
    }[mode]

    def total(narrow: bool) -> float:
        state = None
        for _ in range(400):
            _, state = form(one, one, one, torch.zeros(1), initial_state=state)
            state = state.bfloat16() if narrow else state
        return state.item()

    assert total(narrow=False) == 400
    assert total(narrow=True) == 256
    model = make_model("retention", torch.bfloat16)
    cache = model.new_cache()
    for _ in range(2):
        run(model, random_ids(1, 4), past_key_values=cache, mode=mode)
        assert {layer.mixer["state"].dtype for layer in cache.layers} == {torch.float32}


def test_bug_04_position_scale_overflows(monkeypatch: Patch) -> None:
    """xPos multiplies by powers of the position: inf from n = 4530 on in float16."""
    model = make_model("retention", torch.float16)
    far = torch.arange(1_000_000, 1_000_008)[None]

    def check() -> bool:
        return bool(run(model, random_ids(1, 8), position_ids=far).isfinite().all())

    def scaled(angles: Tensor, *args) -> tuple[Tensor, Tensor]:
        cos, sin = rotation(angles, *args)
        growth = 1.4 ** (angles[:, None, :, :1] / 512).to(cos.dtype)
        return cos * growth, sin * growth

    assert check()
    assert fails(check, monkeypatch, base, "rotation", scaled)


@both_mixers
def test_bug_05_decode_restarts_at_position_one(mixer: str, monkeypatch: Patch) -> None:
    """After a prompt the position restarted, or was the length of the token fed."""
    model, ids = make_model(mixer), random_ids(2, 12)

    def check() -> bool:
        pieces = continued(model, ids, [9, 10, 11], [None] * 4)
        return bool((pieces - run(model, ids)).abs().max() < 1e-10)

    def forgetful(*args, record=None, **kwargs):
        return real(*args, record=None, **kwargs)

    real = decoder.describe_tokens
    assert check()
    assert fails(check, monkeypatch, decoder, "describe_tokens", forgetful)


@both_mixers
def test_bug_06_rotary_table_rebuilt_at_every_step(mixer: str, monkeypatch: Patch) -> None:
    """A table of all positions up to the current one makes a step cost O(n)."""
    model = make_model(mixer)

    def check() -> bool:
        largest = []
        for position in (10, 1_000_000):
            cache = model.new_cache(max_length=4)
            run(
                model,
                random_ids(1, 1),
                past_key_values=cache,
                position_ids=torch.tensor([[position]]),
            )
            with LargestTensor() as recorder:
                run(model, random_ids(1, 1), past_key_values=cache)
            largest.append(recorder.bytes)
        return largest[0] == largest[1]

    def from_a_table(positions: Tensor, *args, **kwargs) -> Tensor:
        table = rotary_angles(torch.arange(positions.max() + 1)[None], *args, **kwargs)
        return table[0, positions]

    assert check()
    assert fails(check, monkeypatch, base, "rotary_angles", from_a_table)


@pytest.mark.parametrize("mode", MODES)
def test_bug_07_hand_over_from_prefill_to_decode(mode: str, monkeypatch: Patch) -> None:
    """The state of one form was scaled otherwise than the others expect it."""
    model, ids = make_model("retention"), random_ids(2, 14)

    def check() -> bool:
        whole = run(model, ids, mode="recurrent")
        pieces = continued(model, ids, [11, 12, 13], [mode, "recurrent", "recurrent", "recurrent"])
        return bool((pieces - whole).abs().max() < 1e-10)

    def scaled(*args, **kwargs) -> tuple[Tensor, Tensor]:
        out, state = real(*args, **kwargs)
        return out, state * 1.05

    name = FORMS[mode]
    real = getattr(mixer_module, name)
    assert check()
    if mode != "recurrent":  # which would be compared with itself
        assert fails(check, monkeypatch, mixer_module, name, scaled)


def test_bug_08_prefill_materialises_a_state_per_token(monkeypatch: Patch) -> None:
    """A tensor [B, H, T, K, V]: 8.6 GB a layer at T = 2048."""
    model = make_model("retention", torch.float32, chunk_size=16)
    config, length = model.config, 1024
    values = config.value_size // config.num_heads

    def check() -> bool:
        with LargestTensor() as recorder:
            run(model, random_ids(1, length), logits_to_keep=1)
        state_per_token = 4 * config.num_heads * length * config.head_dim * values
        return recorder.bytes < min(state_per_token, 4 * length**2) / 4

    def materialising(q, k, v, *others, **options) -> tuple[Tensor, Tensor]:
        _ = k[..., None] * v[..., None, :]
        return real(q, k, v, *others, **options)

    name = FORMS["chunkwise"]
    real = getattr(mixer_module, name)
    assert check()
    assert fails(check, monkeypatch, mixer_module, name, materialising)


@both_mixers
def test_bug_09_tensors_cached_under_inference_mode(mixer: str, monkeypatch: Patch) -> None:
    """A table made under inference_mode and kept makes the next training step raise."""
    ids = random_ids(1, 8)

    def check() -> bool:
        model = make_model(mixer, rotary_layout="half")
        with torch.inference_mode():
            model(ids)
        try:
            model(ids, labels=ids).loss.backward()
        except RuntimeError as error:
            assert "Inference tensors" in str(error)
            return False
        return True

    def kept(angles: Tensor, *args) -> tuple[Tensor, Tensor]:
        if not table:
            table.append(rotation(angles, *args))
        return table[0]

    table: list[tuple[Tensor, Tensor]] = []
    assert check()
    assert fails(check, monkeypatch, base, "rotation", kept)


@both_mixers
def test_bug_13_deepnorm_scaling_with_pre_norm(mixer: str, monkeypatch: Patch) -> None:
    """DeepNorm multiplies the residual by (2N)^(1/4), which belongs to post-norm only."""

    def check() -> bool:
        model = make_model(mixer)
        for layer in model.model.layers:  # blocks that add nothing
            layer.mixer.o_proj.weight.data.zero_()
            layer.ffn.down_proj.weight.data.zero_()
        stream = model(random_ids(1, 6), output_hidden_states=True).hidden_states
        return torch.equal(stream[0], stream[1])

    def scaled(self, hidden: Tensor, *args, **kwargs):
        return real(self, hidden * 4**0.25, *args, **kwargs)

    real = decoder.DecoderLayer.forward
    assert check()
    assert fails(check, monkeypatch, decoder.DecoderLayer, "forward", scaled)


def test_bug_14_options_that_are_replaced(monkeypatch: Patch) -> None:
    """A mode that gives way to another one for short texts."""
    model, used = make_model("retention"), []
    for mode, name in FORMS.items():
        real = getattr(mixer_module, name)
        monkeypatch.setattr(
            mixer_module,
            name,
            lambda *a, real=real, mode=mode, **k: used.append(mode) or real(*a, **k),
        )

    def check() -> bool:
        for mode in MODES:
            for length in (1, 5, 70):
                used.clear()
                run(model, random_ids(1, length), mode=mode)
                if used != [mode, mode]:
                    return False
        return True

    assert check()
    kind = mixer_module.MultiScaleRetention
    real_retain = kind._retain
    replaced = lambda self, q, k, v, decay, mode, *rest, **options: real_retain(  # noqa: E731
        self, q, k, v, decay, "recurrent" if q.shape[2] < 64 else mode, *rest, **options
    )
    assert fails(check, monkeypatch, kind, "_retain", replaced)


def test_bug_15_host_synchronisation_and_norms_over_time(monkeypatch: Patch) -> None:
    """``.item()`` in every layer; a GroupNorm whose statistics run over time sees the future."""
    model, ids = make_model("retention"), random_ids(1, 12)

    def waits_for_nothing() -> bool:
        on_meta = make_model("retention", torch.float32).to("meta")
        try:
            on_meta(ids.to("meta"), attention_mask=ids.to("meta"))
        except RuntimeError as error:
            assert "meta" in str(error)
            return False
        return True

    def causal() -> bool:
        return bool((run(model, ids[:, :7]) - run(model, ids)[:, :7]).abs().max() < 1e-12)

    def asks(*args, valid: Tensor, **options):
        _ = valid.sum().item()
        return real_retain(*args, valid=valid, **options)

    def over_time(x: Tensor, gate: Tensor, kind: str, eps: float) -> Tensor:
        x = x.transpose(1, 2)  # [B, H, T, V]
        return F.silu(gate) * F.layer_norm(x, x.shape[-2:], eps=eps).transpose(1, 2)

    kind = mixer_module.MultiScaleRetention
    real_retain = kind._retain
    assert waits_for_nothing()
    assert causal()
    assert fails(waits_for_nothing, monkeypatch, kind, "_retain", asks)
    assert fails(causal, monkeypatch, mixer_module, "gated_norm", over_time)


@pytest.mark.parametrize("tied", [True, False])
@both_mixers
def test_bug_16_a_padding_id_freezes_a_real_token(mixer: str, tied: bool) -> None:
    """pad = eos = 0 as ``padding_idx``: the embedding of a token that occurs never moves."""
    special = {"pad_token_id": 0, "eos_token_id": 0, "bos_token_id": 0}
    model = make_model(mixer, tie_word_embeddings=tied, **special)
    ids = torch.tensor([[5, 0, 7, 0, 9]])

    def check() -> bool:
        model.zero_grad()
        hidden = model.model(ids).last_hidden_state
        hidden[:, :, 0].sum().backward()  # without the output layer, which may be tied
        return bool(model.model.embed_tokens.weight.grad[0].abs().max() > 0)

    assert check()
    assert model.model.embed_tokens.weight[0].abs().max() > 0
    model.model.embed_tokens.padding_idx = 0
    assert not check()
