"""Rows that ask for what stands in them, at the distance that they say."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retnet.errors import UserError
from retnet.experiments.recall.tasks import TASKS, Batch, Needle, Task
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
    count = draw(st.integers(1, 9)) if name != "needle" else 1
    more = draw(st.integers(0, 3)) if name != "needle" else 0
    task = replace(TASKS[name], values=draw(st.integers(1, 9)), counts=(count, count + more),
                   pair_tokens=draw(st.sampled_from((1, 2))))  # fmt: skip
    length = draw(st.integers(task.shortest(count + more), 60))
    return replace(task, length=length), count


@pytest.mark.parametrize("name", TASKS)
@given(data=st.data(), seed=SEEDS)
@settings(max_examples=40, deadline=None)
def test_answers_stand_where_they_are_said_to(name: str, data: st.DataObject, seed: int) -> None:
    task, count = data.draw(sized(name))
    task.check()
    batch = made(task, count, seed)
    assert batch.input_ids.shape == (3, task.length)
    assert batch.input_ids.min() >= 0 and batch.input_ids.max() < task.vocab_size
    asked = batch.targets != IGNORE_INDEX
    assert asked.sum(1).tolist() == [Needle.QUESTIONS if name == "needle" else count] * 3
    assert not batch.distances[~asked].any()
    for row, place, answer, source in questions(batch):
        key, value = row[place] - task.first_key, answer - task.first_value
        assert 0 <= key < task.keys and 0 <= value < task.values and 0 <= source < place
        if task.pair_tokens == 1:
            assert row[source] == key * task.values + value
            assert sum(token // task.values == key for token in row if token < task.first_key) == 1
        else:
            assert row[source - 1 : source + 1] == [row[place], answer]
            assert name == "needle" or row[:place].count(row[place]) == 1


@pytest.mark.parametrize("pair_tokens", [1, 2])
@pytest.mark.parametrize("name", TASKS)
def test_each_pair_is_asked_for(name: str, pair_tokens: int) -> None:
    """Once, the needle again and again; all else is noise. A string is asked for in its order."""
    task = replace(TASKS[name], pair_tokens=pair_tokens)
    count = task.counts[0]
    batch = made(task, count, 0, rows=20)
    for row, targets in zip(batch.input_ids, batch.targets, strict=True):
        keys = row[targets != IGNORE_INDEX]
        assert len(keys.unique()) == count
        noise = int((row >= task.first_noise).sum())
        assert noise == task.length - pair_tokens * count - len(keys)
        if name == "copy":
            assert keys.diff().unique().tolist() == [1]
    asked = batch.distances[batch.targets != IGNORE_INDEX].view(20, -1)
    assert name != "copy" or bool((asked.diff(dim=1) == 1 - pair_tokens).all())


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
    assert found == [*range(1, 24)]


@pytest.mark.parametrize("name", ["copy", "needle"])
def test_short_distances_are_as_frequent_as_long_ones(name: str) -> None:
    """By powers of two: of evenly drawn distances half would be in the last."""
    task = replace(TASKS[name], length=260, counts=(1,))
    batch = made(task, 1, 0, rows=4000)
    found = batch.distances[batch.targets != IGNORE_INDEX].double().log2().floor()
    shares = [float((found == power).double().mean()) for power in range(1, 8)]
    assert max(shares) < 4 * min(shares) and max(shares) < 0.25


def test_a_batch_has_rows_of_each_count() -> None:
    task = replace(TASKS["mqar"], counts=(2, 4, 8))
    batch = task.batch(10, torch.Generator().manual_seed(0))
    assert (batch.targets != IGNORE_INDEX).sum(1).tolist() == [2] * 4 + [4] * 3 + [8] * 3


@pytest.mark.parametrize(
    ("name", "sizes", "words"),
    [
        ("mqar", {"length": 15}, "--length (15) has no room for 8 pairs of mqar: it takes 16"),
        ("mqar", {"length": 23, "pair_tokens": 2}, "it takes 24 tokens"),
        ("copy", {"length": 15}, "--length (15) has no room for 8 symbols of copy: it takes 16"),
        ("needle", {"length": 8}, "--length (8) has no room for 1 needle of needle: it takes 9"),
        ("mqar", {"rows": 2}, "--rows (2) must be at least the 3 numbers of pairs of mqar"),
    ],
)
def test_sizes_that_hold_nothing(name: str, sizes: dict[str, int], words: str) -> None:
    counts = {"mqar": (2, 4, 8), "copy": (8,), "needle": (1,)}[name]
    with pytest.raises(UserError) as error:
        replace(TASKS[name], counts=counts, **sizes).check()
    assert words in str(error.value)
