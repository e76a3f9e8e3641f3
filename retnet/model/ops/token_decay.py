"""Decays that differ from token to token, for the chunks of retention.

With c the running sum of ln g inside a chunk, what lies between token m and token n >= m is
exp(c_n - c_m): small sums, so that a float32 keeps their digits however long the text is. Sums over
chunks are taken in float64. Everything is masked before exp, so nothing overflows on the way.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .decay import ChunkDecays


def token_chunk_decays(
    log_decay: Tensor, chunk_size: int, valid: Tensor | None, resets: Tensor | None
) -> ChunkDecays:
    """``ChunkDecays`` of T tokens in chunks of C <= T; the last chunk may be short.

    Args:
        log_decay: ln g [B, H, T], at most 0; the decay at a token applies to the state before it.
        valid, resets: bool [B, T], as ``retention_recurrent`` takes them.
    """
    if valid is not None:
        log_decay = log_decay.masked_fill(~valid[:, None], 0)
    chunks = _in_chunks(log_decay, chunk_size, 0)
    since_start = chunks.cumsum(-1)  # [B, H, N, C]
    total = since_start[..., -1]
    to_end = total[..., None] - since_start
    lower = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=log_decay.device).tril()
    wide = total.dtype if total.device.type == "mps" else torch.float64
    edges = F.pad(total.to(wide).cumsum(-1), (1, 0))  # [B, H, N + 1]
    later = torch.ones(edges.shape[2], edges.shape[2], dtype=torch.bool, device=edges.device).tril()
    allowed: dict[str, Tensor] = {"inside": lower, "between": later}
    if resets is not None:
        document = _in_chunks(resets.cumsum(1)[:, None], chunk_size, -1)  # [B, 1, N, C]
        allowed = _same_document(document, lower, later)
    inside = since_start[..., :, None] - since_start[..., None, :]
    between = edges[..., :, None] - edges[..., None, :]
    between = _exp(between, allowed["between"]).to(log_decay.dtype)[..., 1:].tril(-1)
    return ChunkDecays(
        inside=_exp(inside, allowed["inside"]),
        same=None,
        to_end=_exp(to_end, allowed.get("to_end"))[..., None],
        since_start=_exp(since_start, allowed.get("since_start"))[..., None],
        between=between,
        from_start=_exp(edges, allowed.get("from_start")).to(log_decay.dtype)[..., None],
    )


def _in_chunks(x: Tensor, chunk_size: int, filling: int) -> Tensor:
    """[B, H, T] -> [B, H, N, C]."""
    return F.pad(x, (0, -x.shape[2] % chunk_size), value=filling).unflatten(2, (-1, chunk_size))


def _same_document(document: Tensor, lower: Tensor, later: Tensor) -> dict[str, Tensor]:
    """What each kind of decay may connect: the numbers of documents [B, 1, N, C] must be equal.

    Tokens that fill up the last chunk have the number -1; the chunk ends with the last real one.
    """
    ends = document.amax(-1)  # numbers rise
    edges = F.pad(ends, (1, 0))  # the document before the first token has the number 0
    return {
        "inside": lower & (document[..., :, None] == document[..., None, :]),
        "between": later & (edges[..., :, None] == edges[..., None, :]),
        "to_end": document == ends[..., None],
        "since_start": document == edges[..., :-1, None],
        "from_start": edges == 0,
    }


def _exp(log_decay: Tensor, allowed: Tensor | None) -> Tensor:
    """exp where it is allowed, else 0."""
    if allowed is not None:
        log_decay = log_decay.masked_fill(~allowed, -torch.inf)
    return log_decay.exp()
