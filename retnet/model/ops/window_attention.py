"""Softmax attention over the last n tokens of a document, with a state of constant size.

Query t sees the unmasked tokens t - n + 1 ... t of its document: a band. Blocks of c queries see
the n + c keys that end with their own, so no mask or score grows with the square of the text.

The state is a ring: the document's token i, counted from 0, is in slot i mod n until token i + n
takes its place. Softmax does not ask for an order, so what reads the ring leaves it as it lies.

Legend: B batch, H heads, T time, K head width, n window, F columns from the ring (0 or n).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]

LEAST_BLOCK = 64  # queries of a block; smaller ones cost more to start than to compute


def empty_ring(
    rows: int, heads: int, window: int, width: int, dtype: torch.dtype, device: torch.device
) -> State:
    """The state before the first token.

    ``keys``, ``values`` [B, H, n, K]; ``count`` int64 [B], tokens of the row's document so far.
    """
    shape = (rows, heads, window, width)
    state = {name: torch.zeros(shape, dtype=dtype, device=device) for name in ("keys", "values")}
    return state | {"count": torch.zeros(rows, dtype=torch.int64, device=device)}


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    *,
    initial_state: State | None = None,
    valid: Tensor | None = None,
    resets: Tensor | None = None,
    keep: bool = True,
) -> tuple[Tensor, State]:
    """Attention over the last ``window`` valid tokens of the same document, the own one included.

    Args:
        q, k, v: [B, H, T, K].
        initial_state: The ring of what came before; None where nothing did.
        valid: bool [B, T], False at padding, on any side or in between.
        resets: bool [B, T], True where a document begins that is not the row's first.
        keep: Whether to make the new ring; without, the state is empty.

    Returns:
        [B, H, T, K], of no meaning but finite at padding, and the state after the last token.
    """
    lengths: Tensor | int = q.shape[2]
    order = None
    if valid is not None:  # the valid tokens side by side, padding after them
        order = valid.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
        lengths = valid.sum(1)
        q, k, v = (_columns(x, order) for x in (q, k, v))
        resets = None if resets is None else resets.gather(1, order)
    document = None if resets is None else resets.cumsum(1)

    keys, values, documents = k, v, document
    if initial_state is not None:
        front_keys, front_values, shown = in_order(initial_state)
        keys = torch.cat((front_keys.to(k.dtype), k), 2)
        values = torch.cat((front_values.to(v.dtype), v), 2)
        own = k.new_zeros(k.shape[0], k.shape[2], dtype=torch.int64)
        own = own if document is None else document
        documents = torch.cat((shown.to(torch.int64) - 1, own), 1)  # -1 in empty slots
    out = banded_attention(q, keys, values, window, documents)
    if order is not None:
        out = _columns(out, order.argsort(dim=1))
    if not keep:
        return out, {}
    before = k.new_zeros(k.shape[0], dtype=torch.int64)
    before = before if initial_state is None else initial_state["count"]
    front = keys.shape[2] - k.shape[2]
    count = _count(before, lengths, document)
    return out, _ring(keys, values, front + lengths, count, window)


def window_attention_step(q: Tensor, k: Tensor, v: Tensor, state: State) -> Tensor:
    """One token per row, [B, H, 1, K] each, its key and value written into the ring in place."""
    window = state["keys"].shape[2]
    slot = (state["count"] % window)[:, None, None, None].expand_as(k)
    for name, x in (("keys", k), ("values", v)):
        state[name].scatter_(2, slot, x.to(state[name].dtype))
    state["count"] += 1
    filled = torch.arange(window, device=k.device) < state["count"][:, None]
    keys, values = state["keys"].to(q.dtype), state["values"].to(q.dtype)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=filled[:, None, None])


def in_order(ring: State) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values from the oldest to the newest, [B, H, n, K], and which there are [B, n]."""
    count, window = ring["count"][:, None], ring["keys"].shape[2]
    age = torch.arange(window, 0, -1, device=count.device)
    slot = (count - age) % window
    return _columns(ring["keys"], slot), _columns(ring["values"], slot), age <= count


