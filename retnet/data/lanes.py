"""Batches for a state that is carried: every row reads its own lane, window after window.

The documents, in a new order in each epoch, are one long text, cut into as many equal lanes as the
global batch has rows. Step s reads the s-th window of every lane, so a row goes on where it was and
a document stays in one row (except where a lane begins in the middle of it).
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retnet.data.batches import StepBatches, ValidationBatches, batch_of
from retnet.data.token_file import TokenFile
from retnet.errors import UserError
from retnet.model.loss import IGNORE_INDEX

VALIDATION_LANES = 32  # enough to fill batches, and as many processes
LEAST_WINDOWS = 16  # of a validation lane, whose first window begins without a state


class CarriedBatches(StepBatches):
    """The training windows as a pure function of (seed, step, micro_step, rank).

    What ``TrainingBatches`` is for windows on their own; row g of the global batch is lane g,
    however the rows are divided among processes and micro-steps.
    """

    def __init__(self, tokens: TokenFile, **cut: int) -> None:
        """Cut lanes (``cut``: as of ``StepBatches``); a ``UserError`` where they fill no window."""
        super().__init__(tokens, **cut)
        self._windows_per_lane = (tokens.num_tokens - 1) // self.global_batch // self._seq_len
        if self._windows_per_lane < 1:
            raise UserError(
                f"train.carry_state cuts the {tokens.num_tokens:,} training tokens into "
                f"{self.global_batch} lanes, which do not fill one window of data.seq_len "
                f"({self._seq_len}) each: use a smaller train.batch_size or data.seq_len, or more "
                "text"
            )
        self.windows_per_epoch = self._windows_per_lane * self.global_batch
        self._documents = lru_cache(maxsize=1)(self._documents_of_epoch)
        self._targets_begun = lru_cache(maxsize=1)(self._targets_of_epoch)

    def batch(self, step: int, micro_step: int = 0) -> dict[str, Tensor]:
        """The rows of this process in one micro-step.

        Returns ``input_ids``, ``shift_labels`` and ``segment_ids``, int64 [B, T]: the segment id of
        a document is the same in all its windows and another one in the next epoch.
        """
        epoch = step // self._windows_per_lane
        order, begins = self._documents(epoch)
        starts = self._own(step, micro_step)
        positions = starts[:, None] + np.arange(self._seq_len + 1)  # [B, T + 1]
        documents = np.searchsorted(begins, positions, side="right") - 1
        offsets = positions - begins[documents]
        places = self._tokens.document_starts[order[documents]] + offsets
        counts = self._tokens.counts(places)
        return batch_of(self._tokens.tokens[places], documents + epoch * len(order), counts)

    def _starts(self, step: int, rows: np.ndarray) -> np.ndarray:
        """Counted in the epoch's order of documents."""
        window = step % self._windows_per_lane
        return (rows * self._windows_per_lane + window) * self._seq_len

    def _targets_before(self, step: int, positions: np.ndarray) -> np.ndarray:
        epoch = step // self._windows_per_lane
        order, begins = self._documents(epoch)
        first = self._tokens.document_starts[order]
        documents = np.searchsorted(begins, positions, side="right") - 1
        places = first[documents] + positions - begins[documents]
        inside = self._tokens.targets_before(places)
        inside -= self._tokens.targets_before(first)[documents]
        return self._targets_begun(epoch)[documents] + inside

    def _targets_of_epoch(self, epoch: int) -> np.ndarray:
        """The targets before each document in an epoch's order."""
        starts = self._tokens.document_starts
        before = self._tokens.targets_before(np.append(starts, self._tokens.num_tokens))
        order, _ = self._documents(epoch)
        return np.concatenate(([0], np.cumsum(np.diff(before)[order])[:-1]))

    def _documents_of_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents of an epoch in their order, and where each begins in that order."""
        starts = self._tokens.document_starts
        lengths = np.diff(np.append(starts, self._tokens.num_tokens))
        order = np.random.default_rng([self._seed, epoch]).permutation(len(starts))
        return order, np.concatenate(([0], np.cumsum(lengths[order])[:-1]))


class CarriedValidationBatches(ValidationBatches):
    """All validation windows, each counted once, in lanes that are read from window to window.

    The lanes depend on the text alone, so that the loss is the same however they are divided among
    batches and processes. Every process gets as many batches of as many rows; what there is not
    has labels of -100.
    """

    def __init__(self, tokens: TokenFile, **cut: Any) -> None:
        """Cut up to 32 lanes of at least 16 windows, where there are so many.

        ``cut``: as of ``ValidationBatches``, except that every batch has ``segment_ids``.
        """
        super().__init__(tokens, reset_at_documents=True, **cut)
        windows = len(self._starts)
        lanes = max(1, min(VALIDATION_LANES, windows // LEAST_WINDOWS))
        self._lane_length = -(-windows // lanes)
        filled = -(-windows // self._lane_length)
        self._own_lanes = -(-filled // self._world_size)

    def __len__(self) -> int:
        return -(-self._own_lanes // self._batch_size) * self._lane_length

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batches in self.courses():
            yield from batches

    def courses(self) -> Iterator[Iterator[dict[str, Tensor]]]:
        """The batches in courses: a batch continues the rows of the one before it in its course."""
        first = self._rank * self._own_lanes
        own = np.arange(first, first + self._own_lanes)
        for row in range(0, self._own_lanes, self._batch_size):
            yield self._course(own[row : row + self._batch_size])

    def _course(self, lanes: np.ndarray) -> Iterator[dict[str, Tensor]]:
        for index in range(self._lane_length):
            windows = lanes * self._lane_length + index
            there = torch.from_numpy(windows < len(self._starts))
            starts = self._starts[np.minimum(windows, len(self._starts) - 1)]
            batch = self._windows.batch(starts, name_documents=True)
            labels = batch["shift_labels"].masked_fill(~there[:, None], IGNORE_INDEX)
            yield {**batch, "shift_labels": labels}
