"""Synthetic tasks of memory: rows of tokens, made by a seeded generator, and the answers in them.

What is asked for stands earlier in the row, once; the distance is the number of tokens from there
to the question. Each kind of token has symbols of its own, so nothing but the right place answers.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from retnet.errors import UserError
from retnet.model.loss import IGNORE_INDEX


@dataclass(frozen=True)
class Batch:
    """Rows, and what is to be answered in them. All int64 [B, T].

    Attributes:
        input_ids: Tokens.
        targets: The answer at each question, to be predicted there; -100 elsewhere.
        distances: Tokens from what a question asks for to the question; 0 elsewhere.
    """

    input_ids: Tensor
    targets: Tensor
    distances: Tensor


@dataclass(frozen=True)
class Task:
    """One task at one size.

    Attributes:
        length: T, tokens in a row.
        counts: How many things a row holds to remember; each is trained on and measured.
        symbols: Different tokens of each kind.
        rows: B, rows of a training step, shared out among the counts.
        steps: Steps of training, at most.
    """

    length: int
    counts: tuple[int, ...]
    symbols: int
    rows: int
    steps: int

    name: ClassVar[str]
    counted: ClassVar[str]  # what ``counts`` are numbers of
    kinds: ClassVar[int]  # of tokens with ``symbols`` each
    markers: ClassVar[int] = 0  # single tokens after those

    @property
    def vocab_size(self) -> int:
        return self.kinds * self.symbols + self.markers

    def shortest(self, count: int) -> int:
        """Tokens that a row needs."""
        raise NotImplementedError

    def sample(self, rows: int, count: int, random: Generator) -> Batch:
        """Rows with so many things to remember, the answers of each once."""
        raise NotImplementedError

    def batch(self, rows: int, random: Generator) -> Batch:
        """Rows of all counts, about equally many of each."""
        each = [rows // len(self.counts)] * len(self.counts)
        each[0] += rows - sum(each)
        parts = [self.sample(n, c, random) for n, c in zip(each, self.counts, strict=True) if n]
        together = (torch.cat([getattr(p, key) for p in parts]) for key in vars(parts[0]))
        return Batch(*together)

    def check(self) -> None:
        """Raise a ``UserError`` where a row has no room for what it is to hold."""
        most = max(self.counts)
        if most > self.symbols:
            raise UserError(
                f"--symbols ({self.symbols}) must be at least the largest number of {self.counted} "
                f"({most}) of {self.name}, none of which is there twice"
            )
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


def _ordered(rows: int, choices: int, count: int, random: Generator) -> Tensor:
    """int64 [rows, count] of 0 .. choices - 1, none twice in a row."""
    return torch.rand(rows, choices, generator=random).argsort(1)[:, :count]


def _symbols(rows: int, columns: int, kind: int, symbols: int, random: Generator) -> Tensor:
    """Any tokens of a kind."""
    return kind * symbols + torch.randint(symbols, (rows, columns), generator=random)


def _asked(input_ids: Tensor, places: Tensor, answers: Tensor, sources: Tensor) -> Batch:
    """The batch with questions at ``places`` [B, Q] about what stands at ``sources`` [B, Q]."""
    targets = torch.full_like(input_ids, IGNORE_INDEX).scatter_(1, places, answers)
    distances = torch.zeros_like(input_ids).scatter_(1, places, places - sources)
    return Batch(input_ids, targets, distances)


class AssociativeRecall(Task):
    """Multi-query associative recall (MQAR; Arora et al. 2023, Zoology, arXiv 2312.04927).

    A row begins with pairs of a key and its value, no key twice. Then each key is asked once, at a
    random place after a random one, among tokens that say nothing: the answer is its value. The
    distance is that from a key to where it is asked.
    """

    name, counted, kinds = "mqar", "pairs", 3  # keys, values, noise

    def shortest(self, count: int) -> int:
        return 3 * count

    def sample(self, rows: int, count: int, random: Generator) -> Batch:
        keys = _ordered(rows, self.symbols, count, random)
        values = _symbols(rows, count, 1, self.symbols, random)
        input_ids = _symbols(rows, self.length, 2, self.symbols, random)
        sources = torch.arange(0, 2 * count, 2).expand(rows, -1)
        input_ids.scatter_(1, sources, keys).scatter_(1, sources + 1, values)
        places = 2 * count + _ordered(rows, self.length - 2 * count, count, random)
        return _asked(input_ids.scatter_(1, places, keys), places, values, sources)


class Copying(Task):
    """A string, noise, a marker, and the string again.

    A marker stands before the string too, none of whose symbols is there twice, so each answer is
    what followed the same token before. The noise between has any length that a row has room for,
    and what is left of the row lies before the string; the distance is the same for all symbols.
    """

    name, counted, kinds, markers = "copy", "symbols", 2, 1  # of the string, of noise

    def shortest(self, count: int) -> int:
        return 2 * count + 1

    def sample(self, rows: int, count: int, random: Generator) -> Batch:
        string = _ordered(rows, self.symbols, count, random)
        marker = torch.full((rows, 1), 2 * self.symbols)
        input_ids = _symbols(rows, self.length, 1, self.symbols, random)
        shown, steps = torch.cat((marker, string), 1), torch.arange(count + 1)
        begin = torch.randint(self.length - 2 * count, (rows, 1), generator=random)
        sources = begin + steps
        places = (self.length - count + steps[:-1]).expand(rows, -1)
        input_ids.scatter_(1, sources, shown).scatter_(1, places, shown[:, :-1])
        return _asked(input_ids, places, string, sources[:, :-1])


class Needle(Task):
    """One token among noise that says nothing, asked for by a marker at random places after it."""

    name, counted, kinds, markers = "needle", "needles", 2, 1  # needles, noise

    QUESTIONS: ClassVar[int] = 8  # of a row, as far as there is room after the needle

    def shortest(self, count: int) -> int:
        return 2 * self.QUESTIONS

    def sample(self, rows: int, count: int, random: Generator) -> Batch:
        needle = _symbols(rows, 1, 0, self.symbols, random)
        input_ids = _symbols(rows, self.length, 1, self.symbols, random)
        begin = torch.randint(self.length - self.QUESTIONS, (rows, 1), generator=random)
        # the later of all places in a random order: those after the needle
        order = torch.rand(rows, self.length, generator=random)
        order = order.masked_fill(torch.arange(self.length) <= begin, 2.0)
        places = order.argsort(1)[:, : self.QUESTIONS]
        input_ids.scatter_(1, begin, needle).scatter_(1, places, 2 * self.symbols)
        answers = needle.expand(-1, self.QUESTIONS)
        return _asked(input_ids, places, answers, begin.expand_as(answers))


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        AssociativeRecall(length=64, counts=(2, 4, 8), symbols=16, rows=48, steps=2000),
        Copying(length=64, counts=(8,), symbols=16, rows=48, steps=2000),
        Needle(length=256, counts=(1,), symbols=16, rows=16, steps=600),
    )
}
