"""Rows that ask for what stands in them, at the distance that they say."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retnet.errors import UserError
from retnet.experiments.recall.tasks import TASKS, Batch, Task
from retnet.model.loss import IGNORE_INDEX

SEEDS = st.integers(0, 2**32)


def made(task: Task, count: int, seed: int, rows: int = 3) -> Batch:
    return task.sample(rows, count, torch.Generator().manual_seed(seed))


def questions(batch: Batch) -> list[tuple[list[int], int, int, int]]:
    """Row, place, answer and where what is asked for stands, of each question."""
    found = []
    for row, place in (batch.targets != IGNORE_INDEX).nonzero().tolist():
        answer, distance = batch.targets[row, place].item(), batch.distances[row, place].item()
        found.append((batch.input_ids[row].tolist(), place, answer, place - distance))
    return found


@st.composite
def sized(draw: st.DrawFn, name: str) -> tuple[Task, int]:
    """A task of any size that its check lets pass, and one of its counts."""
    symbols = draw(st.integers(1, 12))
    count = draw(st.integers(1, symbols)) if name != "needle" else 1
    task = replace(TASKS[name], symbols=symbols, counts=(count,))
    length = draw(st.integers(task.shortest(count), 50))
    return replace(task, length=length), count


@pytest.mark.parametrize("name", TASKS)
@given(data=st.data(), seed=SEEDS)
@settings(max_examples=40, deadline=None)
def test_answers_stand_where_they_are_said_to(name: str, data: st.DataObject, seed: int) -> None:
    task, count = data.draw(sized(name))
    task.check()
    batch = made(task, count, seed)
    assert batch.input_ids.shape == (3, task.length)
    assert 0 <= batch.input_ids.min() and batch.input_ids.max() < task.vocab_size
    each = {"mqar": count, "copy": count, "needle": task.QUESTIONS if name == "needle" else 0}
    asked = (batch.targets != IGNORE_INDEX).sum(1)
    assert asked.tolist() == [each[name]] * 3
    assert batch.distances[batch.targets == IGNORE_INDEX].unique().tolist() in ([0], [])
    for row, place, answer, source in questions(batch):
        assert 0 <= source < place
        if name == "needle":  # the marker asks for the one token that is no noise
            assert row[place] == 2 * task.symbols and row[source] == answer < task.symbols
            assert sum(token < task.symbols for token in row) == 1
        else:  # the same token as at the question, and after it the answer; nowhere else before
            assert row[source] == row[place] and row[source + 1] == answer
            assert row[:place].count(row[place]) == 1


@given(seed=SEEDS)
@settings(max_examples=20, deadline=None)
def test_every_key_is_asked_once(seed: int) -> None:
    task = replace(TASKS["mqar"], length=40)
    for row, targets in zip(*(vars(made(task, 8, seed))[k] for k in ("input_ids", "targets")),
                            strict=True):  # fmt: skip
        keys = row[:16:2]
        assert keys.unique().numel() == 8 and keys.max() < 16 <= row[1:16:2].min()
        asked = row[targets != IGNORE_INDEX]
        assert sorted(asked.tolist()) == sorted(keys.tolist())


@pytest.mark.parametrize("name", TASKS)
def test_seeded_and_no_two_rows_alike(name: str) -> None:
    task = TASKS[name]
    first, again, other = (made(task, task.counts[-1], seed, rows=64) for seed in (5, 5, 6))
    assert first.input_ids.equal(again.input_ids) and first.targets.equal(again.targets)
    assert not first.input_ids.equal(other.input_ids)
    assert len(first.input_ids.unique(dim=0)) == 64


@pytest.mark.parametrize("name", TASKS)
def test_all_distances_come_up(name: str) -> None:
    task = replace(TASKS[name], length=24, counts=(1,))
    batch = made(task, 1, 0, rows=2000)
    found = batch.distances[batch.targets != IGNORE_INDEX].unique().tolist()
    shortest, longest = {"mqar": (2, 23), "copy": (2, 23), "needle": (1, 23)}[name]
    assert found == [*range(shortest, longest)] or found == [*range(shortest, longest + 1)]


def test_a_batch_has_rows_of_each_count() -> None:
    task = replace(TASKS["mqar"], counts=(2, 4, 8))
    batch = task.batch(10, torch.Generator().manual_seed(0))
    assert (batch.targets != IGNORE_INDEX).sum(1).tolist() == [2] * 4 + [4] * 3 + [8] * 3


@pytest.mark.parametrize(
    ("name", "sizes", "words"),
    [
        ("mqar", {"symbols": 7}, "--symbols (7) must be at least the largest number of pairs (8)"),
        ("mqar", {"length": 23}, "--length (23) has no room for 8 pairs of mqar: it takes 24"),
        ("copy", {"length": 16}, "--length (16) has no room for 8 symbols of copy: it takes 17"),
        ("needle", {"length": 8}, "--length (8) has no room for 1 needles of needle: it takes"),
        ("mqar", {"rows": 2}, "--rows (2) must be at least the 3 numbers of pairs of mqar"),
    ],
)
def test_sizes_that_hold_nothing(name: str, sizes: dict[str, int], words: str) -> None:
    counts = {"mqar": (2, 4, 8), "copy": (8,), "needle": (1,)}[name]
    with pytest.raises(UserError) as error:
        replace(TASKS[name], counts=counts, **sizes).check()
    assert words in str(error.value)
