"""Claims about how good a RetNet is, which need trained models."""

from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise

import numpy as np

from retnet.checkpoints import load_checkpoint
from retnet.errors import UserError
from retnet.evaluation import Difference, paired_bootstrap, t_interval, validation_text
from retnet.evaluation.bootstrap import FEW_SEEDS
from retnet.evaluation.profile import by_context, perplexities
from retnet.evaluation.tokens import tokens_of
from retnet.experiments.claims.claim import PAPER, Claim
from retnet.experiments.claims.rivals import ATTENTION, OURS, Rival, ablations, relatives_of
from retnet.experiments.claims.trials import Trials
from retnet.experiments.claims.verdict import Figure, Finding, Limit, at_least, at_most
from retnet.experiments.contenders import Contender
from retnet.experiments.intervals import Scored, intervals
from retnet.experiments.repeat import Row

NATS = "nats/token"
EQUAL = 0.01  # nats per token, 1 % of perplexity: what counts as equally good
IN_ORDER = 0.9  # of the pairs of contenders
FLAT = 1.05  # of the perplexity at the trained length
MULTIPLES = (2, 4, 8, 16)  # of the trained length


def widest(gaps: Sequence[Difference], seeds: int, documents: int) -> Figure:
    """A difference with what all of its intervals cover."""
    ends = [(gap.low, gap.high) for gap in gaps if gap.low is not None and gap.high is not None]
    over = f"{seeds} seed{'s' * (seeds > 1)}, {documents} document{'s' * (documents > 1)}"
    if not ends:
        return Figure(gaps[0].value, None, None, over)
    lows, highs = zip(*ends, strict=True)
    return Figure(gaps[0].value, min(lows), max(highs), over)


def gap(found: Mapping[str, Scored], name: str, base: str, limit: Limit) -> Finding:
    """How much worse a contender is than another."""
    figure = widest(intervals(found[base], found[name]), *found[name].nll.shape)
    return Finding(f"{name} - {base}", figure, NATS, limit)


def both(trials: Trials) -> list[Contender]:
    return [OURS.contender, ATTENTION]


def family(trials: Trials) -> list[Rival]:
    return [OURS, *relatives_of(trials.recipe, trials.overrides)]


def ablated(trials: Trials) -> list[Rival]:
    return [OURS, *ablations(trials.recipe, trials.overrides)]


def transformer(trials: Trials) -> list[Finding]:
    found = trials.scored(both(trials))
    return [gap(found, OURS.name, ATTENTION.name, at_most(EQUAL)), *_losses(found)]


def _losses(found: Mapping[str, Scored]) -> list[Finding]:
    """The contenders' own losses, mean and range."""
    findings = []
    for name, own in found.items():
        losses = own.losses
        mean, over = float(np.mean(losses)), f"{len(losses)} seeds, range"
        findings.append(Finding(name, Figure(mean, min(losses), max(losses), over), NATS))
    return findings


def relatives(trials: Trials) -> list[Finding]:
    """Each against the next better one of the paper."""
    return _ranked(trials, family(trials), in_turn=True)


def own_ablations(trials: Trials) -> list[Finding]:
    """Each against the whole RetNet, and how much of the paper's order is found again."""
    return _ranked(trials, ablated(trials), in_turn=False)


def _ranked(trials: Trials, who: Sequence[Rival], *, in_turn: bool) -> list[Finding]:
    """``in_turn``: whether each is compared with the one before it, not with the first."""
    who = sorted(who, key=lambda rival: rival.published)
    found = trials.scored([rival.contender for rival in who])
    names = [rival.name for rival in who]
    pairs = [*pairwise(names)] if in_turn else [(names[0], name) for name in names[1:]]
    findings = [gap(found, better, worse, at_most(0)) for better, worse in pairs]
    order = in_order([found[name].losses for name in names])
    what = f"pairs in the paper's order ({' < '.join(names)})"
    return [*findings, Finding(what, order, "of all", at_least(IN_ORDER)), *_losses(found)]


def in_order(losses: Sequence[Sequence[float]]) -> Figure:
    """The share of pairs in which the first is better: of the means over seeds, and the range.

    ``losses``: of each contender, the best in the paper first, one per seed.
    """

    def share(values: Sequence[float]) -> float:
        return float(np.mean([first < second for first, second in combinations(values, 2)]))

    shares = [share(seed) for seed in zip(*losses, strict=True)]
    mean = share([float(np.mean(own)) for own in losses])
    one = len(shares) == 1  # which has no range
    low, high = (None, None) if one else (min(mean, *shares), max(mean, *shares))
    return Figure(mean, low, high, f"{len(shares)} seed{'s' * (not one)}, range")