def banded_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int, document: Tensor | None = None
) -> Tensor:
    """Each query with the last ``window`` columns up to its own, of the same document.

    Args:
        q: [B, H, T, K].
        k, v: [B, H, F + T, K]; the first F columns are before all queries.
        document: int [B, F + T], nondecreasing; negative in columns for nobody to see, all of which
            are among the first F. None: one document.

    Returns:
        [B, H, T, K].
    """
    length = q.shape[2]
    front = k.shape[2] - length
    exported = torch.compiler.is_exporting()  # for any length: one form, though masks are [T, T]
    if exported or length <= 2 * window:  # blocks would be no smaller
        if not exported and document is None and front == 0 and length <= window:
            return F.scaled_dot_product_attention(q, k, v, is_causal=length > 1)
        mask = band(length, front, window, q.device)[None]
        if document is not None:
            mask = mask & (document[:, None] == document[:, front:, None])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])

    rows, blocks = q.shape[0], -(-length // max(window, LEAST_BLOCK))
    size = -(-length // blocks)
    end = blocks * size - length
    if document is None:
        document = torch.zeros(1, front + length, dtype=torch.int64, device=q.device)
    document = F.pad(F.pad(document, (window - front, 0), value=-1), (0, end))
    own = document[:, window:].unflatten(1, (blocks, size))
    seen = document.unfold(1, window + size, size)
    mask = band(size, window, window, q.device) & (own[..., None] == seen[:, :, None])
    mask = mask.expand(rows, -1, -1, -1).flatten(0, 1)[:, None]  # [B * blocks, 1, c, n + c]

    q = F.pad(q, (0, 0, 0, end)).unflatten(2, (blocks, size)).transpose(1, 2).flatten(0, 1)
    k, v = (
        F.pad(x, (0, 0, window - front, end))
        .unfold(2, window + size, size)  # [B, H, blocks, K, n + c]
        .permute(0, 2, 1, 4, 3)
        .flatten(0, 1)
        for x in (k, v)
    )
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.unflatten(0, (rows, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :length]


def band(length: int, front: int, window: int, device: torch.device) -> Tensor:
    """bool [T, F + T]: which columns are among the last ``window`` of a query, column F + t."""
    query = torch.arange(front, front + length, device=device)[:, None]
    age = query - torch.arange(front + length, device=device)
    return (age >= 0) & (age < window)


def _count(before: Tensor, lengths: Tensor | int, document: Tensor | None) -> Tensor:
    """Tokens of each row's last document, after ``lengths`` valid columns of ``document``."""
    if document is None:
        return before + lengths
    column = torch.arange(document.shape[1], device=document.device)
    limit = lengths[:, None] if isinstance(lengths, Tensor) else lengths
    last = document[:, -1:]
    new = ((document == last) & (column < limit)).sum(1)
    return torch.where(last[:, 0] > 0, new, before + new)


def _ring(keys: Tensor, values: Tensor, ends: Tensor | int, count: Tensor, window: int) -> State:
    """The ring of documents of ``count`` [B] tokens that end before column ``ends`` [B]."""
    newest = count[:, None] - 1
    slot = torch.arange(window, device=keys.device)
    age = (newest - slot) % window  # 0 of the newest token
    ends = ends[:, None] if isinstance(ends, Tensor) else ends
    column = (ends - 1 - age).clamp(min=0)
    there = (age <= newest)[:, None, :, None]
    state = {"keys": _columns(keys, column), "values": _columns(values, column)}
    return {name: torch.where(there, x, 0.0) for name, x in state.items()} | {"count": count}


def _columns(x: Tensor, index: Tensor) -> Tensor:
    """x [B, H, T, K] at the columns [B, N]: [B, H, N, K]."""
    index = index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    return x.gather(2, index)
