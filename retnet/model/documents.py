"""Padding, documents and positions: what a forward pass knows of its tokens besides their ids.

Rows may hold padding, several documents, and the continuation of an earlier call. From the mask,
the ids and the record that the cache keeps per row, ``describe_tokens`` derives everything at once,
without a host synchronisation: which tokens are valid, where a document begins, every token's
position, and the next record.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# columns of a cache's record, int64 [B, 3]
SEEN, NEXT_POSITION, SEGMENT = range(3)


@dataclass(frozen=True)
class TokenInfo:
    """The tokens of one call.

    Attributes:
        positions: int64 [B, T], or [1, T] when they are the same in all rows.
        past: Columns of the earlier calls, padding included.
        dtype: Of the activations.
        valid: bool [B, T], False at padding; None when there was no mask.
        resets: bool [B, T], True where a document begins that is not the row's first; None when the
            call said nothing of documents.
        record: int64 [B, 3] after this call: tokens seen, next position, last segment.
        latest: int64 [B, T], the column of the last valid token up to each (itself, if valid), -1
            before the first; None when there was no mask.
    """

    positions: Tensor
    past: int
    dtype: torch.dtype
    valid: Tensor | None
    resets: Tensor | None
    record: Tensor
    latest: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.record.device

    @property
    def shape(self) -> tuple[int, int]:
        """B, T."""
        return self.record.shape[0], self.positions.shape[1]


def describe_tokens(
    hidden: Tensor,
    *,
    attention_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    record: Tensor | None = None,
    past: int = 0,
) -> TokenInfo:
    """Work out validity, document starts and positions of the tokens of one call.

    A document begins where the segment id differs from that of the valid token before, or where the
    position id is not greater than the one before. Padding has no say in either.

    Args:
        hidden: The tokens' activations [B, T, d], or anything else of theirs that begins so.
        attention_mask: 0/1 [B, T], or [B, past + T] of which the last T columns count.
        segment_ids: int [B, T]; a call without them goes on with the row's segment.
        position_ids: int [B, T] or [1, T]; a document's own count from 0 when None.
        record: int64 [B, 3] from the cache; a fresh row when None.
        past: Columns of the earlier calls, padding included.

    Raises:
        ValueError: A tensor of another shape.
    """
    length, device = hidden.shape[1], hidden.device
    shape = (hidden.shape[0], length)
    valid = _last_columns(attention_mask, shape, past)
    segment_ids = _fit("segment_ids", segment_ids, shape)
    position_ids = _fit("position_ids", position_ids, shape)
    fresh = record is None
    known = torch.zeros(shape[0], 3, dtype=torch.int64, device=device) if record is None else record
    if valid is None and segment_ids is None and position_ids is None:
        steps = torch.arange(length, device=device)[None]
        positions = steps if fresh else known[:, NEXT_POSITION, None] + steps
        known = torch.cat((known[:, :SEGMENT] + length, known[:, SEGMENT:]), dim=1)
        return TokenInfo(positions, past, hidden.dtype, None, None, known)
    present = torch.ones(shape, dtype=torch.bool, device=device) if valid is None else valid
    index = torch.where(present, torch.arange(length, device=device), -1)
    latest = index.cummax(1).values  # of the last valid token up to here, -1 before the first
    previous = torch.cat((torch.full_like(latest[:, :1], -1), latest[:, :-1]), dim=1)
    begun = (previous >= 0) | (known[:, None, SEEN] > 0)  # something valid came before

    resets: Tensor | None = None
    if segment_ids is not None:
        resets = segment_ids != _pick(segment_ids, previous, known[:, SEGMENT])
    if position_ids is not None:
        back = position_ids <= _pick(position_ids, previous, known[:, NEXT_POSITION] - 1)
        resets = back if resets is None else resets | back
    if resets is not None:
        resets = resets & present & begun

    count = present.cumsum(1)
    if position_ids is not None:
        positions = position_ids
    else:
        positions = count - 1 + known[:, None, NEXT_POSITION]
        if resets is not None:  # a document counts its own tokens from 0
            begin = torch.where(resets, count, 0).cummax(1).values
            positions = torch.where(begin > 0, count - begin, positions)

    last = latest[:, -1:]
    seen, segment = known[:, SEEN] + count[:, -1], known[:, SEGMENT]
    next_position = _pick(positions + 1, last, known[:, NEXT_POSITION])[:, 0]
    if segment_ids is not None:
        segment = _pick(segment_ids, last, segment)[:, 0]
    known = torch.stack((seen, next_position, segment), dim=1)
    latest_valid = None if valid is None else latest
    return TokenInfo(positions, past, hidden.dtype, valid, resets, known, latest_valid)


def repeat_at_padding(hidden: Tensor, latest: Tensor, before: Tensor | None) -> Tensor:
    """Outputs at padding are those of the token before it: generate reads on from the last column.

    hidden [B, T, d]; before [B, d] is each row's last output in an earlier call.
    """
    if hidden.shape[1] > 1:
        hidden = hidden.gather(1, latest.clamp(min=0)[..., None].expand_as(hidden))
    if before is None:
        return hidden
    return torch.where(latest[..., None] < 0, before[:, None], hidden)


def _last_columns(mask: Tensor | None, shape: tuple[int, int], past: int) -> Tensor | None:
    if mask is None:
        return None
    batch, length = shape
    if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] not in (length, past + length):
        wanted = f"[{batch}, {length}]"
        if past:
            wanted += f" or [{batch}, {past + length}] (cached tokens included)"
        raise ValueError(
            f"attention_mask {list(mask.shape)} must be {wanted}, 1 at tokens, 0 at padding"
        )
    return mask[:, mask.shape[1] - length :].bool()


def _fit(name: str, ids: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
    if ids is None:
        return None
    if ids.dim() != 2 or ids.shape[0] not in (1, shape[0]) or ids.shape[1] != shape[1]:
        raise ValueError(f"{name} {list(ids.shape)} must be {list(shape)}, one id for each token")
    return ids.expand(shape).to(torch.int64)


def _pick(values: Tensor, index: Tensor, otherwise: Tensor) -> Tensor:
    """values [B, T] at index [B, n], or ``otherwise`` [B] where the index is -1."""
    picked = values.expand(index.shape[0], -1).gather(1, index.clamp(min=0))
    return torch.where(index >= 0, picked, otherwise[:, None])
