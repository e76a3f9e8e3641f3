"""Lanes: rows go on where they were, documents keep their order and their segment id."""

from itertools import pairwise

import numpy as np
import pytest

from retnet.data import CarriedBatches, CarriedValidationBatches, ValidationBatches
from retnet.errors import UserError
from tests.data.corpora import BOS, tokens_of

TOKENS = tokens_of([5, 17, 3, 40, 8, 21, 2, 30])


def lanes(steps: int, **options: int) -> list[dict[str, np.ndarray]]:
    batches = CarriedBatches(TOKENS, seq_len=4, seed=3, **({"batch_size": 3} | options))
    return [{k: v.numpy() for k, v in batches.batch(step).items()} for step in range(steps)]


def test_an_epoch_is_every_document_in_a_new_order() -> None:
    batches = CarriedBatches(TOKENS, seq_len=4, batch_size=1, seed=0)
    steps = batches.windows_per_epoch
    orders = []
    for epoch in range(2):
        rows = [batches.batch(epoch * steps + step)["input_ids"][0] for step in range(steps)]
        text = np.concatenate(rows)
        starts = np.flatnonzero(text == BOS)
        orders.append(text[starts + 1].tolist())
        for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
            body = text[start + 1 : end]
            assert (np.diff(body[body >= 1000]) == 1).all()  # a document, whole and in order
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]
    assert batches.epoch(steps) == 1


def test_a_row_goes_on_where_it_was() -> None:
    windows = lanes(6)
    for one, two in pairwise(windows):
        last, first = one["shift_labels"][:, -1], two["input_ids"][:, 0]
        same = one["segment_ids"][:, -1] == two["segment_ids"][:, 0]
        assert (last[same] == first[same]).all() and (last[~same] == -100).all()
        assert (first[~same] == BOS).all()


def test_segments_are_documents_and_differ_between_epochs() -> None:
    batches = CarriedBatches(TOKENS, seq_len=4, batch_size=2, seed=0)
    steps = batches.windows_per_epoch // 2
    seen = []
    for first in (0, steps):
        ids = [batches.batch(first + step)["segment_ids"] for step in range(steps)]
        seen.append(set(np.concatenate(ids).flatten().tolist()))
    assert not seen[0] & seen[1]
    batch = batches.batch(1)
    starts = batch["input_ids"][:, 1:] == BOS
    assert ((batch["segment_ids"].diff() != 0) == starts).all()


def test_rows_are_the_same_however_they_are_divided() -> None:
    whole = lanes(4, batch_size=6)
    parts = [
        CarriedBatches(
            TOKENS, seq_len=4, seed=3, batch_size=1, world_size=2, rank=rank, accumulation=3
        )
        for rank in (0, 1)
    ]
    for step, expected in enumerate(whole):
        for key in expected:
            rows = [part.batch(step, micro)[key].numpy() for micro in range(3) for part in parts]
            assert (np.concatenate(rows) == expected[key]).all()


def test_too_many_lanes() -> None:
    with pytest.raises(UserError, match=r"train\.carry_state cuts the 142 .* into 99 lanes"):
        CarriedBatches(TOKENS, seq_len=4, batch_size=99, seed=0)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("max_tokens", [None, 77])
def test_validation_counts_each_target_once(world_size: int, max_tokens: int | None) -> None:
    tokens = tokens_of([5, 17, 3, 200, 8, 21, 2, 130])

    def targets(kind: type[ValidationBatches], batch_size: int) -> list[int]:
        found = []
        for rank in range(world_size):
            batches = kind(tokens, seq_len=4, batch_size=batch_size, rank=rank,
                           world_size=world_size, max_tokens=max_tokens)  # fmt: skip
            for batch in batches:
                labels = batch["shift_labels"]
                found += labels[labels != -100].tolist()
        assert len(found) == batches.num_targets
        return sorted(found)

    assert targets(CarriedValidationBatches, 4) == targets(ValidationBatches, 4)


def test_validation_lanes_go_on() -> None:
    tokens = tokens_of([300])
    batches = CarriedValidationBatches(tokens, seq_len=4, batch_size=3)
    courses = [list(course) for course in batches.courses()]
    assert [len(course[0]["input_ids"]) for course in courses] == [3, 1]  # 75 windows: 4 lanes
    assert len(batches) == len(list(batches)) == 2 * 19
    for one, two in (pair for course in courses for pair in pairwise(course[:-1])):
        assert (one["shift_labels"][:, -1] == two["input_ids"][:, 0]).all()


@pytest.mark.parametrize(("batch_size", "world_size"), [(2, 1), (8, 1), (99, 1), (4, 2), (1, 5)])
def test_validation_lanes_are_of_the_text_alone(batch_size: int, world_size: int) -> None:
    """And every process has as many batches, of at most the rows that are asked for."""
    tokens = tokens_of([90, 700, 3, 410, 800])

    def courses(rank: int, **cut: int) -> list[list[dict]]:
        batches = CarriedValidationBatches(tokens, seq_len=4, rank=rank, **cut)
        return [list(course) for course in batches.courses()]

    def lanes(found: list[list[dict]]) -> list[list[int]]:
        rows = []
        for course in found:
            for row in range(len(course[0]["input_ids"])):
                labels = [batch["shift_labels"][row] for batch in course]
                counted = [x.item() for x in np.concatenate(labels) if x != -100]
                rows += [counted] * bool(counted)
        return rows

    whole = lanes(courses(0, batch_size=64, world_size=1))
    assert len(whole) == 30  # 503 windows, 17 in a lane
    parts = [
        courses(rank, batch_size=batch_size, world_size=world_size) for rank in range(world_size)
    ]
    assert [lane for part in parts for lane in lanes(part)] == whole
    shapes = [[[len(b["input_ids"]) for b in course] for course in part] for part in parts]
    assert all(shape == shapes[0] for shape in shapes)
    assert max(rows for course in shapes[0] for rows in course) <= batch_size
