"""Retention (arXiv 2307.08621, section 2.1) in its three forms, as pure functions.

Symbols: B batch, T time, H heads, K key dim, V value dim, C chunk; g_h the decay of head h.

    recurrent    S_n = g S_{n-1} + k_n^T v_n;   o_n = q_n S_n                         (equation 6)
    parallel     O = (Q K^T * D) V,   D_nm = g^(n-m) for n >= m, else 0                (equation 5)
    chunkwise    parallel inside chunks, a state [K, V] between them                   (equation 7)

All three take any T >= 1 and an initial state, and return the outputs and the state after the last
token. They agree in outputs, states and gradients; ``retention_recurrent`` is the definition, the
others are tested against it.

Two optional tensors describe batches that are more than one text per row:

    valid  bool [B, T]   False: padding. It adds nothing to the state, and does not count as time.
    resets bool [B, T]   True: the first token of a new document; the state is cleared before it.

The scores are not normalised: the paper's normalisations cancel in the head norm, but only as its
eps goes to 0, and make the three forms disagree. Instead everything is computed in float32 (float64
for float64 inputs) whatever the dtype of q, k and v; out and state come in that dtype.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .chunkwise import ChunkRetention, mix_chunks
from .decay import chunk_decays, clock, decay_between, decay_matrix
from .precision import in_full_precision, wide_dtype
from .scan import Outputs
from .token_decay import token_chunk_decays

CHUNKS_PER_SPAN, MOST_CHUNKS_PER_SPAN = 8, 32
TOKENS_PER_SPAN = 2048  # of all rows


@in_full_precision
def retention_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    initial_state: Tensor | None = None,
    valid: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Retention token by token: O(1) memory and time per token.

    Args:
        q, k: [B, H, T, K].
        v: [B, H, T, V].
        log_decay: ln g [H]; or [B, H, T], of each token its own, which applies to the state before
            it (gated retention).
        initial_state: [B, H, K, V]; zeros when None.
        valid, resets: bool [B, T], see above; no padding, no new document when None.

    Returns:
        out [B, H, T, V] and the state after the last token [B, H, K, V], both float32 (float64 for
        float64 inputs).

    Raises:
        ValueError: Shapes that do not fit together.
    """
    q, k, v, log_decay, state, resets = _promote(q, k, v, log_decay, initial_state, valid, resets)
    decay = log_decay.exp() if log_decay.dim() == 3 else log_decay.exp()[None, :, None]
    if valid is not None:
        decay = torch.where(valid[:, None], decay, 1.0)
    if resets is not None:
        decay = torch.where(resets[:, None], 0.0, decay)
    decay = decay.expand(-1, -1, q.shape[2])[..., None, None]  # [B or 1, H, T, 1, 1]
    outputs = Outputs(q.shape[2])
    for t in range(q.shape[2]):
        state = decay[:, :, t] * state + k[:, :, t, :, None] * v[:, :, t, None, :]
        outputs.add(q[:, :, t, None, :] @ state)
    return outputs.whole(), state


