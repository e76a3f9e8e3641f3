"""Windows: every target once, nothing across documents, the same rows however they are divided."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retnet.data import CarriedBatches, TokenFile, TrainingBatches, ValidationBatches
from retnet.errors import UserError
from tests.data.corpora import EOS, tokens_of

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=12)
SEQ_LEN = st.integers(1, 17)


def targets_inside_documents(tokens: TokenFile) -> list[int]:
    """Index of every token that is the target of the token before it."""
    starts = set(tokens.document_starts.tolist())
    return [index for index in range(1, tokens.num_tokens) if index not in starts]


def counted(batch: dict[str, torch.Tensor]) -> list[int]:
    return batch["shift_labels"][batch["shift_labels"] != -100].tolist()


@settings(deadline=None)
@given(LENGTHS, SEQ_LEN, st.integers(1, 5), st.integers(1, 3))
def test_validation_counts_every_target_once(
    lengths: list[int], seq_len: int, batch_size: int, world_size: int
) -> None:
    tokens = tokens_of(lengths)
    per_rank = [
        ValidationBatches(
            tokens, seq_len=seq_len, batch_size=batch_size, rank=rank, world_size=world_size
        )
        for rank in range(world_size)
    ]
    batches = [list(rank) for rank in per_rank]
    assert {len(found) for found in batches} == {len(per_rank[0])}
    seen = [label for found in batches for batch in found for label in counted(batch)]
    expected = tokens.tokens[targets_inside_documents(tokens)].tolist()
    assert sorted(seen) == sorted(expected)
    assert per_rank[0].num_targets == len(expected)
    assert per_rank[0].num_bytes == sum(lengths)
    if world_size == 1:
        assert seen == expected


@settings(deadline=None)
@given(LENGTHS, SEQ_LEN, st.integers(1, 100))
def test_validation_stops_at_max_tokens(lengths: list[int], seq_len: int, limit: int) -> None:
    tokens = tokens_of(lengths)
    batches = ValidationBatches(tokens, seq_len=seq_len, batch_size=3, max_tokens=limit)
    expected = [index for index in targets_inside_documents(tokens) if index < limit]
    seen = [label for batch in batches for label in counted(batch)]
    assert seen == tokens.tokens[expected].tolist()
    assert batches.num_targets == len(expected)
    assert batches.num_bytes <= sum(lengths)


@settings(deadline=None)
@given(LENGTHS, SEQ_LEN, st.integers(0, 3), st.integers(0, 5))
def test_training_labels_and_segments(
    lengths: list[int], seq_len: int, seed: int, step: int
) -> None:
    """A label is the next token of the same document; ids change exactly where documents do."""
    tokens = tokens_of(lengths)
    if tokens.num_tokens <= seq_len:
        return
    # A text token is 1000 + its index, so that a row's place in the file can be read from it.
    batches = TrainingBatches(tokens, seq_len=seq_len, batch_size=4, seed=seed)
    batch = batches.batch(step)
    plain = TrainingBatches(
        tokens, seq_len=seq_len, batch_size=4, seed=seed, reset_at_documents=False
    ).batch(step)
    assert "segment_ids" not in plain
    assert torch.equal(plain["input_ids"], batch["input_ids"])
    assert torch.equal(plain["shift_labels"], batch["shift_labels"])
    assert batch["input_ids"].shape == batch["shift_labels"].shape == (4, seq_len)
    assert batch["input_ids"].dtype == batch["shift_labels"].dtype == torch.int64
    ends_inside = batch["input_ids"] == EOS
    assert torch.equal(batch["shift_labels"] == -100, ends_inside)
    follows = batch["input_ids"][:, 1:].masked_fill(ends_inside[:, :-1], -100)
    assert torch.equal(batch["shift_labels"][:, :-1], follows)
    boundary = ends_inside[:, :-1]
    if "segment_ids" in batch:
        assert torch.equal(batch["segment_ids"].diff(dim=1) != 0, boundary)
        assert boundary.any()
    else:
        assert not boundary.any()


@settings(deadline=None)
@given(st.integers(20, 300), SEQ_LEN, st.integers(0, 3))
def test_an_epoch_holds_each_window_once(length: int, seq_len: int, seed: int) -> None:
    tokens = tokens_of([length])
    batches = TrainingBatches(tokens, seq_len=seq_len, batch_size=1, seed=seed)
    windows = batches.windows_per_epoch
    assert windows >= (tokens.num_tokens - 1) // seq_len - 1
    for epoch in range(3):
        rows = [batches.batch(epoch * windows + index)["shift_labels"] for index in range(windows)]
        seen = [label for row in rows for label in row.flatten().tolist()]
        assert len(set(seen)) == len(seen) == windows * seq_len
    assert batches.epoch(windows) == 1.0


def test_epochs_differ_in_order_and_offset() -> None:
    batches = TrainingBatches(tokens_of([5000]), seq_len=50, batch_size=1, seed=0)
    windows = batches.windows_per_epoch
    firsts = [
        [int(batches.batch(epoch * windows + index)["input_ids"][0, 0]) for index in range(windows)]
        for epoch in range(2)
    ]
    assert firsts[0] != firsts[1]
    assert {first % 50 for first in firsts[0]} != {first % 50 for first in firsts[1]}
    assert firsts[0] != sorted(firsts[0])


def test_seeds_differ_and_repeat() -> None:
    tokens = tokens_of([400])

    def rows(seed: int) -> torch.Tensor:
        return TrainingBatches(tokens, seq_len=8, batch_size=4, seed=seed).batch(3)["input_ids"]

    assert torch.equal(rows(1), rows(1))
    assert not torch.equal(rows(1), rows(2))


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 8), (2, 4), (4, 1), (8, 1), (2, 2)])
def test_global_batch_is_the_same_however_divided(world_size: int, accumulation: int) -> None:
    """A resumed run on other hardware would otherwise be another run."""
    tokens = tokens_of([30] * 20)
    whole = TrainingBatches(tokens, seq_len=8, batch_size=8, seed=5)
    share = 8 // (world_size * accumulation)
    for step in (0, 1, 13):
        parts = [
            TrainingBatches(
                tokens,
                seq_len=8,
                batch_size=share,
                seed=5,
                rank=rank,
                world_size=world_size,
                accumulation=accumulation,
            ).batch(step, micro_step)["input_ids"]
            for micro_step in range(accumulation)
            for rank in range(world_size)
        ]
        assert torch.equal(torch.cat(parts), whole.batch(step)["input_ids"])


def test_order_does_not_depend_on_what_was_asked_before() -> None:
    tokens = tokens_of([60])
    used = TrainingBatches(tokens, seq_len=8, batch_size=16, seed=0)
    for step in (7, 0, 3):
        used.batch(step)
    fresh = TrainingBatches(tokens, seq_len=8, batch_size=16, seed=0)
    assert torch.equal(used.batch(5)["input_ids"], fresh.batch(5)["input_ids"])


def test_shorter_than_one_window_is_a_user_error() -> None:
    tokens = tokens_of([6])  # 8 tokens
    TrainingBatches(tokens, seq_len=7, batch_size=1, seed=0)
    with pytest.raises(UserError, match=r"data\.seq_len \(8\).*8 tokens.*at most 7"):
        TrainingBatches(tokens, seq_len=8, batch_size=1, seed=0)


def test_validation_window_is_padded_without_a_segment() -> None:
    """Padding must not look like one more document."""
    (batch,) = ValidationBatches(tokens_of([2]), seq_len=8, batch_size=2)
    assert batch["input_ids"].tolist() == [[256, 1001, 1002, 257, 258, 258, 258, 258]]
    assert batch["shift_labels"].tolist() == [[1001, 1002, 257] + [-100] * 5]
    assert "segment_ids" not in batch


def test_validation_segments_follow_the_switch() -> None:
    tokens = tokens_of([2, 3])
    (reset,) = ValidationBatches(tokens, seq_len=16, batch_size=1)
    (plain,) = ValidationBatches(tokens, seq_len=16, batch_size=1, reset_at_documents=False)
    assert reset["segment_ids"][0, :9].tolist() == [0] * 4 + [1] * 5
    assert "segment_ids" not in plain


def test_rows_hold_the_right_tokens_of_a_mapped_file() -> None:
    """uint16 tokens above 32767 must not turn negative on their way into int64."""
    tokens = tokens_of([20])
    large = TokenFile(
        np.full(22, 65535, np.uint16), tokens.document_starts, tokens.document_bytes, {}
    )
    assert TrainingBatches(large, seq_len=4, batch_size=1, seed=0).batch(0)["input_ids"].max() == (
        65535
    )


@settings(deadline=None)
@given(LENGTHS, SEQ_LEN, st.integers(0, 5), st.integers(1, 3), st.integers(1, 3))
def test_targets_of_a_step_are_counted_without_building_it(
    lengths: list[int], seq_len: int, step: int, accumulation: int, world_size: int
) -> None:
    tokens = tokens_of(lengths)
    cut = {"seq_len": seq_len, "batch_size": 2, "seed": 0, "world_size": world_size,
           "accumulation": accumulation}  # fmt: skip
    for kind in (TrainingBatches, CarriedBatches):
        try:
            ranks = [kind(tokens, rank=rank, **cut) for rank in range(world_size)]
        except UserError:  # too short
            continue
        built = [rank.batch(step, micro) for rank in ranks for micro in range(accumulation)]
        assert ranks[0].num_targets(step) == sum(len(counted(batch)) for batch in built)
