"""Decay: each head's, and over time between tokens and between the tokens and edges of chunks.

Heads' decays are fixed numbers, never parameters. They are close to 1 (1 - 2^-9 and nearer), where
bfloat16 knows nothing but 1.0. So they are kept as logarithms, computed in float64 inside every
forward pass, and no cast of the model reaches them.

Time counts the valid tokens of a row; a document's number tells what may see what. Both are plain
integers, so the same few functions serve padding, packed documents and plain rows.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

DECAY_SCHEDULES = ("paper", "log_linear")


def head_log_decay(
    decay: str | float, num_heads: int, device: torch.device | str | None = None
) -> Tensor:
    """The natural logarithm of each head's decay.

    Args:
        decay: ``"paper"``: 1 - 2^(-5-h) for head h (arXiv 2307.08621, section 2.1 equation 8);
            ``"log_linear"``: 1 - exp(linspace(ln 1/32, ln 1/512, H)), the schedule of the paper's
            experiments; a number in (0, 1]: the same decay for all heads (1 is no decay).

    Returns:
        float64 [H] (float32 where the device has no float64).
    """
    wide = torch.float32 if torch.device(device or "cpu").type == "mps" else torch.float64
    if isinstance(decay, str):
        if decay == "paper":
            forget = torch.exp2(-5.0 - torch.arange(num_heads, dtype=wide, device=device))
        elif decay == "log_linear":
            ends = math.log(1 / 32), math.log(1 / 512)
            forget = torch.linspace(*ends, num_heads, dtype=wide, device=device).exp()
        else:
            raise ValueError(
                f"decay ({decay!r}) must be one of {DECAY_SCHEDULES}, or a number in (0, 1]"
            )
        return torch.log1p(-forget)  # log(1 - x) would lose x below 2^-24 in float32
    return torch.full((num_heads,), math.log(decay), dtype=wide, device=device)


def head_windows(decay: str | float, num_heads: int) -> list[float]:
    """How far each head looks back: 1 / (1 - decay) tokens, infinite without decay."""
    forget = -torch.expm1(head_log_decay(decay, num_heads))
    return [1 / f if f > 0 else math.inf for f in forget.tolist()]


def clock(
    length: int, device: torch.device, valid: Tensor | None, resets: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """How many valid tokens there are up to each token, itself included, and its document's number.

    Time is int64 [B, T], or [1, T] when nothing is padding; document int64 [B, T], or None when all
    belongs to one.
    """
    tokens = torch.arange(1, length + 1, device=device)[None] if valid is None else valid.cumsum(1)
    return tokens, None if resets is None else resets.cumsum(1)


def decay_between(
    log_decay: Tensor,
    later: Tensor,
    earlier: Tensor,
    later_document: Tensor | None,
    earlier_document: Tensor | None,
) -> Tensor:
    """g_h^(later - earlier) for each head, 0 between different documents.

    The times (and documents) are [B or 1, ...] and broadcast; the result has the heads at dim 1.
    """
    span = (later - earlier).clamp(min=0)  # below 0 only where the keys are 0: keep it finite there
    log_decay = log_decay.view(-1, *[1] * (span.dim() - 1))
    decay = (span[:, None].to(log_decay.dtype) * log_decay).exp()
    if later_document is None or earlier_document is None:
        return decay
    same = later_document == earlier_document
    return decay * same[:, None]


def decay_matrix(log_decay: Tensor, time: Tensor, document: Tensor | None) -> Tensor:
    """D of equation 5: [B or 1, H, ..., n, m] from times [B or 1, ..., n]; causal by index."""
    document_n = None if document is None else document[..., :, None]
    document_m = None if document is None else document[..., None, :]
    decay = decay_between(log_decay, time[..., :, None], time[..., None, :], document_n, document_m)
    return decay.tril()


class ChunkDecays(NamedTuple):
    """The decays that N chunks of C tokens need.

    Attributes:
        inside: [B or 1, H, N or 1, C, C], from token to token of a chunk, 0 above the diagonal.
        same: bool [B, 1, N, C, C] where the two are of one document, if that is not in ``inside``.
        to_end: [B or 1, H, N, C, 1], from each token to its chunk's end.
        since_start: [B or 1, H, N, C, 1], from the chunk's start to each token.
        between: [B or 1, H, N + 1, N], from each chunk's end to the N + 1 edges: the start of each
            chunk and the end of the last; 0 to earlier edges.
        from_start: [B or 1, H, N + 1, 1], from the first edge to each.
    """

    inside: Tensor
    same: Tensor | None
    to_end: Tensor
    since_start: Tensor
    between: Tensor
    from_start: Tensor

    def within(self, dtype: torch.dtype) -> "ChunkDecays":
        """With those inside of the chunks in a type of their own."""
        if self.inside.dtype == dtype:
            return self
        names = ("inside", "to_end", "since_start")
        return self._replace(**{name: getattr(self, name).to(dtype) for name in names})


def chunk_decays(
    log_decay: Tensor, length: int, chunk_size: int, valid: Tensor | None, resets: Tensor | None
) -> ChunkDecays:
    """``ChunkDecays`` of T tokens in chunks of C <= T; the last chunk may be short.

    log_decay is ln g [H], its dtype and device are the result's; valid and resets are bool [B, T],
    as ``retention_recurrent`` takes them.
    """
    num_chunks = -(-length // chunk_size)
    time, document = clock(length, log_decay.device, valid, resets)
    edges = _edges(time, chunk_size)
    edge_documents = None if document is None else _edges(document, chunk_size)
    padding = num_chunks * chunk_size - length
    if padding:  # tokens that add nothing
        time = F.pad(time, (0, padding), value=length)
        document = None if document is None else F.pad(document, (0, padding), value=-1)
    time = time.unflatten(1, (num_chunks, chunk_size))  # [B or 1, N, C]
    document = None if document is None else document.unflatten(1, (num_chunks, chunk_size))
    starts, ends = edges[:, :-1, None], edges[:, 1:, None]
    start_documents = end_documents = first = same = None
    if document is not None and edge_documents is not None:
        start_documents, end_documents = edge_documents[:, :-1, None], edge_documents[:, 1:, None]
        first = edge_documents[:, :1]
    to_end = decay_between(log_decay, ends, time, end_documents, document)
    since_start = decay_between(log_decay, time, starts, document, start_documents)
    if valid is None:  # all chunks have the same decays: one [C, C] matrix serves them
        inside = decay_matrix(log_decay, time[:, :1], None)
        if document is not None:
            same = (document[..., :, None] == document[..., None, :])[:, None]
    else:
        inside = decay_matrix(log_decay, time, document)
    between = decay_matrix(log_decay, edges, edge_documents)[..., 1:].tril(-1)
    from_start = decay_between(log_decay, edges, edges[:, :1], edge_documents, first)
    return ChunkDecays(
        inside, same, to_end[..., None], since_start[..., None], between, from_start[..., None]
    )


def _edges(x: Tensor, chunk_size: int) -> Tensor:
    """[B or 1, T] at the N + 1 edges of chunks: 0 before the first, then at each one's end."""
    ends = x[:, chunk_size - 1 : -1 : chunk_size]
    return torch.cat((torch.zeros_like(x[:, :1]), ends, x[:, -1:]), dim=1)
