"""Positive orthogonal random features of FAVOR+ (arXiv 2009.14794, sections 2.3 and 2.4).

Symbols as in ``favor.py``: x' = x D^(-1/4), phi(x) = exp(W x' - |x'|^2 / 2), W [m, D]. The average
of phi(q) phi(k) over random W is m exp(q k / sqrt(D)).
"""

import hashlib

import torch
from torch import Tensor

LOWEST = -1e30  # the largest exponent of no key; the difference of two infinite ones would be NaN


def favor_projection(
    features: int, key_dim: int, *, seed: int, layer: int = 0, redraws: int = 0
) -> Tensor:
    """W: blocks of D orthogonal rows, each as long as a Gaussian row of its own (section 2.4).

    It depends on nothing but the arguments: every process and device gets the same.

    Args:
        features: m >= 1 rows; the last block may be cut.
        key_dim: D.
        seed, layer, redraws: Which of all such matrices; ``redraws`` counts those before it.

    Returns:
        float32 [m, D], on the CPU.
    """
    digest = hashlib.sha256(f"favor {seed} {layer} {redraws}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:4], "big"))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

    directions, triangles = torch.linalg.qr(normal(-(-features // key_dim), key_dim, key_dim))
    # without the signs the first entry of the first row of each block would never be positive
    directions = directions * triangles.diagonal(dim1=-2, dim2=-1).sign()[:, None]
    lengths = normal(features, key_dim).norm(dim=1, keepdim=True)
    return (directions.mT.flatten(0, 1)[:features] * lengths).float()


def query_features(q: Tensor, projection: Tensor) -> Tensor:
    """phi(q) up to a factor of each query's own: [B, H, T, D] -> [B, H, T, m], the largest is 1.

    That factor cancels in the quotient, and with it |q'|^2 / 2.
    """
    exponents = q @ projection.mT
    return exponents.sub_(exponents.detach().amax(-1, keepdim=True)).exp_()


def key_features(k: Tensor, projection: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """phi(k) = f exp(mu), the largest of each key's f is 1, and mu has no gradient.

    Args:
        k: [B, H, T, D].
        projection: W D^(-1/4), [m, D].
        valid: bool [B, T] or None; padding has f = 0 and the lowest mu.

    Returns:
        f [B, H, T, m] and mu [B, H, T].
    """
    exponents = k @ projection.mT
    norms = k.square().sum(-1) * (0.5 * k.shape[-1] ** -0.5)
    peaks = exponents.detach().amax(-1) - norms.detach()
    features = exponents.sub_((norms + peaks)[..., None]).exp_()
    if valid is None:
        return features, peaks
    padding = ~valid[:, None]
    return features.masked_fill(padding[..., None], 0), peaks.masked_fill(padding, LOWEST)
