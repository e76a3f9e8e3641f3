"""Fresh weights: each model gets the initialisation that suits it.

RetNet, the official gains: Xavier uniform with gain 2^-2.5 for Q, K, V and G and 2^-1 for O,
embedding d^-1/2, PyTorch's default in the feed-forward network. Transformer, GPT-2's: normal 0.02,
the two output projections of a block divided by sqrt(2 layers). The output layer is the same in
both.
"""

import torch
from torch import nn
from transformers import initialization as init

from .configuration import DecoderConfig, RetNetConfig

# Standard deviation of a fresh model's logits: small, so that training begins at a loss of
# ln(vocab_size). The official code has 1 here, which begins half a nat above.
LOGIT_STD = 0.3


@torch.no_grad()
def initialize(module: nn.Module, role: str, config: DecoderConfig) -> None:
    """Fill one module's own weights; already loaded ones are left alone (transformers' flag).

    Args:
        module: An embedding, norm or linear layer; others have no weights of their own.
        role: The last word of its name in the model, as "o_proj".
        config: The model's.
    """
    retention = isinstance(config, RetNetConfig)
    output_std = min(0.02, LOGIT_STD * config.hidden_size**-0.5)
    if isinstance(module, nn.Embedding):
        std = config.hidden_size**-0.5 if retention else 0.02
        init.normal_(module.weight, std=output_std if config.tie_word_embeddings else std)
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        init.ones_(module.weight)
        if isinstance(module, nn.LayerNorm):
            init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        if role == "lm_head":
            init.normal_(module.weight, std=output_std)
        elif not retention:
            ends_block = role in ("o_proj", "down_proj")
            depth = (2 * config.num_hidden_layers) ** -0.5 if ends_block else 1.0
            init.normal_(module.weight, std=0.02 * depth)
        elif role in ("up_proj", "gate_proj", "down_proj"):
            init.kaiming_uniform_(module.weight, a=5**0.5)
        else:
            init.xavier_uniform_(module.weight, gain=2**-1 if role == "o_proj" else 2**-2.5)
