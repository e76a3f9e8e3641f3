"""FAVOR+, the attention of the Performer (arXiv 2009.14794), in three forms, as pure functions.

Symbols: B batch, T time, H heads, D key dim, M value dim, m random features, C chunk; W [m, D].

    x' = x D^(-1/4);   e(x) = W x' - |x'|^2 / 2;   phi(x) = exp(e(x))                   (lemma 1)
    o_t = phi(q_t) S_t / (phi(q_t) z_t);   [S, z]_t = sum_{s <= t} phi(k_s)^T [v_s, 1]

(phi's factor m^(-1/2) cancels in the quotient.) The exponents may be hundreds, so queries are
divided by their largest feature, which cancels; keys, as long as nothing is added, may be divided
by anything that is the same for all that a query sees. Public codes take the largest of all time
and add an eps: then what is early depends on what comes later. Here it is a running maximum:

    mu_s = max_f e_f(k_s);   f_s = exp(e(k_s) - mu_s);   M_t = max(M_{t-1}, mu_t)
    recurrent   S_t = exp(M_{t-1} - M_t) S_{t-1} + exp(mu_t - M_t) f_t^T [v_t, 1]
    parallel    A_ts = (phi(q_t) f_s) exp(mu_s - M_t) for s <= t, else 0;   O = A [V, 1]
    chunkwise   parallel inside chunks, a state [m, M + 1] and a maximum between them

all factors at most 1, where retention has its decays (``chunkwise.py`` does both). Maxima are a
choice of scale, which no output depends on: they are constants, without gradients.

Two optional flags as in ``retention.py``: ``valid`` bool [B, T], False for padding, and ``resets``
bool [B, T], True for the first token of a new document. All is computed in float32 or wider.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .chunkwise import ChunkRetention, mix_chunks
from .decay import ChunkDecays
from .linear_attention import with_ones
from .precision import in_full_precision, wide_dtype
from .random_features import LOWEST, key_features, query_features
from .scan import Outputs

CHUNKS_PER_SPAN = 8


class FavorState(NamedTuple):
    """What is known of the tokens so far.

    Attributes:
        sums: sum_s exp(e(k_s) - maximum)^T [v_s, 1], [B, H, m, M + 1].
        maximum: The largest exponent of the keys so far, [B, H].
    """

    sums: Tensor
    maximum: Tensor


def favor_state(
    batch: int,
    heads: int,
    features: int,
    value_dim: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> FavorState:
    """The state before the first token, in at least float32."""
    dtype = wide_dtype(dtype)
    sums = torch.zeros(batch, heads, features, value_dim + 1, device=device, dtype=dtype)
    return FavorState(sums, torch.full((batch, heads), LOWEST, device=device, dtype=dtype))


@in_full_precision
def favor_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    *,
    initial_state: FavorState | None = None,
    valid: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, FavorState]:
    """FAVOR+ token by token: O(1) memory and time per token.

    Args:
        q, k: [B, H, T, D], not scaled.
        v: [B, H, T, M].
        projection: W [m, D], of all heads.
        initial_state: sums [B, H, m, M + 1] and maximum [B, H]; ``favor_state`` when None.
        valid, resets: bool [B, T], see above; no padding, no new document when None.

    Returns:
        out [B, H, T, M] and the state after the last token, float32 (float64 for float64 inputs).

    Raises:
        ValueError: Shapes that do not fit together.
    """
    q, k, v, projection, state, resets = _promote(q, k, v, projection, initial_state, valid, resets)
    sums, maximum = state
    queries = query_features(q, projection)
    keys, peaks = key_features(k, projection, valid)
    v = with_ones(v)
    outputs = Outputs(q.shape[2])
    for t in range(q.shape[2]):
        if resets is not None:
            fresh = resets[:, t, None]  # [B, 1]
            sums = torch.where(fresh[..., None, None], 0.0, sums)
            maximum = torch.where(fresh, LOWEST, maximum)
        before, maximum = maximum, torch.maximum(maximum, peaks[:, :, t])
        kept, own = (x.sub(maximum).exp()[..., None] for x in (before, peaks[:, :, t]))
        key = own * keys[:, :, t]  # [B, H, m]
        sums = torch.addcmul(kept[..., None] * sums, key[..., None], v[:, :, t, None, :])
        outputs.add(queries[:, :, t, None, :] @ sums)
    return quotient(outputs.whole()), FavorState(sums, maximum)


@in_full_precision
def favor_parallel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    *,
    initial_state: FavorState | None = None,
    valid: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, FavorState]:
    """FAVOR+ over all pairs of tokens at once: O(T^2) time and memory.

    Arguments, results and errors as in ``favor_recurrent``.
    """
    q, k, v, projection, state, resets = _promote(q, k, v, projection, initial_state, valid, resets)
    return _span(q, k, v, projection, state, valid, resets, chunk_size=q.shape[2])


@in_full_precision
def favor_chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    *,
    chunk_size: int,
    initial_state: FavorState | None = None,
    valid: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, FavorState]:
    """FAVOR+ in chunks of C tokens: O(T (C + m)) time, memory linear in T, nothing of size T x T.

    Arguments, results and errors as in ``favor_recurrent``; ``chunk_size`` is C >= 1 and may be
    larger than T or not divide it.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size ({chunk_size}) must be at least 1")
    q, k, v, projection, state, resets = _promote(q, k, v, projection, initial_state, valid, resets)
    batch, _, length, _ = q.shape
    chunk_size = min(chunk_size, length)
    short = -length % chunk_size
    if short:  # fill up the last chunk with padding
        q, k, v = (F.pad(x, (0, 0, 0, short)) for x in (q, k, v))
        valid = q.new_ones(batch, length, dtype=torch.bool) if valid is None else valid
        valid, resets = (None if x is None else F.pad(x, (0, short)) for x in (valid, resets))
    size = chunk_size * CHUNKS_PER_SPAN
    outputs = []
    # split, because each slice of its own would get a gradient of the whole text's size; tokens
    # before heads, as projections have them, so that putting together copies into that layout
    for index, (own_q, own_k, own_v) in enumerate(
        zip(*(x.split(size, dim=2) for x in (q, k, v)), strict=True)
    ):
        cut = slice(index * size, index * size + size)
        own_valid, own_resets = (None if x is None else x[:, cut] for x in (valid, resets))
        out, state = _span(
            own_q, own_k, own_v, projection, state, own_valid, own_resets, chunk_size
        )
        outputs.append(out.transpose(1, 2))
    return torch.cat(outputs, dim=1)[:, :length].transpose(1, 2), state


