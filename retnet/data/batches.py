"""Batches out of a token file: windows in a random order for training, in order for validation.

B batch, T time. A window is T inputs and the T tokens after each of them. The target of a
document's last token would be the next document's first: it is -100, which no loss counts.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from retnet.data.token_file import TokenFile
from retnet.errors import UserError
from retnet.model.loss import IGNORE_INDEX


def check_window(num_tokens: int, seq_len: int) -> None:
    """Raise a ``UserError`` when the training tokens do not fill one window of ``seq_len``."""
    if num_tokens < seq_len + 1:
        raise UserError(
            f"data.seq_len ({seq_len}) is longer than the training text, which has "
            f"{num_tokens} tokens where {seq_len + 1} are needed: "
            f"use at most {num_tokens - 1}, or more text (data.source, data.max_tokens)"
        )


def batch_of(
    rows: np.ndarray, documents: np.ndarray, counts: np.ndarray | None = None
) -> dict[str, Tensor]:
    """Inputs, labels and segments [B, T] out of tokens [B, T + 1] and the documents they are of.

    ``counts`` [B, T + 1] says which tokens are targets, where that is not all of a document's.
    """
    rows = rows.astype(np.int64)
    counted = documents[:, 1:] == documents[:, :-1]
    if counts is not None:
        counted &= counts[:, 1:]
    return {
        "input_ids": torch.from_numpy(rows[:, :-1].copy()),
        "shift_labels": torch.from_numpy(np.where(counted, rows[:, 1:], IGNORE_INDEX)),
        "segment_ids": torch.from_numpy(documents[:, :-1].astype(np.int64)),
    }


class _Windows:
    """Rows of a token file by the index of their first token; nothing from ``end`` on is read."""

    def __init__(self, tokens: TokenFile, seq_len: int, end: int, reset_at_documents: bool) -> None:
        self._tokens, self._end, self._reset = tokens, end, reset_at_documents
        self._offsets = np.arange(seq_len + 1)
        self._padding = tokens.padding

    def batch(self, starts: np.ndarray, *, name_documents: bool = False) -> dict[str, Tensor]:
        """The rows [B, T] that begin at ``starts``.

        With ``name_documents`` the segment ids are always there and are the documents' numbers in
        the file, so that a document has the same in all its windows.
        """
        positions = starts[:, None] + self._offsets  # [B, T + 1]
        outside = positions >= self._end
        positions = np.minimum(positions, self._end - 1)
        rows = np.where(outside, self._padding, self._tokens.tokens[positions])
        documents = np.searchsorted(self._tokens.document_starts, positions, side="right")
        if not name_documents:
            documents -= documents[:, :1]  # relative to the row's first
        batch = batch_of(rows, documents, self._tokens.counts(positions))
        batch["shift_labels"][torch.from_numpy(outside[:, 1:])] = IGNORE_INDEX
        if not (name_documents or (self._reset and batch["segment_ids"].any())):
            del batch["segment_ids"]
        return batch


class StepBatches:
    """What both kinds of training windows share: the rows of a step, and who gets which."""

    windows_per_epoch: int  # rows after which the text has been seen once

    def __init__(
        self,
        tokens: TokenFile,
        *,
        seq_len: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
    ) -> None:
        """Cut windows of ``seq_len`` tokens; ``batch_size`` is of one micro-step on one process."""
        self.global_batch = batch_size * world_size * accumulation  # rows of a step
        self._tokens, self._seq_len, self._seed = tokens, seq_len, seed
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size

    def epoch(self, step: int) -> float:
        """How often the training text has been seen before ``step``."""
        return step * self.global_batch / self.windows_per_epoch

    def window_starts(self, step: int) -> list[int]:
        """The first token of every row of a step, over all processes and micro-steps."""
        found: list[int] = self._starts(step, np.arange(self.global_batch)).tolist()
        return found

    def num_targets(self, step: int) -> int:
        """Labels that count in a step, over all processes and micro-steps; no batch is built."""
        starts = self._starts(step, np.arange(self.global_batch))
        before = self._targets_before(step, np.stack((starts + 1, starts + self._seq_len + 1)))
        return int((before[1] - before[0]).sum())

    def _starts(self, step: int, rows: np.ndarray) -> np.ndarray:
        """The first token of some of a step's rows, which are counted from 0."""
        raise NotImplementedError

    def _targets_before(self, step: int, positions: np.ndarray) -> np.ndarray:
        """The targets before some positions in the text that a step's starts are counted in."""
        raise NotImplementedError

    def _own(self, step: int, micro_step: int) -> np.ndarray:
        """The starts of the rows of this process in a micro-step."""
        first = (micro_step * self._world_size + self._rank) * self._batch_size
        return self._starts(step, np.arange(first, first + self._batch_size))


