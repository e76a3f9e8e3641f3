"""The models in every combination of mode, split, padding, packing and cache."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from retnet.model.block import Shared
from retnet.model.cache import DecoderCache
from retnet.model.documents import describe_tokens
from tests.model.batches import (
    MODELS,
    TOLERANCE,
    WITH_FORMS,
    batches,
    cut,
    kept_rows,
    logits,
    modes_of,
)
from tests.model.conftest import (
    CONTENDERS,
    EACH,
    ROW_BYTES,
    VOCAB,
    make_model,
    random_ids,
)


@pytest.mark.parametrize("mixer", WITH_FORMS)
@settings(max_examples=25, deadline=None)
@given(batch=batches(), data=st.data())
def test_every_pair_of_modes_at_every_split(
    mixer: str, batch: dict[str, Tensor], data: st.DataObject
) -> None:
    """Logits, states and gradients, to 1e-10."""
    model, modes = MODELS[mixer], modes_of(mixer)
    length = batch["input_ids"].shape[1]
    split = data.draw(st.integers(1, length - 1))
    first, second = data.draw(st.sampled_from(list(itertools.product(modes, modes))))
    keep = kept_rows(batch)

    def loss_and_gradients(logits: Tensor) -> list[Tensor]:
        generator = torch.Generator().manual_seed(3)
        weights = torch.randn(logits.shape, generator=generator, dtype=logits.dtype)
        loss = ((logits * weights)[keep]).sum()
        return list(torch.autograd.grad(loss, list(model.parameters())))

    whole = model(**batch, mode="recurrent", use_cache=True)
    cache = model.new_cache()
    parts = [
        model(**cut(batch, slice(0, split)), past_key_values=cache, mode=first).logits,
        model(**cut(batch, slice(split, None)), past_key_values=cache, mode=second).logits,
    ]
    together = torch.cat(parts, dim=1)
    assert (together - whole.logits)[keep].abs().max() < TOLERANCE if keep.any() else True
    for mine, theirs in zip(cache.layers, whole.past_key_values.layers, strict=True):
        for part in ("mixer", "ffn"):
            assert getattr(mine, part).keys() == getattr(theirs, part).keys()
            for name, x in getattr(theirs, part).items():
                if name not in mine.growing:
                    assert (getattr(mine, part)[name] - x).abs().max() < TOLERANCE
    assert torch.equal(cache.record, whole.past_key_values.record)
    if keep.any():
        for mine, theirs in zip(
            loss_and_gradients(together), loss_and_gradients(whole.logits), strict=True
        ):
            assert (mine - theirs).abs().max() <= TOLERANCE * theirs.abs().max().clamp(min=1)


@pytest.mark.parametrize("mixer", EACH)
@settings(max_examples=25, deadline=None)
@given(batch=batches(), data=st.data())
def test_each_document_gets_what_it_gets_alone(
    mixer: str, batch: dict[str, Tensor], data: st.DataObject
) -> None:
    """Packing, padding and a cache in between change nothing."""
    model = MODELS[mixer]
    length = batch["input_ids"].shape[1]
    splits = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=3)))
    cache, parts = model.new_cache(), []
    for begin, end in itertools.pairwise([0, *splits, length]):
        parts.append(logits(model, **cut_ids(batch, begin, end), past_key_values=cache))
    out = torch.cat(parts, dim=1)
    keep = kept_rows(batch)
    for row in range(out.shape[0]):
        columns = keep[row].nonzero().flatten().tolist()
        ids = batch.get("segment_ids")
        for _, group in itertools.groupby(
            columns, key=lambda c: 0 if ids is None else ids[row, c].item()
        ):
            document = list(group)
            alone = logits(model, batch["input_ids"][row, document][None])[0]
            assert (out[row, document] - alone).abs().max() < TOLERANCE


def cut_ids(batch: dict[str, Tensor], begin: int, end: int) -> dict[str, Tensor]:
    part = cut(batch, slice(begin, end))
    return {"ids": part.pop("input_ids"), **part}


def test_position_ids_that_fall_back_begin_a_document(model) -> None:
    ids = random_ids(1, 9)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    out = logits(model, ids, position_ids=positions)
    assert (out[:, :4] - logits(model, ids[:, :4])).abs().max() < TOLERANCE
    assert (out[:, 4:] - logits(model, ids[:, 4:])).abs().max() < TOLERANCE


def test_a_position_that_falls_back_after_a_cache(model) -> None:
    ids = random_ids(1, 9)
    cache = model.new_cache()
    logits(model, ids[:, :4], past_key_values=cache, position_ids=torch.arange(4)[None])
    out = logits(model, ids[:, 4:], past_key_values=cache, position_ids=torch.arange(5)[None])
    assert (out - logits(model, ids[:, 4:])).abs().max() < TOLERANCE


def test_a_text_shifted_by_ten_million_positions(model) -> None:
    ids = random_ids(2, 12)
    far = torch.arange(12)[None] + 10_000_000
    if model.config.longest is not None:
        with pytest.raises(ValueError, match="not defined beyond those from 0 to 63"):
            model(ids, position_ids=far)
        return
    shifted, plain = logits(model, ids, position_ids=far), logits(model, ids)
    if model.config.mixer_class.relative:
        assert (shifted - plain).abs().max() < 1e-6
    else:
        assert (shifted - plain).abs().max() > 1e-3
        plain = shifted
    cache = model.new_cache()  # through the state: the rest goes on from the cache
    first = logits(model, ids[:, :5], position_ids=far[:, :5], past_key_values=cache)
    rest = logits(model, ids[:, 5:], past_key_values=cache)
    assert (torch.cat((first, rest), dim=1) - plain).abs().max() < 1e-6
    assert cache.record[0].tolist() == [12, 10_000_012, 0]


def test_positions_do_turn(mixer: str) -> None:
    """A gap inside a text changes the result; otherwise the tests above would show nothing."""
    if not CONTENDERS[mixer].rotates:
        return
    model, ids = MODELS[mixer], random_ids(1, 8)
    gap = torch.tensor([[0, 1, 2, 3, 14, 15, 16, 17]])
    assert (logits(model, ids, position_ids=gap) - logits(model, ids)).abs().max() > 1e-3


def test_holes_in_a_row_are_as_if_they_were_not_there(mixer: str) -> None:
    model = MODELS[mixer]
    ids = random_ids(1, 8)
    holes = torch.tensor([[1, 1, 0, 1, 0, 0, 1, 1]])
    out = logits(model, ids, attention_mask=holes)
    alone = logits(model, ids[holes.bool()][None])
    assert (out[holes.bool()] - alone[0]).abs().max() < TOLERANCE


def test_a_mask_of_the_whole_past_is_accepted_and_others_are_not(model) -> None:
    ids = random_ids(2, 8)
    cache = model.new_cache()
    mask = torch.ones(2, 8, dtype=torch.int64)
    mask[1, :3] = 0
    first = logits(model, ids[:, :5], attention_mask=mask[:, :5], past_key_values=cache)
    rest = logits(model, ids[:, 5:], attention_mask=mask, past_key_values=cache)
    whole = logits(model, ids, attention_mask=mask)
    assert (torch.cat((first, rest), dim=1) - whole)[mask.bool()].abs().max() < TOLERANCE
    for wrong in (mask[:, :4], mask[:1], torch.ones(2, 9), torch.ones(2, 1, 8, 8)):
        with pytest.raises(ValueError, match="attention_mask"):
            model(ids, attention_mask=wrong)
    with pytest.raises(ValueError, match="segment_ids"):
        model(ids, segment_ids=mask[:, :3])


def test_rows_of_nothing_but_padding_are_finite(model) -> None:
    ids = random_ids(2, 4)
    mask = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]])
    cache = model.new_cache()
    out = logits(model, ids, attention_mask=mask, past_key_values=cache)
    assert torch.isfinite(out).all()
    more = logits(model, ids, past_key_values=cache)
    assert (more[0] - logits(model, ids[:1])[0]).abs().max() < TOLERANCE


def test_one_token_and_empty_batches(model) -> None:
    assert logits(model, random_ids(1, 1)).shape == (1, 1, VOCAB)
    mask = torch.ones(1, 1, dtype=torch.int64)
    one = random_ids(1, 1)
    assert torch.equal(logits(model, one, attention_mask=mask), logits(model, one))
    for shape in ((0, 3), (2, 0)):
        with pytest.raises(ValueError, match="batch is empty"):
            model(torch.zeros(shape, dtype=torch.int64))


def test_embeddings_in_place_of_ids(model) -> None:
    ids = random_ids(2, 6)
    embeddings = model.get_input_embeddings()(ids)
    assert torch.equal(logits(model, None, inputs_embeds=embeddings), logits(model, ids))
    with pytest.raises(ValueError, match="exactly one"):
        model(ids, inputs_embeds=embeddings)
    with pytest.raises(ValueError, match="exactly one"):
        model()


def test_logits_to_keep(model) -> None:
    ids = random_ids(2, 6)
    whole = logits(model, ids)
    assert torch.allclose(logits(model, ids, logits_to_keep=2), whole[:, -2:])
    chosen = torch.tensor([0, 3])
    assert torch.allclose(logits(model, ids, logits_to_keep=chosen), whole[:, chosen])
    with pytest.raises(ValueError, match="logits_to_keep"):
        model(ids, labels=ids, logits_to_keep=1)


def test_use_cache_and_output_forms(model) -> None:
    ids = random_ids(1, 4)
    assert isinstance(model(ids).past_key_values, DecoderCache)
    assert model(ids, use_cache=False).past_key_values is None
    assert model.train()(ids).past_key_values is None
    assert isinstance(model(ids, use_cache=True).past_key_values, DecoderCache)
    model.eval().config.use_cache = False
    assert model(ids).past_key_values is None
    as_tuple = model(ids, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], model(ids).logits)
    hidden = model(ids, output_hidden_states=True).hidden_states
    assert len(hidden) == model.config.num_hidden_layers + 1
    assert torch.equal(model.lm_head(hidden[-1]), model(ids).logits)


def test_a_cache_of_the_other_model_is_refused() -> None:
    ids = random_ids(1, 4)
    for one, other in itertools.permutations((MODELS["retention"], MODELS["attention"])):
        with pytest.raises(TypeError, match="past_key_values"):
            one(ids, past_key_values=other.new_cache())


def test_modes() -> None:
    ids = random_ids(1, 4)
    with pytest.raises(ValueError, match=r"mode \('parallel'\) has no meaning for attention"):
        MODELS["attention"](ids, mode="parallel")
    with pytest.raises(ValueError, match=r"mode \('fast'\)"):
        MODELS["retention"](ids, mode="fast")


def test_layers_share_what_depends_on_no_weight(model) -> None:
    """Rotations, decays and masks are made once in a pass, for parts of one class."""
    asked: list[nn.Module] = []

    class Watched(type(model.model.layers[0].mixer)):  # type: ignore[misc]
        def shared(self, *args):
            asked.append(self)
            return super().shared(*args)

    first, second = (layer.mixer for layer in model.model.layers)
    alike = type(first) is type(second)
    first.__class__ = Watched
    second.__class__ = Watched if alike else type(second)
    shared = Shared(model.model.layers, describe_tokens(torch.zeros(1, 3, 32)), {})
    assert (shared.of(first) is shared.of(second)) == alike
    assert asked == [first]
    logits(model, random_ids(1, 4))
    assert asked == [first, first]


def test_causal(model) -> None:
    ids = random_ids(1, 12)
    changed = ids.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % VOCAB
    assert torch.allclose(logits(model, ids)[:, :7], logits(model, changed)[:, :7], atol=1e-14)


def test_the_size_of_the_state_does_not_grow() -> None:
    model = make_model("retention", torch.float32)
    sizes = []
    for length in (10, 5000):
        cache = model(random_ids(1, length), use_cache=True).past_key_values
        sizes.append(cache.num_bytes())
    assert sizes[0] == sizes[1] == 2 * (2 * 16 * 32 * 4) + ROW_BYTES


def test_a_copied_cache_forks_the_text(model) -> None:
    ids = random_ids(1, 10)
    cache = model.new_cache()
    logits(model, ids[:, :6], past_key_values=cache)
    fork = copy.deepcopy(cache)
    one = logits(model, ids[:, 6:], past_key_values=cache)
    two = logits(model, ids[:, 6:], past_key_values=fork)
    assert torch.equal(one, two)
    assert (one - logits(model, ids)[:, 6:]).abs().max() < TOLERANCE


@pytest.mark.parametrize("tied", [True, False])
def test_gradient_checkpointing_changes_nothing(mixer: str, tied: bool) -> None:
    model = make_model(mixer, tie_word_embeddings=tied).train()
    ids = random_ids(2, 9)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients()
    model.activation_checkpointing_enable({"use_reentrant": False})
    for a, b in zip(gradients(), plain, strict=True):
        assert torch.allclose(a, b, atol=1e-14)
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model(ids, past_key_values=model.new_cache())


def test_dropout_acts_in_training_only(mixer: str) -> None:
    model = make_model(mixer, dropout=0.5)
    ids = random_ids(1, 6)
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    "change",
    [
        {"norm": "rmsnorm"},
        {"ffn": "swiglu"},
        {"ffn": "geglu"},
        {"ffn": "reglu"},
        {"scale_embedding": True},
        {"rotary_layout": "half"},
        {"rotary_frequencies": "standard"},
        {"rotary_base": 100.0},
        {"norm_eps": 0.5},
        {"intermediate_size": 48},
        {"num_heads": 4},
    ],
)
def test_each_variant_changes_the_output(mixer: str, change: dict) -> None:
    model = make_model(mixer)
    (key, value), kind = next(iter(change.items())), model.config.mixer_class
    if key in kind.unused or (key.startswith("rotary_") and not kind.rotates):
        pytest.skip("no key of this mixer")
    if getattr(model.config, key) == value:
        change = {key: {"half": "interleaved", "standard": "linspace"}[value]}
    ids = random_ids(1, 12)
    assert not torch.allclose(
        logits(model, ids), logits(make_model(mixer, **change), ids), atol=1e-6
    )


@pytest.mark.parametrize(
    "change",
    [
        {"head_norm": "rmsnorm"},
        {"head_norm": "none"},
        {"head_norm_eps": 1.0},
        {"decay": "log_linear"},
        {"decay": 1.0},
        {"gate": False},
        {"value_size": 32},
        {"num_kv_heads": 1},
    ],
)
def test_each_switch_of_retention_changes_the_output(change: dict) -> None:
    ids = random_ids(1, 12)
    plain = logits(make_model("retention"), ids)
    assert not torch.allclose(plain, logits(make_model("retention", **change), ids), atol=1e-6)


def test_chunk_size_changes_nothing_but_speed() -> None:
    ids = random_ids(1, 40)
    outs = [logits(make_model("retention", chunk_size=c), ids) for c in (1, 7, 100)]
    assert max((out - outs[0]).abs().max() for out in outs) < TOLERANCE


def test_the_scale_of_the_embedding_is_the_root_of_the_width(mixer: str) -> None:
    """Of ids and of their embeddings alike."""
    model, plain = make_model(mixer, scale_embedding=True), make_model(mixer, scale_embedding=False)
    plain.load_state_dict(model.state_dict())
    ids = random_ids(1, 9)
    embedded = model.get_input_embeddings()(ids)
    with torch.no_grad():
        expected = plain(inputs_embeds=embedded * 32**0.5).logits
        for given in ({"input_ids": ids}, {"inputs_embeds": embedded}):
            assert (model(**given).logits - expected).abs().max() < 1e-12
