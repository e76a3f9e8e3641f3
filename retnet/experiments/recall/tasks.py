"""Synthetic tasks of memory: rows of tokens, made by a seeded generator, and the answers in them.

A row holds pairs of a key and a value among noise that says nothing, no key twice; later it asks
for the values of keys. The distance is the number of tokens from a pair to its question.

A pair is one token, so a task is about remembering alone. With ``pair_tokens`` 2 it is a key and
its value side by side, as in Zoology: a model must then learn first to join neighbours, which takes
attention of this size thousands of steps. The vocabulary is [pairs | keys | values | noise], the
pairs only where they are one token; questions are keys and answers values in either case.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from retnet.errors import UserError
from retnet.model.loss import IGNORE_INDEX

NOISE = 16  # different tokens of it


@dataclass(frozen=True)
class Batch:
    """Rows, and what is to be answered in them. All int64 [B, T].

    Attributes:
        input_ids: Tokens.
        targets: The answer at each question, to be predicted there; -100 elsewhere.
        distances: Tokens from the pair to the question; 0 elsewhere.
    """

    input_ids: Tensor
    targets: Tensor
    distances: Tensor


@dataclass(frozen=True)
class Task:
    """One task at one size.

    Attributes:
        length: T, tokens in a row.
        counts: Numbers of pairs; each is trained on and measured.
        values: Different values.
        rows: B, rows of a training step, shared out among the counts.
        steps: Steps of training, at most.
        pair_tokens: 1 or 2, see above.
    """

    length: int
    counts: tuple[int, ...]
    values: int
    rows: int
    steps: int
    pair_tokens: int = 1

    name: ClassVar[str]
    counted: ClassVar[str]  # what the pairs stand for here

    @property
    def keys(self) -> int:
        """Different keys."""
        return max(self.counts)

    @property
    def first_key(self) -> int:
        """The token of key 0."""
        return self.keys * self.values if self.pair_tokens == 1 else 0

    @property
    def first_value(self) -> int:
        return self.first_key + self.keys

    @property
    def first_noise(self) -> int:
        return self.first_value + self.values

    @property
    def vocab_size(self) -> int:
        return self.first_noise + NOISE

    def shortest(self, count: int) -> int:
        """Tokens that a row needs at least."""
        return (self.pair_tokens + 1) * count

    def layout(self, rows: int, count: int, random: Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Keys [B, count], the place of each pair's last token, and the places of the questions.

        int64 [B, Q]; Q is a multiple of the count: the keys are asked for in their order, perhaps
        again and again.
        """
        raise NotImplementedError

    def sample(self, rows: int, count: int, random: Generator) -> Batch:
        """Rows with so many pairs."""
        keys, pairs, questions = self.layout(rows, count, random)
        values = torch.randint(self.values, keys.shape, generator=random)
        noise = torch.randint(NOISE, (rows, self.length), generator=random)
        input_ids = self.first_noise + noise
        if self.pair_tokens == 1:
            input_ids.scatter_(1, pairs, keys * self.values + values)
        else:
            input_ids.scatter_(1, pairs - 1, self.first_key + keys)
            input_ids.scatter_(1, pairs, self.first_value + values)
        again = questions.shape[1] // count
        asked, answers, sources = (x.repeat(1, again) for x in (keys, values, pairs))
        input_ids.scatter_(1, questions, self.first_key + asked)
        targets = torch.full_like(input_ids, IGNORE_INDEX)
        targets.scatter_(1, questions, self.first_value + answers)
        distances = torch.zeros_like(input_ids).scatter_(1, questions, questions - sources)
        return Batch(input_ids, targets, distances)

    def batch(self, rows: int, random: Generator) -> Batch:
        """Rows of all counts, about equally many of each."""
        each = [rows // len(self.counts)] * len(self.counts)
        each[0] += rows - sum(each)
        parts = [self.sample(n, c, random) for n, c in zip(each, self.counts, strict=True)]
        together = (torch.cat([getattr(p, key) for p in parts]) for key in vars(parts[0]))
        return Batch(*together)

    def check(self) -> None:
        """Raise a ``UserError`` where a row has no room for what it is to hold."""
        most = max(self.counts)
        if (needed := self.shortest(most)) > self.length:
            raise UserError(
                f"--length ({self.length}) has no room for {most} {self.counted} of {self.name}: "
                f"it takes {needed} tokens"
            )
        if self.rows < len(self.counts):
            raise UserError(
                f"--rows ({self.rows}) must be at least the {len(self.counts)} numbers of "
                f"{self.counted} of {self.name}, which share them"
            )


def _some(rows: int, choices: int, count: int, random: Generator) -> Tensor:
    """int64 [rows, count] of 0 .. choices - 1, none twice in a row, in any order."""
    return torch.rand(rows, choices, generator=random).argsort(1)[:, :count]


class AssociativeRecall(Task):
    """Multi-query associative recall (MQAR; Arora et al. 2023, Zoology, arXiv 2312.04927).

    A row begins with the pairs. Then each key is asked for once, at a random place.
    """

    name, counted = "mqar", "pairs"

    def layout(self, rows: int, count: int, random: Generator) -> tuple[Tensor, Tensor, Tensor]:
        size, used = self.pair_tokens, self.pair_tokens * count
        pairs = torch.arange(size - 1, used, size).expand(rows, -1)
        questions = used + _some(rows, self.length - used, count, random)
        return _some(rows, self.keys, count, random), pairs, questions


class Copying(Task):
    """A string of symbols, noise, and the string again, symbol by symbol.

    The keys are the places in the string. The noise between has any length that a row has room for,
    each power of two as often as the others (else nearly all would be long), and what is left of
    the row lies before the string. So the distance is one for a whole string.
    """

    name, counted = "copy", "symbols"

    def layout(self, rows: int, count: int, random: Generator) -> tuple[Tensor, Tensor, Tensor]:
        size, used = self.pair_tokens, self.pair_tokens * count
        lengths = self.length - used - count + 1  # of the noise between, from 0 on
        noise = (lengths + 1) ** torch.rand(rows, 1, generator=random, dtype=torch.float64)
        begin = lengths - noise.long().clamp(max=lengths)
        # one by one the questions stand nearer to their pairs where a pair is two tokens
        places = torch.arange(count)
        pairs = begin + size * places + size - 1
        questions = self.length - count + places
        return places.expand(rows, -1), pairs, questions.expand(rows, -1)


class Needle(Task):
    """One pair in the first half of noise, asked for again and again at random places after it.

    A place is as likely as it is near (the chance falls with 1 / distance), so that each power of
    two comes up.
    """

    name, counted = "needle", "needle"

    QUESTIONS: ClassVar[int] = 8  # in a row

    def shortest(self, count: int) -> int:
        return self.pair_tokens + self.QUESTIONS

    def layout(self, rows: int, count: int, random: Generator) -> tuple[Tensor, Tensor, Tensor]:
        free = (self.length - self.shortest(count)) // 2 + 1
        needle = self.pair_tokens - 1 + torch.randint(free, (rows, 1), generator=random)
        distances = (torch.arange(self.length) - needle).double()
        # the first to come of waiting times that are as long as the places are far
        waits = -torch.rand(rows, self.length, generator=random, dtype=torch.float64).log()
        waits = (waits * distances).masked_fill(distances <= 0, torch.inf)
        questions = waits.argsort(1)[:, : self.QUESTIONS]
        return torch.zeros(rows, 1, dtype=torch.int64), needle, questions


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        AssociativeRecall(length=128, counts=(4, 8, 16), values=8, rows=24, steps=800),
        Copying(length=256, counts=(8,), values=8, rows=12, steps=800),
        Needle(length=512, counts=(1,), values=16, rows=8, steps=600),
    )
}
