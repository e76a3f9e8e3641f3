"""How well a model predicts text: negative log-likelihoods, each target exactly once.

A document is ``<bos>`` text ``<eos>``; everything after ``<bos>`` is a target, ``<eos>`` unless it
is left out (see ``tokens`` for tokenizers that lack one of the two). Windows begin every
``stride`` inputs and hold up to ``context`` of them. The first window of a document scores all its
targets, each later one those that no window before it has scored. So a target is predicted from at
least ``context - stride + 1`` tokens where the document has that many before it.

Of a conversation only the answers are targets.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from retnet.errors import UserError
from retnet.evaluation import metrics
from retnet.evaluation.foreign import ForeignModel
from retnet.evaluation.tokens import (
    are_conversations,
    nats_of_first,
    predicted_text,
    tokens_and_targets,
    warn_of_unknown,
)
from retnet.generation import evaluation_mode
from retnet.machine import memory_of
from retnet.model.cache import DecoderCache
from retnet.model.causal_lm import DecoderForCausalLM
from retnet.model.loss import IGNORE_INDEX
from retnet.terminal import harmless

LOGITS_PER_BATCH = 1 << 23  # 32 MiB in float32, a few times over in the loss
TOKENS_PER_BATCH = 1 << 13  # where the vocabulary is small
LOGIT_BYTES = 8  # of each while a window is scored: float32, and again in the log-softmax


@dataclass(frozen=True)
class DocumentScores:
    """Sums over the targets of each document, [D]; what they are the sums of, for windows."""

    nll: NDArray[np.float64]  # negative log-likelihoods in nats
    targets: NDArray[np.int64]
    bytes: NDArray[np.int64]  # of the text in UTF-8, without the special tokens
    windows: Sequence["Window"] = ()
    losses: Sequence[NDArray[np.float64]] = ()  # of each window's targets

    @property
    def nats_per_token(self) -> float:
        return metrics.nats_per_token(self.nll.sum().item(), self.targets.sum().item())

    @property
    def perplexity(self) -> float:
        return metrics.perplexity(self.nll.sum().item(), self.targets.sum().item())

    @property
    def bits_per_byte(self) -> float:
        return metrics.bits_per_byte(self.nll.sum().item(), self.bytes.sum().item())


@dataclass(frozen=True)
class Window:
    """Inputs ``start .. end - 1`` of a document; targets from index ``first_target`` on count."""

    document: int
    start: int
    end: int
    first_target: int

    @property
    def num_targets(self) -> int:
        return self.end + 1 - self.first_target


def windows(document: int, num_tokens: int, context: int, stride: int) -> Iterator[Window]:
    """Cut a document of ``num_tokens`` tokens so that every target is scored exactly once.

    ``<bos>`` and ``<eos>`` are among the tokens; ``stride`` is at most ``context``.
    """
    start, first_target = 0, 1
    while first_target < num_tokens:
        end = min(start + context, num_tokens - 1)
        yield Window(document, start, end, first_target)
        start, first_target = start + stride, end + 1


def windows_of(tokens: Sequence[Tensor], context: int, stride: int) -> list[Window]:
    """Those of all documents."""
    return [
        window
        for document, ids in enumerate(tokens)
        for window in windows(document, len(ids), context, stride)
    ]


def score_documents(
    model: DecoderForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    *,
    context: int,
    stride: int | None = None,
    batch_size: int | None = None,
    carry_state: bool = False,
    eos: bool = True,
    progress: str | None = None,
) -> DocumentScores:
    """Score every document on its own, the model in evaluation mode.

    A ``UserError`` where there is no text, or context and stride do not fit.

    Args:
        context: Tokens that a window holds.
        stride: Tokens from one window to the next; ``context`` when None (no overlap).
        batch_size: Windows of full length per forward pass; what fits in memory when None.
        carry_state: Hand the state from each window to the next, so that every target is
            predicted from all that comes before it; retention models only, without stride.
        eos: Whether the end of a document is a target.
        progress: Title of a progress bar on a terminal; none when None.
    """
    stride = check_windows(model, context, stride, carry_state)
    sizes = np.array([len(text.encode()) for text in map(predicted_text, documents)], np.int64)
    if not sizes.sum():
        raise UserError(f"text ({len(documents)} documents) is empty: give some to evaluate")
    tokens, targets = tokens_and_targets(model, tokenizer, documents, eos=eos)
    warn_of_unknown(tokenizer, tokens)
    check_logits_fit(model, min(context, max(len(ids) for ids in tokens)))
    if batch_size is None:
        batch_size = max(1, tokens_per_batch(model) // context)
    predicted = np.array([int((ids[1:] != IGNORE_INDEX).sum()) for ids in targets], np.int64)
    every: list[Window] = []
    losses: list[NDArray[np.float64]] = []
    if carry_state:
        sums = _carried_sums(model, tokens, targets, context, batch_size, progress)
    else:
        every = windows_of(tokens, context, stride)
        num_tokens = batch_size * context
        losses = window_losses(model, tokens, every, num_tokens, progress, targets=targets)
        sums = np.zeros(len(tokens))
        np.add.at(sums, [window.document for window in every], [one.sum() for one in losses])
    first = nats_of_first(model, tokenizer)
    if first is not None and not are_conversations(documents):  # which begin with no answer
        unpredicted = np.array([min(1, len(ids)) for ids in tokens], dtype=np.int64)
        sums, predicted = sums + first * unpredicted, predicted + unpredicted
    if not predicted.sum():
        raise UserError(f"text ({len(documents)} documents) gives no token to predict: add to it")
    return DocumentScores(sums, predicted, sizes, every, losses)


def tokens_per_batch(model: DecoderForCausalLM) -> int:
    """How many go through the model at once, so that their logits fit in memory."""
    return max(1, min(TOKENS_PER_BATCH, LOGITS_PER_BATCH // model.config.vocab_size))


def check_logits_fit(model: DecoderForCausalLM, tokens: int) -> None:
    """Raise a ``UserError`` where the logits of one window of so many tokens cannot fit."""
    memory, each = memory_of(model.device), LOGIT_BYTES * model.config.vocab_size
    if memory is not None and tokens * each > memory:
        raise UserError(
            f"--context: a window of {tokens:,} tokens needs {tokens * each:,} bytes for logits, "
            f"{each:,} a token, and {model.device} has {memory:,}: take at most {memory // each:,}"
        )


def check_windows(
    model: DecoderForCausalLM, context: int, stride: int | None, carry_state: bool
) -> int:
    """The stride that these options mean for this model; a ``UserError`` where they do not fit."""
    if context < 1:
        raise UserError(f"--context ({context}) must be at least 1: give the tokens of a window")
    longest, kind = model.config.longest, type(getattr(model, "inner", model)).__name__
    if carry_state and isinstance(model, ForeignModel):
        raise UserError(
            f"--carry-state is for models of this package, and a {kind} is none: its memory is "
            "trusted with single tokens only, so leave it out"
        )
    if longest is not None and carry_state:
        raise UserError(
            f"--carry-state leads beyond the {longest:,} tokens for which a {kind} is defined: "
            "leave it out, or compare other models"
        )
    if longest is not None and context > longest:
        raise UserError(
            f"--context ({context:,}) is beyond the {longest:,} tokens for which a {kind} is "
            f"defined: take --context {longest} for all models"
        )
    if carry_state:
        if model.grows:
            raise UserError(
                f"--carry-state needs a recurrent model, not a {kind}: leave it "
                "out, or compare models whose state has a constant size"
            )
        if stride is not None:
            raise UserError(f"--stride ({stride}) has no effect with --carry-state: leave it out")
        return context
    stride = context if stride is None else stride
    if not 1 <= stride <= context:
        raise UserError(
            f"--stride ({stride}) must be from 1 to --context ({context}), or targets would be "
            "skipped: make it smaller"
        )
    return stride


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of each target in nats; the log-softmax is at least float32.

    Logits are [B, T, vocab], labels [B, T] the targets, ``IGNORE_INDEX`` where there is none;
    returns float64 [B, T], zero there.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    flat = F.cross_entropy(
        wide.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    )
    return flat.view_as(labels).double()


def _padded(rows: Sequence[Tensor], fill: int, device: torch.device) -> Tensor:
    return pad_sequence(list(rows), batch_first=True, padding_value=fill).to(device)


def window_losses(
    model: DecoderForCausalLM,
    tokens: Sequence[Tensor],
    every: Sequence[Window],
    num_tokens: int,
    progress: str | None = None,
    *,
    targets: Sequence[Tensor] | None = None,
) -> list[NDArray[np.float64]]:
    """The nats of each window's targets, in the order of the windows; 0 of what is none.

    ``num_tokens`` and ``targets`` as in ``scored_windows``.
    """
    found: dict[Window, NDArray[np.float64]] = {}
    total = sum(window.num_targets for window in every)
    with evaluation_mode(model), torch.inference_mode(), _bar(total, progress) as bar:
        for batch, nll in scored_windows(model, tokens, every, num_tokens, targets):
            for window, row in zip(batch, nll.cpu().numpy(), strict=True):
                first, end = window.first_target - 1 - window.start, window.end - window.start
                found[window] = row[first:end].copy()
                bar.update(window.num_targets)
    return [found[window] for window in every]


def scored_windows(
    model: DecoderForCausalLM,
    tokens: Sequence[Tensor],
    every: Sequence[Window],
    num_tokens: int,
    targets: Sequence[Tensor] | None = None,
) -> Iterator[tuple[Sequence[Window], Tensor]]:
    """Score windows in batches of similar length, the longest (which takes most memory) first.

    Rows are padded on the right, where a causal model sees the padding only after all targets.

    Args:
        tokens: Of each document.
        every: The windows, in any order.
        num_tokens: In a batch of the longest windows.
        targets: The tokens with ``IGNORE_INDEX`` for what is no target; None: all are.

    Returns:
        Batches of windows with the nll of their targets, float64 [B, T]: that of the target after
        the input at ``start + i`` at index ``i``, zero where it does not count.
    """
    every = sorted(every, key=lambda window: window.start - window.end)
    done = 0
    while done < len(every):
        longest = every[done].end - every[done].start
        batch = every[done : done + max(1, num_tokens // longest)]
        done += len(batch)
        inputs, labels = [], []
        for window in batch:
            ids = tokens[window.document]
            inputs.append(ids[window.start : window.end])
            of = ids if targets is None else targets[window.document]
            counted = of[window.start + 1 : window.end + 1].clone()
            counted[: window.first_target - window.start - 1] = IGNORE_INDEX
            labels.append(counted)
        output = model(_padded(inputs, 0, model.device), use_cache=False)
        yield batch, token_nll(output.logits, _padded(labels, IGNORE_INDEX, model.device))


def _bar(targets: int, title: str | None) -> Any:
    """A progress bar on a terminal; none without a title."""
    return tqdm(total=targets, desc=title and harmless(title), unit="token", unit_scale=True,
                leave=False, disable=True if title is None else None)  # fmt: skip


def _carried_sums(
    model: DecoderForCausalLM,
    tokens: Sequence[Tensor],
    targets: Sequence[Tensor],
    context: int,
    batch_size: int,
    progress: str | None,
) -> NDArray[np.float64]:
    """The nats of each document, [D], its state handed on from piece to piece."""
    sums = torch.zeros(len(tokens), dtype=torch.float64, device=model.device)
    total = sum(int((ids[1:] != IGNORE_INDEX).sum()) for ids in targets)
    with evaluation_mode(model), torch.inference_mode(), _bar(total, progress) as bar:
        for rows, nll, number in _score_carried(model, tokens, targets, context, batch_size):
            sums.index_add_(0, rows.to(sums.device), nll)
            bar.update(number)
    return sums.cpu().numpy()


def _score_carried(
    model: DecoderForCausalLM,
    tokens: Sequence[Tensor],
    targets: Sequence[Tensor],
    context: int,
    batch_size: int,
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Score whole documents of similar length side by side, each with its own state.

    Yields the documents of the rows [B], the sums of their nats [B], and the number of targets.

    Those that end leave the batch, and the others then go through it in longer pieces.
    """
    order = sorted(
        (document for document, ids in enumerate(tokens) if len(ids) > 1),
        key=lambda document: -len(tokens[document]),
    )
    for first in range(0, len(order), batch_size):
        rows, start = order[first : first + batch_size], 0
        cache = model.new_cache()
        while rows:
            end = start + batch_size * context // len(rows)
            ids = [tokens[document][start : end + 1] for document in rows]
            after = [targets[document][start + 1 : end + 1] for document in rows]
            pieces = _padded([own[:-1] for own in ids], 0, model.device)
            labels = _padded(after, IGNORE_INDEX, model.device)
            output = model(pieces, past_key_values=cache, use_cache=True)
            nll = token_nll(output.logits, labels).sum(dim=1)
            yield torch.tensor(rows), nll, int((labels != IGNORE_INDEX).sum())
            start = end
            left = [document for document in rows if len(tokens[document]) - 1 > start]
            if left and len(left) < len(rows):  # the longer ones are the first
                cache.batch_select_indices(torch.arange(len(left), device=model.device))
            rows = left


def evaluate_batches(
    model: DecoderForCausalLM,
    batches: Iterable[dict[str, Tensor]],
    cache: DecoderCache | None = None,
) -> tuple[float, int]:
    """Total negative log-likelihood of batches that bring their targets along, in evaluation mode.

    They hold ``input_ids`` and ``shift_labels`` [B, T], perhaps ``segment_ids``. A cache is given
    where each continues the rows of the one before; None begins anew. Returns the sum in nats and
    the number of targets.
    """
    total, targets = torch.zeros((), dtype=torch.float64, device=model.device), 0
    with evaluation_mode(model), torch.inference_mode():
        for batch in batches:
            names = batch.keys() & {"input_ids", "segment_ids", "shift_labels"}
            inputs: dict[str, Any] = {name: batch[name].to(model.device) for name in names}
            inputs |= {"past_key_values": cache, "use_cache": False}
            # divided by 1: the sum; made chunk by chunk, so that no logits of all tokens are held
            total += model(**inputs, num_items_in_batch=1, return_logits=False).loss
            targets += int((batch["shift_labels"] != IGNORE_INDEX).sum())
    return total.item(), targets
