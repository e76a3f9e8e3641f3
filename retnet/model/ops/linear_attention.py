"""Linear attention (arXiv 2006.16236, section 3.2 to 3.4) in its three forms, as pure functions.

Symbols: B batch, T time, H heads, D key features, M value dim, C chunk; phi(q), phi(k) >= 0.

    S_t = S_{t-1} + phi(k_t)^T v_t;   z_t = z_{t-1} + phi(k_t)             (equations 18 and 19)
    o_t = phi(q_t) S_t / (phi(q_t) z_t + eps)                                       (equation 20)

With a column of ones beside the values, [S, z] is one matrix [D, M + 1] and the numerators and the
denominator come out of retention without decay, whose three forms (``retention.py``) these are:
arguments and results as there, but for the features in place of queries and keys. ``valid`` and
``resets`` bool [B, T] mark padding and the first tokens of new documents. Nothing is ever
subtracted from the sums, which would cancel where late keys dwarf early ones.

The eps is the authors' own, added after the sum: it keeps outputs finite where all is padding.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import in_full_precision, wide_dtype
from .retention import retention_chunkwise, retention_parallel, retention_recurrent

EPS = 1e-6


@in_full_precision
def elu_features(x: Tensor) -> Tensor:
    """phi(x) = elu(x) + 1 (equation 7), of any shape, in float32 (float64 for float64 inputs).

    Below 0 it is exp(x), computed as such: elu(x) + 1 = (exp(x) - 1) + 1 would cancel.
    """
    x = x.to(wide_dtype(x.dtype))
    above = F.relu(x)
    return (x - above).exp() + above  # slope 1 at 0, where clamp's is 0 from torch 2.15 on


def linear_attention_state(
    batch: int,
    heads: int,
    features: int,
    value_dim: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The state [B, H, D, M + 1] before the first token, in at least float32: zeros."""
    shape = (batch, heads, features, value_dim + 1)
    return torch.zeros(shape, device=device, dtype=wide_dtype(dtype))


def linear_attention_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    initial_state: Tensor | None = None,
    valid: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Linear attention token by token: O(1) memory and time per token.

    Args:
        q, k: Features, not negative [B, H, T, D].
        v: [B, H, T, M].
        initial_state: [S, z], [B, H, D, M + 1]; zeros when None.
        valid, resets: bool [B, T], see above; no padding, no new document when None.

    Returns:
        out [B, H, T, M] and the state after the last token [B, H, D, M + 1], both float32 (float64
        for float64 inputs).

    Raises:
        ValueError: Shapes that do not fit together.
    """
    return _attend(retention_recurrent, q, k, v, initial_state, valid, resets)


def linear_attention_parallel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    initial_state: Tensor | None = None,
    valid: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Linear attention over all pairs of tokens at once: O(T^2) time and memory.

    Arguments, results and errors as in ``linear_attention_recurrent``.
    """
    return _attend(retention_parallel, q, k, v, initial_state, valid, resets)


def linear_attention_chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    chunk_size: int,
    initial_state: Tensor | None = None,
    valid: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Linear attention in chunks of C tokens: O(T (C + D)) time, memory linear in T.

    Arguments, results and errors as in ``linear_attention_recurrent``; ``chunk_size`` is C >= 1 and
    may be larger than T or not divide it.
    """
    return _attend(
        retention_chunkwise, q, k, v, initial_state, valid, resets, chunk_size=chunk_size
    )


def _attend(
    form: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: Tensor | None,
    valid: Tensor | None,
    resets: Tensor | None,
    **options: int,
) -> tuple[Tensor, Tensor]:
    """Retention without decay of the values and a column of ones, and the quotient of both."""
    sums, state = form(
        q,
        k,
        with_ones(v),
        q.new_zeros(q.shape[1], dtype=wide_dtype(q.dtype)),
        initial_state=initial_state,
        valid=valid,
        resets=resets,
        **options,
    )
    return normalised(sums), state


def with_ones(v: Tensor) -> Tensor:
    """[..., M] -> [..., M + 1], whose sums are numerators and denominators."""
    return F.pad(v, (0, 1), value=1.0)


def normalised(sums: Tensor) -> Tensor:
    """Numerators over denominator [..., M + 1] -> [..., M]."""
    numerator, denominator = sums.split((sums.shape[-1] - 1, 1), dim=-1)
    return numerator / (denominator + EPS)
