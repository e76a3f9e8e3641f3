"""The training objective: cross entropy of the next token of the same document."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .sequence import describe_tokens

IGNORE_INDEX = -100


def causal_lm_loss(
    logits: Tensor, targets: Tensor, num_items: Tensor | int | None = None
) -> Tensor:
    """Cross entropy in nats per target, in at least float32.

    Args:
        logits: [B, T, vocab_size].
        targets: int64 [B, T], -100 to ignore.
        num_items: What the sum is divided by; the number of targets when None (0 without any).
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
    if num_items is None:
        num_items = (targets != IGNORE_INDEX).sum().clamp(min=1)
    elif isinstance(num_items, Tensor):
        num_items = num_items.to(total.device)
    return total / num_items


def shift_targets(
    labels: Tensor,
    attention_mask: Tensor | None,
    segment_ids: Tensor | None,
    position_ids: Tensor | None,
) -> Tensor:
    """Targets for each position: the next label, where that continues the same document.

    Args:
        labels: int64 [B, T], -100 to ignore.
        attention_mask, segment_ids, position_ids: As the model got them.

    Returns:
        int64 [B, T]; -100 where the next token begins another document, or either is padding.
    """
    tokens = describe_tokens(
        labels.shape[0],
        labels.shape[1],
        labels.device,
        attention_mask=None if attention_mask is None else attention_mask[:, -labels.shape[1] :],
        segment_ids=segment_ids,
        position_ids=position_ids,
    )
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    broken = torch.zeros_like(labels, dtype=torch.bool)
    if tokens.resets is not None:
        broken = broken | tokens.resets.roll(-1, dims=1)
    if tokens.valid is not None:
        broken = broken | ~tokens.valid | ~tokens.valid.roll(-1, dims=1)
    return targets.masked_fill(broken, IGNORE_INDEX)