class TrainingBatches(StepBatches):
    """The training windows as a pure function of (seed, step, micro_step, rank).

    Rows are numbered through the whole training: row ``g = step * global_batch + position`` is
    window ``g % windows_per_epoch`` of epoch ``g // windows_per_epoch``. The rows of a step are
    therefore the same however they are divided among processes and micro-steps. In each epoch
    the windows begin at another offset and come in another order, each exactly once.
    """

    def __init__(self, tokens: TokenFile, *, reset_at_documents: bool = True, **cut: int) -> None:
        """Cut windows (``cut``: as of ``StepBatches``); a ``UserError`` where not one is filled.

        ``reset_at_documents`` gives ``segment_ids`` where a row holds more than one document.
        """
        super().__init__(tokens, **cut)
        check_window(tokens.num_tokens, self._seq_len)
        targets = tokens.num_tokens - 1
        # One window less than fit, where possible, leaves room for an offset of up to T - 1.
        self.windows_per_epoch = max(1, (targets - self._seq_len + 1) // self._seq_len)
        self._slack = min(self._seq_len - 1, targets - self.windows_per_epoch * self._seq_len)
        self._windows = _Windows(tokens, self._seq_len, tokens.num_tokens, reset_at_documents)
        # A batch may reach over the end of an epoch, or of several small ones.
        self._starts_in = lru_cache(maxsize=2)(self._starts_of_epoch)

    def batch(self, step: int, micro_step: int = 0) -> dict[str, Tensor]:
        """The rows of this process in one micro-step.

        Returns ``input_ids`` and ``shift_labels``, int64 [B, T]: the label of a position is the
        token after it, -100 where that belongs to another document or is no target; and
        ``segment_ids``, int64 [B, T], where boundaries matter and some row holds one.
        """
        return self._windows.batch(self._own(step, micro_step))

    def _starts(self, step: int, rows: np.ndarray) -> np.ndarray:
        epochs, places = np.divmod(step * self.global_batch + rows, self.windows_per_epoch)
        starts = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            of_epoch = epochs == epoch
            starts[of_epoch] = self._starts_in(epoch)[places[of_epoch]]
        return starts

    def _targets_before(self, step: int, positions: np.ndarray) -> np.ndarray:
        return self._tokens.targets_before(positions)

    def _starts_of_epoch(self, epoch: int) -> np.ndarray:
        generator = np.random.default_rng([self._seed, epoch])
        offset = generator.integers(0, self._slack, endpoint=True)
        return offset + generator.permutation(self.windows_per_epoch) * self._seq_len


class ValidationBatches:
    """Non-overlapping windows over all validation tokens, in order.

    Every target is counted exactly once, except those across documents, which are never. The last
    window is padded, with labels of -100. Every process gets the same number of batches, so that
    processes which must call the model together can; where there are not enough windows, a
    process repeats the first with all labels -100.

    Attributes:
        num_targets: Targets counted, over all processes.
        num_bytes: UTF-8 bytes of the text they come from, over all processes; where ``max_tokens``
            cuts a document, its bytes in proportion to its tokens (of a conversation, its targets).
    """

    def __init__(
        self,
        tokens: TokenFile,
        *,
        seq_len: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        max_tokens: int | None = None,
        reset_at_documents: bool = True,
    ) -> None:
        """Cut windows of ``seq_len`` tokens out of the first ``max_tokens`` (None: all) tokens."""
        self._end = min(tokens.num_tokens, max_tokens or tokens.num_tokens)
        self._windows = _Windows(tokens, seq_len, self._end, reset_at_documents)
        self._starts = np.arange(0, max(1, self._end - 1), seq_len)
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        starts = tokens.document_starts
        ends = np.append(starts[1:], tokens.num_tokens)
        covered = np.clip(self._end - starts, 0, ends - starts)
        whole = ends - starts
        if tokens.answer_bounds is not None:  # bytes are those of the answers
            before, after, to = map(tokens.targets_before, (starts, ends, starts + covered))
            covered, whole = to - before, np.maximum(after - before, 1)
        self.num_targets = int(tokens.targets_before(np.array([self._end]))[0])
        self.num_bytes = round(float((tokens.document_bytes * covered / whole).sum()))

    def __len__(self) -> int:
        return -(-len(self._starts) // (self._batch_size * self._world_size))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for index in range(len(self)):
            first = (index * self._world_size + self._rank) * self._batch_size
            starts = self._starts[first : first + self._batch_size]
            batch = self._windows.batch(starts if len(starts) else self._starts[:1])
            if not len(starts):
                batch["shift_labels"].fill_(IGNORE_INDEX)
            yield batch
