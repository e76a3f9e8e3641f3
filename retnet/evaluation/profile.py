"""Where a model is good: losses by position, by context, and by kind of target.

One number hides what tells mixers apart: what more context is worth to a model, what it does beyond
the length that it was trained at, and whether it finds again what has been there before.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from retnet.evaluation.scoring import (
    DocumentScores,
    Window,
    tokens_per_batch,
    window_losses,
    windows_of,
)
from retnet.evaluation.tokens import tokens_of
from retnet.model.causal_lm import DecoderForCausalLM

LAST_TARGETS = 128  # of a window, whose loss is told by context; the paper's figure 5 has these
LONG_WINDOWS = 64
RANKS = (
    10,
    100,
    1000,
)  # of a target among all by frequency, where one kind ends and the next begins


@dataclass(frozen=True)
class MeanLoss:
    """Nats per target over a number of targets; none where there are no targets."""

    nats: float | None
    targets: int


@dataclass(frozen=True)
class Profile:
    """The mean losses of one model on one text.

    Attributes:
        by_position: Of the first, second, ... target of a window of the trained length, whose
            number of inputs it is predicted from is 1, 2, ...; in groups, each named by its last.
        by_kind: Of targets that have followed the same token before in their window, of those that
            have not, and by their frequency in the text.
        by_distance: Of the former, by how many tokens ago that was; in groups like the positions.
        by_context: Of the same targets, predicted from so many tokens; None beyond the length for
            which the model is defined.
    """

    by_position: dict[int, MeanLoss]
    by_kind: dict[str, MeanLoss]
    by_distance: dict[int, MeanLoss]
    by_context: dict[int, MeanLoss | None]


def profile(
    model: DecoderForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    *,
    context: int,
    contexts: Sequence[int],
    at_most: int = LONG_WINDOWS,
    eos: bool = True,
    scores: DocumentScores | None = None,
    progress: str | None = None,
) -> Profile:
    """Score a text in windows of ``context``, and the ends of its long documents by ``contexts``.

    Of each of the latter there are ``at_most`` windows, spread evenly over the text. Contexts for
    which no document is long enough are left out.

    Args:
        eos: Whether the end of a document is a target.
        scores: Of the same documents in windows of ``context``, if they were scored already.
        progress: Title of a progress bar on a terminal.
    """
    tokens = tokens_of(model, tokenizer, documents, eos=eos)
    if scores is not None and scores.windows:
        every, found = scores.windows, scores.losses
    else:
        every = windows_of(tokens, context, context)
        found = window_losses(model, tokens, every, tokens_per_batch(model), progress)
    losses = np.concatenate(found)
    positions = np.concatenate([np.arange(w.first_target, w.end + 1) - w.start for w in every])
    targets, distances = _targets(tokens, every)
    return Profile(
        _in_groups(losses, positions, context),
        _by_kind(losses, targets, distances),
        _in_groups(losses, distances, context),
        by_context(model, tokens, contexts, at_most=at_most, progress=progress),
    )


def _mean(losses: NDArray[np.float64]) -> MeanLoss:
    return MeanLoss(float(losses.mean()) if len(losses) else None, len(losses))


def _in_groups(
    losses: NDArray[np.float64], counts: NDArray[np.int64], most: int
) -> dict[int, MeanLoss]:
    """By counts from 1 on, in groups that double: 1, 2, 3-4, ..., so that none is lost in noise."""
    found, before = {}, 0
    for end in sorted({min(2**power, most) for power in range(most.bit_length() + 1)}):
        found[end] = _mean(losses[(before < counts) & (counts <= end)])
        before = end
    return found


def recalled(ids: Sequence[int]) -> list[int]:
    """How many tokens ago each token but the first has followed the same token; 0 for never."""
    seen: dict[tuple[int, int], int] = {}
    found = []
    for place, pair in enumerate(pairwise(ids)):
        found.append(place - seen.get(pair, place))
        seen[pair] = place
    return found


def _targets(
    tokens: Sequence[Tensor], every: Sequence[Window]
) -> tuple[list[int], NDArray[np.int64]]:
    """All that are scored, and how many tokens ago each was recalled from."""
    targets: list[int] = []
    distances: list[int] = []
    for window in every:
        ids = tokens[window.document][window.start : window.end + 1].tolist()
        own = window.first_target - window.start
        targets += ids[own:]
        distances += recalled(ids)[own - 1 :]
    return targets, np.array(distances, dtype=np.int64)


def _by_kind(
    losses: NDArray[np.float64], targets: Sequence[int], distances: NDArray[np.int64]
) -> dict[str, MeanLoss]:
    hits = distances > 0
    kinds: dict[str, NDArray[np.bool_]] = {
        "the same pair of tokens was there before": hits,
        "the pair of tokens is new": ~hits,
    }
    ranks = {token: rank for rank, (token, _) in enumerate(Counter(targets).most_common())}
    rank = np.array([ranks[token] for token in targets])
    for low, high in zip((0, *RANKS), (*RANKS, None), strict=True):
        if low < len(ranks):
            name = f"target of rank {low + 1:,} to {high:,}" if high else f"rarer than rank {low:,}"
            kinds[name] = (rank >= low) & (rank < (high or len(ranks)))
    return {name: _mean(losses[mask]) for name, mask in kinds.items()}


def by_context(
    model: DecoderForCausalLM,
    tokens: Sequence[Tensor],
    contexts: Sequence[int],
    *,
    last: int = LAST_TARGETS,
    at_most: int = LONG_WINDOWS,
    progress: str | None = None,
) -> dict[int, MeanLoss | None]:
    """The loss of the same targets, predicted from windows of several lengths that end there.

    Each window's last targets count, at most half of the shortest window's. Contexts that no
    document is as long as are left out.
    """
    longest_document = max((len(ids) for ids in tokens), default=0)
    contexts = [context for context in sorted(contexts) if context < longest_document]
    if not contexts:
        return {}
    counted = max(1, min(last, contexts[0] // 2))
    ends = [
        (document, end)
        for document, ids in enumerate(tokens)
        for end in range(contexts[-1], len(ids), contexts[-1])
    ]
    if len(ends) > at_most:
        ends = [ends[i] for i in np.linspace(0, len(ends) - 1, at_most).round().astype(int)]
    found: dict[int, MeanLoss | None] = {}
    for context in contexts:
        found[context] = None
        if model.config.longest is None or context <= model.config.longest:
            every = [Window(d, end - context, end, end + 1 - counted) for d, end in ends]
            found[context] = _mean(
                np.concatenate(
                    window_losses(model, tokens, every, tokens_per_batch(model), progress)
                )
            )
    return found


def perplexities(losses: Mapping[int, MeanLoss | None]) -> dict[int, float]:
    """exp of the mean losses that there are."""
    return {
        key: float(np.exp(loss.nats))
        for key, loss in losses.items()
        if loss and loss.nats is not None
    }