def extrapolation(trials: Trials) -> list[Finding]:
    """Perplexity of the same targets from contexts beyond the trained length, over that from it."""
    who, findings = both(trials), []
    for contender, row in zip(who, trials.trained(who), strict=True):
        limit = at_most(FLAT) if contender is OURS.contender else None
        findings += _beyond(contender, row, limit)
    return findings


def _beyond(contender: Contender, row: Row, limit: Limit | None) -> list[Finding]:
    found = []
    for run in row.runs:
        checkpoint = load_checkpoint(run)
        trained = checkpoint.model.config.max_position_embeddings
        documents = validation_text([checkpoint]).documents
        contexts = (trained, *(multiple * trained for multiple in MULTIPLES))
        tokens = tokens_of(checkpoint.model, checkpoint.tokenizer, documents)
        found.append(perplexities(by_context(checkpoint.model, tokens, contexts)))
    if len(found[0]) < 2:
        raise UserError(
            f"the validation documents of {row.runs[0]} are no longer than {MULTIPLES[0]} times "
            f"data.seq_len ({trained}): take a corpus of longer ones, or less of that"
        )
    findings = []
    for context in [*found[0]][1:]:
        logs = [float(np.log(own[context] / own[trained])) for own in found]
        what = (
            f"{contender.name}: perplexity from {context:,} tokens / from {trained:,}, as trained"
        )
        findings.append(Finding(what, _exp(over_seeds(logs), len(logs)), "times", limit))
    return findings


def over_seeds(values: Sequence[float]) -> Difference:
    """The mean with Student's interval, or with the bootstrap's where there are enough seeds."""
    if len(values) < FEW_SEEDS:
        return t_interval(values)
    own = np.array(values)[:, None]
    return paired_bootstrap(np.zeros_like(own), own, np.ones(1, dtype=np.int64))


def _exp(gap: Difference, seeds: int) -> Figure:
    over = f"{seeds} seed{'s' * (seeds > 1)}"
    if gap.low is None or gap.high is None:
        return Figure(float(np.exp(gap.value)), None, None, over)
    value, low, high = np.exp([gap.value, gap.low, gap.high]).tolist()
    return Figure(value, low, high, over)


AFTER_TRAINING = (
    "The recipe's models with the seeds, on the validation documents, in windows of the trained "
    "length. The interval covers the bootstrap over seeds and documents and, with few seeds, "
    "Student's over the seeds. "
)
TABLES = "200 million parameters, 10,000 steps of half a million tokens"
CLAIMS = (
    Claim(
        "equal-to-transformer",
        "At equal size and training it is as good as a Transformer, or better.",
        f"{PAPER}, section 3.2, figure 5: slightly worse at 1.3B, better from 2.7B on. Against it: "
        "GLA, arXiv 2312.06635 (340M, 1.3B), xLSTM, arXiv 2405.04517 (400M): behind",
        AFTER_TRAINING + f"Equal is a difference of at most {EQUAL} nats per token.",
        transformer,
        seconds=900,
        of="2.7 billion parameters and more",
        who=both,
    ),
    Claim(
        "better-than-relatives",
        "It is better than RWKV (its time mix alone), and that than the linear Transformer.",
        f"{PAPER}, section 3.5, table 5",
        AFTER_TRAINING + "Each against the next in the paper's order; feed-forward networks and "
        "size are alike.",
        relatives,
        seconds=1400,
        of=TABLES,
        who=lambda trials: [rival.contender for rival in family(trials)],
    ),
    Claim(
        "better-than-ablations",
        "It is better than without its gate, head norm, decay, with one decay, with small heads.",
        f"{PAPER}, section 3.6, table 6",
        AFTER_TRAINING + "Parameters are equal: what an ablation saves goes into the feed-forward "
        f"network. The order is found again where {IN_ORDER:.0%} of all pairs stand in it.",
        own_ablations,
        seconds=2800,
        of=TABLES,
        who=lambda trials: [rival.contender for rival in ablated(trials)],
    ),
    Claim(
        "flat-beyond-training",
        "Beyond the length that it was trained at its perplexity stays flat.",
        "GLA, arXiv 2312.06635, length extrapolation: flat to 18k",
        "The last targets of the same windows from the trained length and from multiples of it, as "
        f"far as documents reach; flat is at most {FLAT} times the perplexity. The interval is "
        "over the seeds. A flat perplexity is no use of the far context.",
        extrapolation,
        seconds=120,
        of="1.3 billion parameters, trained at 2k",
        who=both,
    ),
)