def _span(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    state: FavorState,
    valid: Tensor | None,
    resets: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, FavorState]:
    """FAVOR+ of N chunks at once, whose states are combined by one matrix product."""
    queries = query_features(q, projection)
    keys, peaks = key_features(k, projection, valid)
    maxima = running_maximum(peaks, state.maximum, resets)
    decays = _decays(peaks, maxima, state.maximum, resets, chunk_size)
    queries, keys, values = (
        x.unflatten(2, (-1, chunk_size)) for x in (queries, keys, with_ones(v))
    )
    if torch.compiler.is_compiling():
        out, sums, _ = mix_chunks(queries, keys, values, state.sums, decays)
    else:
        out, sums, _ = ChunkRetention.apply(queries, keys, values, state.sums, *decays)
    return quotient(out.flatten(2, 3)), FavorState(sums, maxima[:, :, -1].clone())


def running_maximum(values: Tensor, start: Tensor, resets: Tensor | None) -> Tensor:
    """The largest value so far, start included, since the last reset: [B, H, T].

    values [B, H, T], start [B, H], resets bool [B, T] or None.
    """
    values = torch.cat((start[..., None], values), dim=-1)
    if resets is None:
        return values.cummax(dim=-1).values[..., 1:]
    fresh = F.pad(resets, (1, 0))[:, None]  # whether there is a reset among the tokens looked at
    step = 1
    while step < values.shape[-1]:  # the maxima of 1, 2, 4, ... tokens
        earlier = F.pad(values[..., :-step], (step, 0), value=LOWEST)
        values = torch.where(fresh, values, torch.maximum(values, earlier))
        fresh = fresh | F.pad(fresh[..., :-step], (step, 0))
        step *= 2
    return values[..., 1:]


