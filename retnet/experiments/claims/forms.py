"""Claims about what is computed: three forms of one mixer, and normalisations that cancel."""

import torch
from torch import Tensor

from retnet.experiments.claims.claim import PAPER, Claim
from retnet.experiments.claims.setup import Setup
from retnet.experiments.claims.verdict import Finding, at_most, worst
from retnet.model.causal_lm import DecoderForCausalLM
from retnet.model.documents import describe_tokens
from retnet.model.mixers.base import split_heads
from retnet.model.ops.decay import clock, decay_matrix
from retnet.model.ops.gated_norm import head_norm
from retnet.model.ops.retention import retention_parallel

FORMS = ("parallel", "chunkwise")  # beside the recurrent one, which is the definition
LIMITS = {torch.float64: (1e-10, 1e-10), torch.float32: (1e-4, 1e-3)}  # of values, of gradients
NORM_TOKENS = 256
SMALL = 1e-3  # a thousandth of the outputs' spread


def largest_difference(found: Tensor, expected: Tensor) -> float:
    """In units of the expected values' standard deviation."""
    return float((found - expected).abs().max() / expected.std())


def _values(model: DecoderForCausalLM, ids: Tensor, mode: str) -> tuple[Tensor, list[Tensor]]:
    """The logits of all tokens, and the states after the last."""
    cache = model.new_cache()
    with torch.no_grad():
        logits = model(ids, past_key_values=cache, use_cache=True, mode=mode).logits
    return logits, [x for x in cache.tensors().values() if x.is_floating_point()]


def _gradients(model: DecoderForCausalLM, ids: Tensor, mode: str) -> list[Tensor]:
    model.zero_grad(set_to_none=True)
    model(ids, labels=ids, use_cache=False, mode=mode).loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def three_forms(setup: Setup) -> list[Finding]:
    """All forms against the recurrent one, on models and texts of several seeds."""
    findings = []
    for dtype, (of_values, of_gradients) in LIMITS.items():
        kinds = ("logits", "states", "gradients")
        found: dict[tuple[str, str], list[float]] = {(f, k): [] for f in FORMS for k in kinds}
        for seed in range(setup.rounds):
            model = setup.model("retention", seed=seed, dtype=dtype)
            length = 2 * model.config.chunk_size + 1 + 7 * seed  # the last chunk is a short one
            ids = torch.randint(model.config.vocab_size, (2, length)).to(setup.device)
            logits, states = _values(model, ids, "recurrent")
            gradients = _gradients(model, ids, "recurrent")
            for form in FORMS:
                own_logits, own_states = _values(model, ids, form)
                pairs = {
                    "logits": [(own_logits, logits)],
                    "states": zip(own_states, states, strict=True),
                    "gradients": zip(_gradients(model, ids, form), gradients, strict=True),
                }
                for kind in kinds:
                    differences = [largest_difference(*pair) for pair in pairs[kind]]
                    found[form, kind].append(worst(differences, "tensors").value)
        precision = str(dtype).removeprefix("torch.")
        for (form, kind), values in found.items():
            limit = at_most(of_gradients if kind == "gradients" else of_values)
            what = f"{precision}, {form} - recurrent, {kind}"
            findings.append(Finding(what, worst(values, "models"), "sd", limit))
    return findings


def normalised_retention(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """Parallel retention with the paper's three normalisations (section 2.2), [B, H, T, V].

    QK^T / sqrt(K); D_nm / sqrt(sum_i D_ni); R_nm / max(|sum_i R_ni|, 1).
    """
    time, document = clock(q.shape[2], q.device, None, None)
    decays = decay_matrix(log_decay, time, document)
    decays = decays / decays.sum(-1, keepdim=True).sqrt()
    scores = q @ k.mT * q.shape[-1] ** -0.5 * decays
    return scores / scores.sum(-1, keepdim=True).abs().clamp(min=1) @ v


def normalisations(setup: Setup) -> list[Finding]:
    """With and without them, after the head norm, for several eps of that; float64."""
    own = setup.model("retention", "model.num_hidden_layers=1").config.head_norm_eps
    worst_of: dict[float, list[float]] = {0.0: [], own: [], 1e-5: []}
    typical = []
    for seed in range(setup.rounds):
        plain, scaled = _outputs(setup, seed)
        for eps, values in worst_of.items():
            expected, found = (head_norm(x, "groupnorm", eps) for x in (plain, scaled))
            values.append(largest_difference(found, expected))
            if eps == own:
                typical.append(float((found - expected).square().mean().sqrt() / expected.std()))
    findings = [
        Finding(
            f"largest difference, GroupNorm with eps {eps:g}{names}",
            worst(worst_of[eps], "layers"), "sd", at_most(limit),
        )
        for eps, names, limit in (
            (0.0, "", 1e-6),
            (own, ", this repository's", SMALL),
            (1e-5, ", torch's", SMALL),
        )
    ]  # fmt: skip
    what = f"root mean square of the differences with eps {own:g}"
    return [*findings, Finding(what, worst(typical, "layers"), "sd")]


@torch.no_grad()
def _outputs(setup: Setup, seed: int) -> tuple[Tensor, Tensor]:
    """What a fresh layer retains of normed input, without and with the normalisations."""
    keys = "model.num_hidden_layers=1"
    model = setup.model("retention", keys, seed=seed, dtype=torch.float64)
    mixer, width = model.model.layers[0].mixer, model.config.hidden_size
    hidden = torch.randn(1, NORM_TOKENS, width, dtype=torch.float64).to(setup.device)
    shared, _ = mixer.shared(describe_tokens(hidden), {})
    parts = (mixer.q_proj(hidden), mixer.k_proj(hidden), mixer.v_proj(hidden))
    q, k, v = (split_heads(x, model.config.num_heads) for x in parts)
    q, k = (shared.turn_queries(x) for x in (q, k))  # no 1/sqrt(K): it is one of them
    plain, _ = retention_parallel(q, k, v, shared.log_decay)
    return plain, normalised_retention(q, k, v, shared.log_decay)


CLAIMS = (
    Claim(
        "three-forms",
        "The parallel, the chunkwise and the recurrent form of retention compute the same.",
        f"{PAPER}, section 2.1, equations 5 to 7",
        "Fresh models of the size, random texts of two rows; the largest difference to the "
        "recurrent form, in standard deviations (sd) of what is compared. The limits are those of "
        "docs/parity.md, which has padding, packing and splits too.",
        three_forms,
        seconds=20,
    ),
    Claim(
        "normalisations",
        "Normalising the scores does not change the output, because GroupNorm takes scales out.",
        f"{PAPER}, section 2.2, retention score normalization",
        f"Retention of fresh layers on {NORM_TOKENS} tokens of normed input, with all three "
        "normalisations and with none, then GroupNorm, float64. They cancel only as the eps of "
        "GroupNorm goes to 0, since the outputs of a text's first tokens are small.",
        normalisations,
        seconds=2,
    ),
)
