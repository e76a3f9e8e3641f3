"""Batches out of a token file: windows in a random order for training, in order for validation.

B batch, T time. A window is T inputs and the T tokens after each of them. The target of a
document's last token would be the next document's first: it is -100, which no loss counts.
"""

from collections.abc import Iterator

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
            f"use at most {num_tokens - 1}, or more text"
        )


class _Windows:
    """Rows of a token file by the index of their first token."""

    def __init__(self, tokens: TokenFile, seq_len: int, reset_at_documents: bool) -> None:
        self._tokens = tokens
        self._seq_len = seq_len
        self._reset = reset_at_documents
        self._padding = int(tokens.manifest.get("pad_token_id", 0))

    def batch(
        self, starts: np.ndarray, end: int, *, name_documents: bool = False
    ) -> dict[str, Tensor]:
        """The rows [B, T] that begin at ``starts``; nothing from token ``end`` on is read.

        With ``name_documents`` the segment ids are always there and are the documents' numbers in
        the file, so that a document has the same in all its windows.
        """
        positions = starts[:, None] + np.arange(self._seq_len + 1)  # [B, T + 1]
        inside = positions < end
        positions = np.minimum(positions, end - 1)
        rows = np.where(inside, self._tokens.tokens[positions], self._padding).astype(np.int64)
        documents = np.searchsorted(self._tokens.document_starts, positions, side="right")
        if not name_documents:
            documents -= documents[:, :1]  # relative to the row's first
        counted = inside[:, 1:] & (documents[:, 1:] == documents[:, :-1])
        batch = {
            "input_ids": torch.from_numpy(rows[:, :-1].copy()),
            "shift_labels": torch.from_numpy(np.where(counted, rows[:, 1:], IGNORE_INDEX)),
        }
        segments = documents[:, :-1].astype(np.int64)
        if name_documents or (self._reset and segments.any()):
            batch["segment_ids"] = torch.from_numpy(segments)
        return batch


class TrainingBatches:
    """The training windows as a pure function of (seed, step, micro_step, rank).

    Rows are numbered through the whole training: row ``g = step * global_batch + position`` is
    window ``g % windows_per_epoch`` of epoch ``g // windows_per_epoch``. The rows of a step are
    therefore the same however they are divided among processes and micro-steps. In each epoch
    the windows begin at another offset and come in another order, each exactly once.
    """

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
        reset_at_documents: bool = True,
    ) -> None:
        """Cut windows of ``seq_len`` tokens.

        Args:
            tokens: The training tokens.
            seq_len: T.
            batch_size: B, the rows of one micro-step on one process; the global batch is
                ``batch_size * world_size * accumulation``.
            seed: Decides offsets and order.
            rank: This process.
            world_size: Number of processes.
            accumulation: Micro-steps of an optimizer step.
            reset_at_documents: Give ``segment_ids`` where a row holds more than one document.

        Raises:
            UserError: The tokens do not fill one window.
        """
        check_window(tokens.num_tokens, seq_len)
        targets = tokens.num_tokens - 1
        # One window less than fit, where possible, leaves room for an offset of up to T - 1.
        self.windows_per_epoch = max(1, (targets - seq_len + 1) // seq_len)
        self.global_batch = batch_size * world_size * accumulation
        self._slack = min(seq_len - 1, targets - self.windows_per_epoch * seq_len)
        self._windows = _Windows(tokens, seq_len, reset_at_documents)
        self._num_tokens = tokens.num_tokens
        self._seq_len, self._batch_size, self._seed = seq_len, batch_size, seed
        self._rank, self._world_size = rank, world_size
        self._orders: dict[int, np.ndarray] = {}

    def batch(self, step: int, micro_step: int = 0) -> dict[str, Tensor]:
        """The rows of this process in one micro-step.

        Returns:
            ``input_ids`` and ``shift_labels``, int64 [B, T]: the label of a position is the token
            after it, -100 where that belongs to another document; and ``segment_ids``, int64
            [B, T], where boundaries matter and some row holds one.
        """
        first = (micro_step * self._world_size + self._rank) * self._batch_size
        starts = self._starts(self._rows(step)[first : first + self._batch_size])
        return self._windows.batch(np.array(starts), self._num_tokens)

    def window_starts(self, step: int) -> list[int]:
        """The first token of every row of a step, over all processes and micro-steps."""
        return self._starts(self._rows(step))

    def _rows(self, step: int) -> range:
        return range(step * self.global_batch, (step + 1) * self.global_batch)

    def _starts(self, rows: range) -> list[int]:
        return [self._start(*divmod(row, self.windows_per_epoch)) for row in rows]

    def epoch(self, step: int) -> float:
        """How often the training text has been seen before ``step``."""
        return step * self.global_batch / self.windows_per_epoch

    def _start(self, epoch: int, index: int) -> int:
        if epoch not in self._orders:
            # A batch may reach over the end of an epoch, or of several small ones.
            self._orders = {key: self._orders[key] for key in list(self._orders)[-1:]}
            self._orders[epoch] = self._window_starts(epoch)
        return int(self._orders[epoch][index])

    def _window_starts(self, epoch: int) -> np.ndarray:
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
            cuts a document, its bytes in proportion to its tokens.
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
        self._windows = _Windows(tokens, seq_len, reset_at_documents)
        self._starts = np.arange(0, max(1, self._end - 1), seq_len)
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        starts = tokens.document_starts
        ends = np.append(starts[1:], tokens.num_tokens)
        covered = np.clip(self._end - starts, 0, ends - starts)
        self.num_targets = int(np.maximum(covered - 1, 0).sum())
        self.num_bytes = round(float((tokens.document_bytes * covered / (ends - starts)).sum()))

    def __len__(self) -> int:
        return -(-len(self._starts) // (self._batch_size * self._world_size))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for index in range(len(self)):
            first = (index * self._world_size + self._rank) * self._batch_size
            starts = self._starts[first : first + self._batch_size]
            if len(starts):
                yield self._windows.batch(starts, self._end)
            else:
                batch = self._windows.batch(self._starts[:1], self._end)
                batch["shift_labels"].fill_(IGNORE_INDEX)
                yield batch