def _decays(
    peaks: Tensor, maxima: Tensor, start: Tensor, resets: Tensor | None, chunk_size: int
) -> ChunkDecays:
    """The factors from the scales of keys to those of queries and of the edges of chunks.

    peaks [B, H, T] are mu, maxima [B, H, T] are M, start [B, H] is M before the first; T is a
    multiple of C.
    """
    peaks, maxima = (x.unflatten(2, (-1, chunk_size)) for x in (peaks, maxima))  # [B, H, N, C]
    edges = torch.cat((start[..., None], maxima[..., -1]), dim=2)  # [B, H, N + 1]
    inside = _factor(maxima[..., :, None], peaks[..., None, :]).tril_()
    to_end = _factor(edges[..., 1:, None], peaks)
    since_start = _factor(maxima, edges[..., :-1, None])
    between = _factor(edges[..., :, None], edges[..., None, 1:]).tril_(-1)
    from_start = _factor(edges, edges[..., :1])
    same = None
    if resets is not None:
        document = resets.cumsum(1).unflatten(1, (-1, chunk_size))[:, None]  # [B, 1, N, C]
        ends = F.pad(document[..., -1], (1, 0))  # [B, 1, N + 1]
        same = document[..., :, None] == document[..., None, :]
        to_end = to_end * (ends[..., 1:, None] == document)
        since_start = since_start * (document == ends[..., :-1, None])
        between = between * (ends[..., :, None] == ends[..., None, 1:])
        from_start = from_start * (ends == ends[..., :1])
    return ChunkDecays(
        inside, same, to_end[..., None], since_start[..., None], between, from_start[..., None]
    )


def _factor(later: Tensor, earlier: Tensor) -> Tensor:
    """exp(earlier - later) of maxima, at most 1: where it would be more, the caller puts 0."""
    return (earlier - later).clamp_(max=0).exp_()


def quotient(sums: Tensor) -> Tensor:
    """Numerators over denominator [..., M + 1] -> [..., M].

    0 where all is padding, or where a query's weights of all keys vanish beside the loudest key.
    """
    numerator, denominator = sums.split((sums.shape[-1] - 1, 1), dim=-1)
    least = torch.finfo(sums.dtype).tiny * 1e8
    return numerator / torch.where(denominator > least, denominator, 1.0)


def _promote(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    initial_state: FavorState | None,
    valid: Tensor | None,
    resets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, FavorState, Tensor | None]:
    """Check the shapes, widen to at least float32, scale W by D^(-1/4), and fill in the state."""
    batch, heads, length, key_dim = q.shape
    if k.shape != q.shape or v.shape[:3] != q.shape[:3]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} must be [B, H, T, D], "
            "[B, H, T, D] and [B, H, T, M]"
        )
    if length == 0:
        raise ValueError(f"q {tuple(q.shape)} has no tokens: T must be at least 1")
    if projection.dim() != 2 or projection.shape[1] != key_dim:
        raise ValueError(f"projection {tuple(projection.shape)} must be [m, D], here D = {key_dim}")
    for name, flags in (("valid", valid), ("resets", resets)):
        if flags is not None and flags.shape != (batch, length):
            raise ValueError(f"{name} {tuple(flags.shape)} must be {(batch, length)}")
    dtype = wide_dtype(q.dtype)
    sizes = (batch, heads, projection.shape[0], v.shape[3])
    state = favor_state(*sizes, device=q.device, dtype=dtype)
    if initial_state is not None:
        for name, given, empty in zip(state._fields, initial_state, state, strict=True):
            if given.shape != empty.shape:
                raise ValueError(
                    f"initial_state.{name} {tuple(given.shape)} must be {tuple(empty.shape)}"
                )
        state = FavorState(initial_state.sums.to(dtype), initial_state.maximum.detach().to(dtype))
    if valid is not None and resets is not None:
        resets = resets & valid
    q, k, v, projection = (x.to(dtype) for x in (q, k, v, projection))
    return q, k, v, projection * key_dim**-0.25, state, resets
