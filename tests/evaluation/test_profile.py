"""Losses by position, context and kind of target are those of the definition."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retnet.data import encode_documents
from retnet.evaluation.profile import by_context, profile, recalled
from retnet.evaluation.scoring import Window, score_documents, window_losses
from tests.generation.builders import byte_tokenizer, tiny_model

TOKENIZER = byte_tokenizer()
MODEL = tiny_model("retention")
DOCUMENTS = ["the state of the state " * 6, "", "abcdefgh" * 9, "x y"]
TOKENS = [torch.from_numpy(ids) for ids in encode_documents(TOKENIZER, DOCUMENTS)]


@torch.no_grad()
def loss(document: int, start: int, target: int) -> float:
    """Of one target, predicted from the inputs from ``start`` up to it and nothing else."""
    ids = TOKENS[document]
    logits = MODEL(ids[None, start:target], use_cache=False).logits[0, -1]
    return -logits.double().log_softmax(-1)[ids[target]].item()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 30), st.integers(1, 30)), min_size=1))
def test_a_windows_losses_in_the_order_of_the_windows(parts) -> None:
    every = [
        Window(0, start, start + size, start + min(first, size)) for start, size, first in parts
    ]
    for window, found in zip(every, window_losses(MODEL, TOKENS, every, 99), strict=True):
        targets = range(window.first_target, window.end + 1)
        expected = [loss(0, window.start, target) for target in targets]
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_every_target_has_a_position_and_two_kinds() -> None:
    context = 20
    found = profile(MODEL, TOKENIZER, DOCUMENTS, context=context, contexts=())
    scores = score_documents(MODEL, TOKENIZER, DOCUMENTS, context=context)
    again = [one for name, one in found.by_kind.items() if "pair" in name]
    ranks = [one for name, one in found.by_kind.items() if "rank" in name]
    for groups in (list(found.by_position.values()), again, ranks):
        assert sum(one.targets for one in groups) == scores.targets.sum()
        total = sum(one.nats * one.targets for one in groups if one.targets)
        assert total == pytest.approx(scores.nll.sum())
    assert list(found.by_position) == [1, 2, 4, 8, 16, 20] and not found.by_context


@pytest.mark.parametrize("stride", [20, 7])
def test_what_was_scored_already_is_taken(stride: int, monkeypatch) -> None:
    """Also from windows that overlap, whose late positions count then."""
    scores = score_documents(MODEL, TOKENIZER, DOCUMENTS, context=20, stride=stride)
    assert sum(map(len, scores.losses)) == scores.targets.sum()
    alone = profile(MODEL, TOKENIZER, DOCUMENTS, context=20, contexts=())
    monkeypatch.setattr("retnet.evaluation.profile.window_losses", None)
    found = profile(MODEL, TOKENIZER, DOCUMENTS, context=20, contexts=(), scores=scores)
    assert (found == alone) == (stride == 20)
    assert sum(one.targets for one in found.by_position.values()) == scores.targets.sum()


def test_positions_count_the_inputs_of_the_window() -> None:
    context = 20
    found = profile(MODEL, TOKENIZER, DOCUMENTS, context=context, contexts=()).by_position
    firsts, group = [], []
    for document, ids in enumerate(TOKENS):
        for start in range(0, len(ids) - 1, context):
            firsts.append(loss(document, start, start + 1))
            targets = range(start + 5, min(start + 8, len(ids) - 1) + 1)
            group += [loss(document, start, target) for target in targets]
    assert found[1].nats == pytest.approx(np.mean(firsts)) and found[1].targets == len(firsts)
    assert found[8].nats == pytest.approx(np.mean(group)) and found[8].targets == len(group)


@given(st.lists(st.integers(0, 3), max_size=30))
def test_recalled_is_a_pair_that_was_there(ids: list[int]) -> None:
    expected = []
    for i in range(1, len(ids)):
        pair = ids[i - 1 : i + 1]
        expected.append(next((i - j for j in range(i - 1, 0, -1) if ids[j - 1 : j + 1] == pair), 0))
    assert recalled(ids) == expected


def test_recall_by_distance() -> None:
    """Each target of a pair that was there before has one, and it is that pair's."""
    found = profile(MODEL, TOKENIZER, ["abab" + "cdefgh" + "ab"], context=20, contexts=())
    again = found.by_kind["the same pair of tokens was there before"]
    targets = {end: one.targets for end, one in found.by_distance.items() if one.targets}
    assert targets == {2: 1, 8: 1} and again.targets == 2
    total = sum(one.nats * one.targets for one in found.by_distance.values() if one.targets)
    assert total == pytest.approx(again.nats * again.targets)


def test_kinds_of_targets() -> None:
    """By hand: in one window of <bos> a b a b <eos>, the second a b is the only pair again."""
    found = profile(MODEL, TOKENIZER, ["abab"], context=9, contexts=()).by_kind
    (ids,) = encode_documents(TOKENIZER, ["abab"])
    with torch.no_grad():
        logits = MODEL(torch.tensor(ids)[None, :-1], use_cache=False).logits[0].double()
    nats = -logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]]
    assert found["the same pair of tokens was there before"].nats == pytest.approx(float(nats[3]))
    new = found["the pair of tokens is new"]
    assert new.nats == pytest.approx(float(nats[[0, 1, 2, 4]].mean())) and new.targets == 4
    cut = profile(MODEL, TOKENIZER, ["abab"], context=3, contexts=()).by_kind
    assert cut["the same pair of tokens was there before"].targets == 0, "of another window"
    many = profile(MODEL, TOKENIZER, ["".join(map(chr, range(32, 90)))], context=99, contexts=())
    ranks = {name: one.targets for name, one in many.by_kind.items() if "rank" in name}
    assert ranks == {"target of rank 1 to 10": 10, "target of rank 11 to 100": 49}


def test_the_same_targets_from_more_and_more_tokens() -> None:
    found = by_context(MODEL, TOKENS, [32, 8, 16, 1000], last=4)
    ends = [(d, end) for d, ids in enumerate(TOKENS) for end in range(32, len(ids), 32)]
    assert list(found) == [8, 16, 32] and len(ends) > 3
    for context, mean in found.items():
        expected = [
            loss(document, end - context, target)
            for document, end in ends
            for target in range(end - 3, end + 1)
        ]
        assert mean.targets == len(expected)
        assert mean.nats == pytest.approx(np.mean(expected))
    assert by_context(MODEL, TOKENS, [8, 32])[8].targets == 4 * len(ends), "half of the shortest"
    assert by_context(MODEL, TOKENS, [8, 32], last=1, at_most=2)[8].targets == 2
    assert by_context(MODEL, TOKENS, [1000]) == by_context(MODEL, [], [4]) == {}


def test_beyond_what_a_model_is_defined_for() -> None:
    aft = tiny_model("aft")
    found = by_context(aft, TOKENS, [8, 16, 32])
    assert found[32] is None and found[8].nats > 0 and found[16].nats > 0
