"""The Performer's claim: its features approximate softmax attention."""

import math

import torch
import torch.nn.functional as F

from retnet.experiments.claims.claim import Claim
from retnet.experiments.claims.setup import Setup, exponent
from retnet.experiments.claims.verdict import Figure, Finding, at_most, median
from retnet.model.ops.favor import favor_parallel
from retnet.model.ops.random_features import favor_projection

KEY_DIM, SMALL_KEY_DIM = 64, 16
TOKENS, HEADS = 256, 4
UNIT, HALF = 1.0, 0.5  # standard deviations of queries and keys
CLOSE = 0.1  # relative error of an approximation
FEATURES = (16, 64, 1024, 4096)
AFFORDABLE = 1024  # features: for texts of as many tokens exact attention is as cheap


def default_features(key_dim: int) -> int:
    """floor(D ln D), which its authors' theory and the usual code have."""
    return math.floor(key_dim * math.log(key_dim))


def relative_error(features: int, key_dim: int, spread: float, seed: int) -> float:
    """Root mean square of the error over that of exact causal softmax attention."""
    generator = torch.Generator().manual_seed(seed)
    shape = (3, 1, HEADS, TOKENS, key_dim)
    q, k, v = torch.randn(shape, generator=generator, dtype=torch.float64).unbind()
    q, k = spread * q, spread * k
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    projection = favor_projection(features, key_dim, seed=seed)
    found, _ = favor_parallel(q, k, v, projection)
    return float((found - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def _errors(setup: Setup, features: int, key_dim: int, spread: float) -> list[float]:
    return [relative_error(features, key_dim, spread, seed) for seed in range(setup.rounds)]


def performer(setup: Setup) -> list[Finding]:
    findings = []
    for spread in (UNIT, HALF):
        own = default_features(KEY_DIM)
        errors = {m: _errors(setup, m, KEY_DIM, spread) for m in sorted({*FEATURES, own})}
        for m, values in errors.items():
            what = f"K = {KEY_DIM}, q and k of deviation {spread:g}, {m:,} features"
            limit = at_most(CLOSE) if m <= AFFORDABLE else None
            findings.append(Finding(what, _draws(values), "of the output", limit))
        slopes = [exponent([*errors], each) for each in zip(*errors.values(), strict=True)]
        what = f"deviation {spread:g}: b in error = m^b (variance alone: -0.5)"
        findings.append(Finding(what, _draws(slopes)))
    for m in FEATURES:
        what = f"K = {SMALL_KEY_DIM}, deviation {HALF:g}, {m:,} features"
        values = _errors(setup, m, SMALL_KEY_DIM, HALF)
        findings.append(Finding(what, _draws(values), "of the output"))
    return findings


def _draws(values: list[float]) -> Figure:
    return median(values, "draws")


CLAIMS = (
    Claim(
        "performer-softmax",
        "The Performer's random features approximate softmax attention.",
        "Performer, arXiv 2009.14794, sections 2.3 and 2.4, theorem 4",
        f"FAVOR+ of {TOKENS} random tokens, {HEADS} heads, against exact causal softmax, float64: "
        "root mean square of the error over that of the output, each draw with features and text "
        f"of its own. floor(K ln K) features ({default_features(KEY_DIM)} at K = {KEY_DIM}) are "
        f"the usual number. Limits are of up to {AFFORDABLE:,}: m features cost as much as exact "
        "attention over m tokens. The features' products are right in the mean, and their variance "
        "grows exponentially with the size of queries and keys.",
        performer,
        seconds=10,
    ),
)
