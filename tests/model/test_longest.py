"""Where something is indexed by absolute position, a document ends at max_position_embeddings."""

import copy
import logging

import pytest
import torch
from transformers import GenerationConfig

from retnet.generation import decode_one, make_step, prefill
from tests.model.batches import TOLERANCE, logits
from tests.model.conftest import make_model, random_ids

LONGEST = 12
MODELS = {
    "aft": make_model("aft", max_position_embeddings=LONGEST),
    "aft without positions": make_model("aft", positions="none", max_position_embeddings=LONGEST),
    "retention": make_model("retention", positions="learned", max_position_embeddings=LONGEST),
    "attention": make_model("attention", positions="learned", max_position_embeddings=LONGEST),
}
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 60}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest):
    return MODELS[request.param]


def test_a_document_beyond_it_is_refused(model) -> None:
    ids = random_ids(2, LONGEST + 1)
    with pytest.raises(ValueError, match="not defined beyond those from 0 to 11"):
        model(ids)
    cache = model.new_cache()
    logits(model, ids[:, :-1], past_key_values=cache)
    with pytest.raises(ValueError, match="has positions 12 to 12"):
        model(ids[:, -1:], past_key_values=cache)
    step = make_step(model)
    with pytest.raises(ValueError, match="has positions 12 to 12"):
        step(ids[:, -1], cache)


def test_what_counts_is_the_tokens_of_a_document(model) -> None:
    """Not columns: neither padding nor earlier documents take positions."""
    ids, alone = random_ids(1, 2 * LONGEST), random_ids(1, LONGEST, seed=1)
    segments = torch.arange(2).repeat_interleave(LONGEST)[None]
    ids[:, LONGEST:] = alone
    expected = logits(model, alone)
    packed = logits(model, ids, segment_ids=segments)[:, LONGEST:]
    assert (packed - expected).abs().max() < TOLERANCE
    padded = logits(model, ids, attention_mask=segments)[:, LONGEST:]
    assert (padded - expected).abs().max() < TOLERANCE


def test_position_ids_are_the_index(model) -> None:
    ids, given = random_ids(1, 4), torch.tensor([[3, 5, 8, 11]])
    moved = logits(model, ids, position_ids=given)
    assert (moved - logits(model, ids)).abs().max() > 1e-6
    for wrong in (given + 1, given - 4):
        with pytest.raises(ValueError, match="max_position_embeddings"):
            model(ids, position_ids=wrong)
    cache = model.new_cache()
    logits(model, ids[:, :2], position_ids=given[:, :2] + 5, past_key_values=cache)
    with pytest.raises(ValueError, match="has positions 11 to 12"):  # the ones before go on
        model(ids[:, 2:], past_key_values=copy.deepcopy(cache))
    decode_one(model, ids[:, 2], cache)
    with pytest.raises(ValueError, match="has positions 12 to 12"):
        make_step(model)(ids[:, 3], cache)


def test_generate_up_to_the_last_position(model, caplog: pytest.LogCaptureFixture) -> None:
    ids = random_ids(2, 5)
    whole = model.generate(ids, **GREEDY, max_new_tokens=7)
    assert whole.equal(model.generate(ids, **GREEDY, max_new_tokens=7, use_cache=False))
    assert not [one for one in caplog.records if one.levelno >= logging.WARNING]
    for asked in ({"max_new_tokens": 8}, {"max_length": 13}):
        with pytest.raises(ValueError, match=r"8 new tokens lead beyond .*: ask for at most 7"):
            model.generate(ids, **GREEDY, **asked)
    for length in (LONGEST, LONGEST + 1):
        with pytest.raises(ValueError, match=f"the prompt ends at position {length}"):
            model.generate(random_ids(1, length), **GREEDY, max_new_tokens=1)


def test_a_length_that_nobody_typed_ends_there(model, caplog: pytest.LogCaptureFixture) -> None:
    ids = random_ids(2, 5)
    whole = model.generate(ids, **GREEDY, max_new_tokens=7)
    config = GenerationConfig(**GREEDY | {"eos_token_id": -1}, max_new_tokens=50)
    with caplog.at_level(logging.WARNING):
        made = model.generate(ids, generation_config=config)
    assert made.equal(whole)
    assert len([r for r in caplog.records if "the text ends at" in r.getMessage()]) == 1
    embedded = model.get_input_embeddings()(ids)
    assert model.generate(inputs_embeds=embedded, generation_config=config).equal(whole[:, 5:])


def test_generate_with_padding_documents_and_a_memory(model) -> None:
    """What has no position of its own takes no room."""
    ids, mask = random_ids(2, 14), torch.ones(2, 14, dtype=torch.int64)
    mask[:, :9] = 0
    alone = model.generate(ids[:, 9:], **GREEDY, max_new_tokens=7)[:, 5:]
    for told in ({"attention_mask": mask}, {"segment_ids": mask}):
        assert model.generate(ids, **told, **GREEDY, max_new_tokens=7)[:, 14:].equal(alone)
        with pytest.raises(ValueError, match="ask for at most 7"):
            model.generate(ids, **told, **GREEDY, max_new_tokens=8)
    cache = model.new_cache()
    prefill(model, ids[:, 9:12], cache)
    how = GREEDY | {"past_key_values": cache}
    with pytest.raises(ValueError, match="ask for at most 7"):
        model.generate(ids[:, 9:], **how, max_new_tokens=8)
    assert model.generate(ids[:, 9:], **how, max_new_tokens=7)[:, 5:].equal(alone)


def test_a_model_of_rotated_or_no_positions_has_no_end() -> None:
    for mixer, keys in (("retention", {}), ("attention", {"positions": "none"})):
        model = make_model(mixer, max_position_embeddings=LONGEST, **keys)
        assert model.config.longest is None
        assert model.generate(random_ids(1, 9), **GREEDY, max_new_tokens=9).shape == (1, 18)
