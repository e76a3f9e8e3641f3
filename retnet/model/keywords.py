"""Keywords that libraries hand to every model: honoured, harmless or refused, never swallowed."""

from typing import Any

import torch
from torch import Tensor

from .outputs import NAMES

# What is said already by the others, or has no meaning for any model here.
HARMLESS = {
    "max_length_q", "max_length_k",  # of a packed row's longest document: its boundaries say it
    "token_type_ids",  # tokenizers make them for every model
}  # fmt: skip
CUMULATIVE = ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k")


def one_memory(past_key_values: Any, cache: Any) -> Any:
    """The memory, by whichever of its names it was given."""
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise TypeError(f"{' and '.join(NAMES)} are two names of one memory: give one of them")
    return cache if past_key_values is None else past_key_values


def packed_segments(
    keywords: dict[str, Any], segment_ids: Tensor | None, shape: torch.Size, past: int
) -> Tensor | None:
    """Segment ids [B, T] that also begin a document where packed batches' own keywords do.

    Takes out of ``keywords``: ``seq_idx`` [B, T], which changes from document to document;
    ``cu_seqlens``, ``cu_seq_lens_q`` and ``_k`` [documents + 1], 0 and the columns where documents
    end, of the only row. ``past`` are the columns of earlier calls.

    Raises:
        ValueError: A tensor of another shape; or there were earlier calls, whose last document
            such a count of columns can't go on with.
    """
    ids = [] if segment_ids is None else [segment_ids]
    counted = [name for name in CUMULATIVE if keywords.get(name) is not None]
    if past and counted:
        raise ValueError(
            f"{counted[0]} counts this call's columns, and past_key_values holds {past} of earlier "
            "calls: give segment_ids instead"
        )
    seq_idx = keywords.pop("seq_idx", None)
    if seq_idx is not None:
        if seq_idx.shape != shape:
            raise ValueError(f"seq_idx {list(seq_idx.shape)} must be {list(shape)}")
        ids.append(seq_idx)
    for name in CUMULATIVE:
        ends = keywords.pop(name, None)
        if ends is None:
            continue
        if ends.dim() != 1 or len(ends) < 2 or shape[0] != 1:
            raise ValueError(
                f"{name} {list(ends.shape)} must be [documents + 1], for a batch of one packed row "
                f"(this one is {list(shape)})"
            )
        columns = torch.arange(shape[1], device=ends.device)
        ids.append(torch.searchsorted(ends[1:].contiguous(), columns, right=True)[None])
    if len(ids) <= 1:
        return ids[0] if ids else None
    changed = torch.zeros(shape, dtype=torch.bool, device=ids[0].device)
    for own in ids:
        changed[:, 1:] |= own[:, 1:] != own[:, :-1]
    return changed.cumsum(1)


def refuse(keywords: dict[str, Any]) -> None:
    """Raise for a keyword that is not known, so that no request goes unheard.

    Raises:
        TypeError: One that is not None.
        ValueError: Attention weights are asked for.
    """
    if keywords.pop("output_attentions", None):
        raise ValueError("output_attentions (True) is not available: no form computes them all")
    unknown = [key for key, x in keywords.items() if x is not None and key not in HARMLESS]
    if unknown:
        raise TypeError(f"forward has no keyword {', '.join(map(repr, unknown))}: leave it out")
