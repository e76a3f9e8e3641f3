"""What is held back: whole documents by content, or tails; never nothing, never everything."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retnet.data.split import SplitRule, choose_split, choose_tuning_split, survey_documents
from retnet.errors import UserError


def rule_for(texts: list[str], fraction: float = 0.1) -> SplitRule:
    return choose_split(survey_documents(text.encode() for text in texts), fraction, "here")


def test_nanogpt_boundary_for_tiny_shakespeare() -> None:
    rule = rule_for(["x" * 1_115_394])
    train, validation = rule.divide("x" * 1_115_394)
    assert (len(train), len(validation)) == (1_003_854, 111_540)


@pytest.mark.parametrize(
    ("sizes", "kind"), [([10] * 19, "tail"), ([10] * 20, "documents"), ([10] * 20 + [12], "tail")]
)
def test_documents_when_many_and_small(sizes: list[int], kind: str) -> None:
    texts = [chr(ord("a") + index) * size for index, size in enumerate(sizes)]
    assert rule_for(texts).kind == kind


@settings(deadline=None)
@given(st.lists(st.text(min_size=1), min_size=20, max_size=60), st.floats(0.001, 0.999))
def test_neither_side_is_empty(texts: list[str], fraction: float) -> None:
    if max(len(text) for text in texts) < 2:
        return
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    if max(len(text.encode()) for text in texts) < 2:
        return
    rule = rule_for(texts, fraction)
    parts = [rule.divide(text) for text in texts]
    if rule.kind == "documents" or max(map(len, texts)) > 1:
        assert any(train for train, _ in parts)
        assert any(validation for _, validation in parts)
    assert [train + validation for train, validation in parts] == texts


def test_share_follows_the_fraction_and_order_does_not_matter() -> None:
    texts = [f"document {index}" for index in range(2000)]
    rule = rule_for(texts, 0.25)
    held_back = {text for text in texts if rule.divide(text)[1]}
    assert 400 < len(held_back) < 600
    again = rule_for(texts[::-1], 0.25)
    assert held_back == {text for text in texts if again.divide(text)[1]}


def test_equal_documents_are_divided_by_their_tails() -> None:
    """By hash they would all land on one side."""
    assert rule_for(["the same text"] * 30).kind == "tail"


def test_tail_cuts_between_characters() -> None:
    train, validation = SplitRule("tail", 0.5).divide("ä漢🙂é")
    assert (train, validation) == ("ä漢", "🙂é")


def test_too_short_to_divide() -> None:
    with pytest.raises(UserError, match=r"data\.source \(here\) is too short"):
        rule_for(["x"])


def test_rule_survives_its_record() -> None:
    for rule in (SplitRule("tail", 0.1), SplitRule("documents", 0.1, 2**63 + 12345)):
        assert SplitRule.from_record(rule.to_record()) == rule


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.text("abcdef", min_size=4, max_size=9), min_size=3, max_size=80),
    st.sampled_from(["given", "chosen"]),
    st.floats(0.05, 0.5),
)
def test_tuning_divides_the_training_side_alone(texts: list[str], kind: str, share: float) -> None:
    survey = survey_documents(text.encode() for text in texts)
    rule = SplitRule("given") if kind == "given" else choose_split(survey, 0.2, "here")
    inner = choose_tuning_split(rule, survey, share, "here")
    for text in texts:
        whole, held_back = rule.divide(text)
        train, tuning = inner.divide(text)
        assert train + tuning == whole, held_back
    assert SplitRule.from_record(inner.to_record()) == inner


def test_tuning_holds_back_what_it_should() -> None:
    texts = [f"document number {i}" for i in range(4000)]
    survey = survey_documents(text.encode() for text in texts)
    rule = choose_split(survey, 0.1, "here")
    inner = choose_tuning_split(rule, survey, 0.25, "here")
    train, tuning = (sum(map(bool, side)) for side in zip(*map(inner.divide, texts), strict=True))
    assert tuning / (train + tuning) == pytest.approx(0.25, abs=0.03)
    assert (train + tuning) / 4000 == pytest.approx(0.9, abs=0.03)
