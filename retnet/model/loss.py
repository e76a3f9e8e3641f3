"""The training objective: cross entropy of the next token of the same document.

``causal_lm_loss`` is the plain form, on given logits. ``linear_cross_entropy`` takes the output
layer along and never holds the logits of all tokens: it goes chunk by chunk, and makes the
gradients on the way, while a chunk's probabilities are still in the cache.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .documents import describe_tokens
from .ops.precision import full_precision, wide_dtype

IGNORE_INDEX = -100
MIN_TOKENS_PER_CHUNK = 256  # fewer make the matrix products slow
LOGITS_PER_CHUNK = 2**22  # 16 MiB of float32
LOGITS_PER_CHUNK_GPU = 2**25
SMALLEST_CHANCE = 1e-30  # that a float32 still holds with all digits


def causal_lm_loss(
    logits: Tensor, targets: Tensor, num_items: Tensor | int | None = None
) -> Tensor:
    """Cross entropy in nats per target, in at least float32.

    Args:
        logits: [B, T, vocab_size].
        targets: int64 [B, T], -100 to ignore.
        num_items: What the sum is divided by; the number of targets when None (0 without any).
    """
    logits = logits.to(wide_dtype(logits.dtype))
    total = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
    return total / _divisor(targets, num_items)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, num_items: Tensor | int | None = None
) -> Tensor:
    """``causal_lm_loss(hidden @ weight.T, ...)`` without all the logits at once.

    hidden is [B, T, d], weight [vocab_size, d] that of the output layer, which has no bias.
    """
    device = hidden.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        narrow = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(narrow), weight.to(narrow)
    if not torch.is_grad_enabled():  # which the function could not know
        hidden, weight = hidden.detach(), weight.detach()
    if torch.compiler.is_compiling():  # the compiler fuses the plain form by itself
        return causal_lm_loss(F.linear(hidden, weight), targets, num_items)
    per_chunk = LOGITS_PER_CHUNK if device == "cpu" else LOGITS_PER_CHUNK_GPU
    chunk = max(MIN_TOKENS_PER_CHUNK, per_chunk // weight.shape[0])
    wanted = hidden.requires_grad, weight.requires_grad
    total = _LinearCrossEntropy.apply(
        hidden.flatten(0, 1), weight, targets.flatten(), chunk, *wanted
    )
    return total[0] / _divisor(targets, num_items)


class _LinearCrossEntropy(torch.autograd.Function):
    """Summed cross entropy of [N, d] tokens, and its gradients, made along with it."""

    @staticmethod
    def forward(
        hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, *wanted: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _loss_and_grads(hidden, weight, targets, chunk, *wanted)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        hidden, weight, targets, _, *ctx.wanted = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(hidden, weight, targets, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, hidden_grad, weight_grad = ctx.saved_tensors
        if torch.is_grad_enabled():  # gradients of the gradients are wanted
            plain = partial(_plain_total, targets=targets)
            hidden_grad, weight_grad = torch.func.vjp(plain, hidden, weight)[1](grad)
        else:
            hidden_grad, weight_grad = hidden_grad * grad, (weight_grad * grad).to(weight.dtype)
        first, second = ctx.wanted
        return hidden_grad if first else None, weight_grad if second else None, *[None] * 4

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """One after the other: the chunks read numbers, which a batch of them does not give."""
        one = [
            [x if dim is None else x.select(dim, i) for x, dim in zip(inputs, in_dims, strict=True)]
            for i in range(info.batch_size)
        ]
        found = [_LinearCrossEntropy.apply(*own) for own in one]
        return tuple(torch.stack(x) for x in zip(*found, strict=True)), (0, 0, 0)


def _plain_total(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return causal_lm_loss(F.linear(hidden, weight)[None], targets[None], 1)


def _loss_and_grads(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk: int,
    hidden_wanted: bool,
    weight_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The summed loss and its gradients in hidden and (in a wide type) in weight; empty where they
    are not wanted."""
    wide = wide_dtype(hidden.dtype)
    hidden_grad = torch.empty_like(hidden) if hidden_wanted else hidden.new_empty(0)
    weight_grad = torch.zeros_like(weight, dtype=wide) if weight_wanted else weight.new_empty(0)
    total = torch.zeros((), dtype=wide, device=hidden.device)
    with full_precision(hidden.device):
        for begin in range(0, hidden.shape[0], chunk):
            part, labels = hidden[begin : begin + chunk], targets[begin : begin + chunk, None]
            counted = labels != IGNORE_INDEX
            labels = labels.clamp(min=0)
            logits = F.linear(part, weight).to(wide)
            chances = logits.softmax(1)
            total += (_surprise(logits, chances, labels) * counted).sum()
            if not (hidden_wanted or weight_wanted):
                continue
            # d loss / d logits = softmax - one-hot, of the tokens that are counted
            chances.scatter_add_(1, labels, chances.new_full((), -1.0).expand_as(labels))
            counted = counted.to(hidden.dtype)
            logits_grad = chances.to(hidden.dtype)
            if hidden_wanted:
                found = hidden_grad[begin : begin + chunk]
                torch.mul(logits_grad @ weight, counted, out=found)
            if weight_wanted:
                _add_product(weight_grad, logits_grad.T, part * counted)
    return total, hidden_grad, weight_grad


def _surprise(logits: Tensor, chances: Tensor, labels: Tensor) -> Tensor:
    """-ln of the labels' chances [N, 1], of which the softmax is given."""
    chance = chances.gather(1, labels)
    # softmax says it all unless a chance is too small for it (a GPU would have to wait to know, and
    # tensors that only have a shape never do)
    readable = type(logits) is Tensor and logits.device.type == "cpu"
    if readable and bool(chance.amin() > SMALLEST_CHANCE):
        return -chance.log()
    # ln of the sum of all exp(logit), from the token of which softmax knows it best
    normaliser = logits.amax(1, keepdim=True) - chances.amax(1, keepdim=True).log()
    return normaliser - logits.gather(1, labels)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, of which total may be of the wider type."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _divisor(targets: Tensor, num_items: Tensor | int | None) -> Tensor | int:
    if num_items is None:
        return (targets != IGNORE_INDEX).sum().clamp(min=1)
    return num_items.to(targets.device) if isinstance(num_items, Tensor) else num_items


def shift_targets(
    labels: Tensor,
    attention_mask: Tensor | None,
    segment_ids: Tensor | None,
    position_ids: Tensor | None,
) -> Tensor:
    """Targets for each position: the next label, where that continues the same document.

    Both int64 [B, T], -100 to ignore: where the next token begins another document, or either is
    padding. The mask and the ids are as the model got them.
    """
    tokens = describe_tokens(
        labels,
        attention_mask=None if attention_mask is None else attention_mask[:, -labels.shape[1] :],
        segment_ids=segment_ids,
        position_ids=position_ids,
    )
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    broken = torch.zeros_like(labels, dtype=torch.bool)
    if tokens.resets is not None:
        broken = broken | tokens.resets.roll(-1, dims=1)
    if tokens.valid is not None:
        broken = broken | ~tokens.valid | ~tokens.valid.roll(-1, dims=1)
    return targets.masked_fill(broken, IGNORE_INDEX)
