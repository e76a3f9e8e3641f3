"""What one head takes of each token's values, for a short text: the report's retention matrix."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from retnet.evaluation.tokens import tokens_of
from retnet.generation import evaluation_mode
from retnet.model.causal_lm import DecoderForCausalLM

TOKENS = 28  # of the text; more can't be read beside a picture


@dataclass(frozen=True)
class TokenWeights:
    """One head's weights [T, T], by output and input, and the text of each of the T tokens.

    Each output's are divided by the largest among them: a head norm takes their scale away.
    """

    layer: int  # from 0, as head
    head: int
    tokens: list[str]
    matrix: NDArray[np.float64]


def token_weights(
    model: DecoderForCausalLM, tokenizer: PreTrainedTokenizerFast, documents: Sequence[str]
) -> TokenWeights | None:
    """Those of the middle head in the middle layer that has such weights, at a document's begin.

    It is the first document of ``TOKENS`` tokens, or else the longest. None where no layer has
    weights, as in an AFT or RWKV.
    """
    ids = torch.empty(0, dtype=torch.int64)
    for text in documents:  # one by one: the first is mostly long enough
        (own,) = tokens_of(model, tokenizer, [text])
        ids = own if len(own) > len(ids) else ids
        if len(ids) > TOKENS:
            break
    ids = ids[None, :TOKENS].to(model.device)
    found: dict[int, Any] = {}

    def look(part: Any, given: tuple[Any, ...]) -> None:
        weights = part.token_weights(*given[:2])
        if weights is not None:
            found[part.layer_idx] = weights[0]

    hooks = [layer.mixer.register_forward_pre_hook(look) for layer in model.model.layers]
    try:
        with evaluation_mode(model), torch.inference_mode():
            model(ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        return None
    layer = sorted(found)[len(found) // 2]
    head = len(found[layer]) // 2
    matrix = found[layer][head].double().cpu().numpy()
    matrix = matrix / np.abs(matrix).max(axis=1, keepdims=True).clip(min=1e-300)
    tokens = [str(tokenizer.decode([token])) for token in ids[0].tolist()]
    return TokenWeights(layer, head, tokens, matrix)
