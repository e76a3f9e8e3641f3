"""No keyword of forward is swallowed: honoured, harmless, or refused by its name."""

import pytest
import torch
from transformers import DataCollatorWithFlattening

from retnet.model.keywords import CUMULATIVE, HARMLESS
from retnet.model.outputs import MEMORY, NAMES
from tests.model.conftest import random_ids

LENGTHS = (4, 1, 6)


@pytest.fixture(params=["causal", "skeleton"])
def forward(request: pytest.FixtureRequest, model):
    """A model's forward, as a function from ids to what it computes."""
    called = model if request.param == "causal" else model.model
    return lambda *args, **kwargs: called(*args, **kwargs)[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attn_mask", torch.zeros(1, 4)),
        ("head_mask", torch.ones(2)),
        ("cache_position", torch.arange(4)),
        ("output_router_logits", False),
        ("past_key_value", ()),
        ("is_causal", False),
    ],
)
def test_unknown_ones_are_refused_by_name(forward, name: str, value) -> None:
    with pytest.raises(TypeError, match=repr(name)):
        forward(random_ids(1, 4), **{name: value})
    assert forward(random_ids(1, 4), **{name: None}) is not None


def test_harmless_ones_change_nothing(forward) -> None:
    ids = random_ids(1, 4)
    extra = {name: torch.zeros_like(ids) for name in HARMLESS} | {"output_attentions": False}
    assert torch.equal(forward(ids, **extra), forward(ids))


def test_attentions_are_refused_not_left_out(forward) -> None:
    with pytest.raises(ValueError, match="output_attentions"):
        forward(random_ids(1, 4), output_attentions=True)


def test_the_memory_has_two_names(model) -> None:
    ids = random_ids(2, 6)
    expected = model(ids, use_cache=False).logits[:, 3:]
    for name in NAMES:
        for part in (model, model.model):
            first = part(ids[:, :3], use_cache=True)
            assert first.cache is first.past_key_values is first[MEMORY]
        first = model(ids[:, :3], use_cache=True)
        assert torch.allclose(model(ids[:, 3:], **{name: first.cache}).logits, expected)
    both = {"cache": model.new_cache(), "past_key_values": model.new_cache()}
    for part in (model, model.model):
        with pytest.raises(TypeError, match="two names of one memory"):
            part(ids, **both)
    with pytest.raises(TypeError, match="two names of one memory"):
        model.generate(ids, **both)


def test_generate_takes_both_names(model) -> None:
    ids = random_ids(1, 6)
    how = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    whole = model.generate(ids, **how)
    for name in NAMES:
        cache = model.new_cache()
        with torch.no_grad():
            model(ids[:, :4], cache=cache)
        assert torch.equal(model.generate(ids, **how, **{name: cache}), whole)
        assert cache.length == 9, "it was not read"


@pytest.fixture
def packed() -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A packed row, and its documents."""
    documents = [random_ids(1, n, seed=n) for n in LENGTHS]
    return torch.cat(documents, dim=1), documents


def boundaries(name: str) -> torch.Tensor:
    if name == "seq_idx":
        return torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))[None]
    return torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)


@pytest.mark.parametrize("name", ["seq_idx", *CUMULATIVE])
def test_packed_rows_are_their_documents_alone(forward, packed, name: str) -> None:
    row, documents = packed
    alone = torch.cat([forward(document) for document in documents], dim=1)
    assert torch.allclose(forward(row, **{name: boundaries(name)}), alone, atol=1e-12)
    segments = (torch.arange(row.shape[1]) == 2).cumsum(0)[None]  # one more boundary
    parts = [row[:, :2], row[:, 2:4], *documents[1:]]
    alone = torch.cat([forward(part) for part in parts], dim=1)
    both = forward(row, segment_ids=segments, **{name: boundaries(name)})
    assert torch.allclose(both, alone, atol=1e-12)


@pytest.mark.parametrize("name", ["seq_idx", *CUMULATIVE])
def test_the_loss_has_no_target_across_them(model, packed, name: str) -> None:
    row, documents = packed
    counted = sum(n - 1 for n in LENGTHS)
    alone = sum(model(x, labels=x).loss * (x.shape[1] - 1) for x in documents) / counted
    found = model(row, labels=row, **{name: boundaries(name)}).loss
    assert torch.allclose(found, alone, atol=1e-12)


def test_the_collator_that_packs(model, packed) -> None:
    _, documents = packed
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    batch = collator([{"input_ids": x[0].tolist()} for x in documents])
    for left_out in ({"position_ids"}, {"position_ids", "seq_idx"}, {"cu_seq_lens_q", "seq_idx"}):
        given = {name: x for name, x in batch.items() if name not in left_out}
        alone = torch.cat([model(x).logits for x in documents], dim=1)
        assert torch.allclose(model(**given).logits, alone, atol=1e-12)


def test_boundaries_of_another_shape(forward, packed) -> None:
    row, _ = packed
    with pytest.raises(ValueError, match=r"seq_idx \[1, 3\] must be \[1, 11\]"):
        forward(row, seq_idx=torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"cu_seqlens \[4\] must be .* one packed row"):
        forward(row.expand(2, -1), cu_seqlens=boundaries("cu_seqlens"))
    with pytest.raises(ValueError, match=r"cu_seq_lens_q \[1\] must be"):
        forward(row, cu_seq_lens_q=torch.tensor([0]))


def test_a_document_goes_on_in_the_next_call(model) -> None:
    """Its number in seq_idx is the same, whatever else was in the row before."""
    ids, numbers = random_ids(1, 8), torch.tensor([[4, 4, 5, 5, 5, 5, 6, 6]])
    whole = model(ids, seq_idx=numbers).logits
    cache = model.new_cache()
    parts = [
        model(ids[:, c], cache=cache, seq_idx=numbers[:, c]).logits for c in (slice(4), slice(4, 8))
    ]
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-12)


def test_columns_are_not_counted_from_an_earlier_call(model, packed) -> None:
    row, _ = packed
    cache = model.new_cache()
    model(row, cache=cache)
    with pytest.raises(ValueError, match=r"cu_seqlens counts this call's columns.*holds 11"):
        model(row, cache=cache, cu_seqlens=boundaries("cu_seqlens"))


def test_what_the_configuration_says_of_the_output(model) -> None:
    ids = random_ids(1, 4)
    model.config.output_hidden_states = True
    for part in (model, model.model):
        assert len(part(ids).hidden_states) == 3
        assert part(ids, output_hidden_states=False).hidden_states is None
        assert isinstance(part(ids, return_dict=False), tuple)
    model.config.return_dict = False
    for part in (model, model.model):
        assert isinstance(part(ids), tuple)
        assert not isinstance(part(ids, return_dict=True), tuple)