@in_full_precision
def retention_parallel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    initial_state: Tensor | None = None,
    valid: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Retention over all pairs of tokens at once: O(T^2) time and memory.

    Arguments, results and errors as in ``retention_recurrent``.
    """
    q, k, v, log_decay, carried, resets = _promote(q, k, v, log_decay, initial_state, valid, resets)
    if log_decay.dim() == 3:  # one chunk
        decays = token_chunk_decays(log_decay, q.shape[2], valid, resets)
        q, k, v = (x[:, :, None] for x in (q, k, v))
        out, state, _ = mix_chunks(q, k, v, carried, decays)
        return out[:, :, 0], state
    time, document = clock(q.shape[2], q.device, valid, resets)
    out = (q @ k.mT * decay_matrix(log_decay, time, document)) @ v
    last_time = time[:, -1:]
    last_document = None if document is None else document[:, -1:]
    to_end = decay_between(log_decay, last_time, time, last_document, document)
    state = (k * to_end[..., None]).mT @ v
    if initial_state is not None:
        start = torch.zeros_like(time[:, :1])
        first = None if document is None else torch.zeros_like(document[:, :1])
        from_start = decay_between(log_decay, time, start, document, first)
        out = out + (q * from_start[..., None]) @ carried
        state = state + from_start[:, :, -1, None, None] * carried
    return out, state


@in_full_precision
def retention_chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    chunk_size: int,
    initial_state: Tensor | None = None,
    valid: Tensor | None = None,
    resets: Tensor | None = None,
    products: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Retention in chunks of C tokens: O(T C) time, memory linear in T, nothing of size T x T.

    Arguments, results and errors as in ``retention_recurrent``; ``chunk_size`` is C >= 1 and may be
    larger than T or not divide it. The operands of its products, and ``out``, have the type
    ``products`` (None: float32, or float64 for inputs of that), decays and states never.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size ({chunk_size}) must be at least 1")
    q, k, v, log_decay, state, resets = _promote(
        q, k, v, log_decay, initial_state, valid, resets, products
    )
    rows, length = q.shape[0], q.shape[2]
    chunk_size = min(chunk_size, length)
    size = _span(chunk_size, rows)
    decays, outputs = None, []
    # split, because each slice of its own would get a gradient of the whole text's size; tokens
    # before heads, as projections have them, so that putting together copies into that layout
    spans = zip(*(x.transpose(1, 2).split(size, dim=1) for x in (q, k, v)), strict=True)
    for index, parts in enumerate(spans):
        cut = slice(index * size, index * size + parts[0].shape[1])
        flags = [None if x is None else x[:, cut] for x in (valid, resets)]
        if log_decay.dim() == 3:
            decays = token_chunk_decays(log_decay[:, :, cut], chunk_size, *flags)
        elif valid is not None or resets is not None or decays is None or cut.stop == length:
            decays = chunk_decays(log_decay, cut.stop - cut.start, chunk_size, *flags)
        own_q, own_k, own_v = (_chunks(x.transpose(1, 2), chunk_size) for x in parts)
        if log_decay.requires_grad or torch.compiler.is_compiling():  # autograd, or the compiler
            out, state, _ = mix_chunks(own_q, own_k, own_v, state, decays)
        else:
            out, state, _ = ChunkRetention.apply(own_q, own_k, own_v, state, *decays)
        outputs.append(out.flatten(2, 3)[:, :, : cut.stop - cut.start].transpose(1, 2))
    return torch.cat(outputs, dim=1).transpose(1, 2), state


def _span(chunk_size: int, rows: int) -> int:
    """Tokens whose chunks' states are combined by one matrix product.

    Longer texts go on span by span, so that cost and memory of that product stay linear in T. Few
    rows are worth a longer span, many make one of that many tokens large enough.
    """
    chunks = TOKENS_PER_SPAN // max(1, chunk_size * rows)
    return chunk_size * min(max(chunks, CHUNKS_PER_SPAN), MOST_CHUNKS_PER_SPAN)


def _chunks(x: Tensor, chunk_size: int) -> Tensor:
    """[B, H, T, D] -> [B, H, N, C, D], the last chunk filled up with tokens that add nothing."""
    short = -x.shape[2] % chunk_size
    x = F.pad(x, (0, 0, 0, short)) if short else x.contiguous()
    return x.unflatten(2, (-1, chunk_size))


def _promote(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None,
    valid: Tensor | None,
    resets: Tensor | None,
    products: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Check the shapes, widen to at least float32, and take padding out of keys and resets.

    The same arguments come back, but for ``valid``, and a state of zeros for None; q, k and v in
    the type ``products`` if that is given.
    """
    batch, heads, length, key_dim = q.shape
    if k.shape != q.shape or v.shape[:3] != q.shape[:3]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} must be [B, H, T, K], "
            "[B, H, T, K] and [B, H, T, V]"
        )
    if length == 0:
        raise ValueError(f"q {tuple(q.shape)} has no tokens: T must be at least 1")
    if log_decay.shape not in ((heads,), (batch, heads, length)):
        raise ValueError(
            f"log_decay {tuple(log_decay.shape)} must be [H] or [B, H, T], here [{heads}] or "
            f"{[batch, heads, length]}"
        )
    state_shape = (batch, heads, key_dim, v.shape[3])
    if initial_state is not None and initial_state.shape != state_shape:
        raise ValueError(f"initial_state {tuple(initial_state.shape)} must be {state_shape}")
    for name, flags in (("valid", valid), ("resets", resets)):
        if flags is not None and flags.shape != (batch, length):
            raise ValueError(f"{name} {tuple(flags.shape)} must be {(batch, length)}")
    dtype = wide_dtype(q.dtype)
    q, k, v = (x.to(products or dtype) for x in (q, k, v))
    log_decay = log_decay.to(dtype)
    state = log_decay.new_zeros(state_shape) if initial_state is None else initial_state.to(dtype)
    if valid is not None:
        k = k.masked_fill(~valid[:, None, :, None], 0)
        resets = None if resets is None else resets & valid
    return q, k, v, log_decay, state, resets
