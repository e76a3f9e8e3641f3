"""Tiny models of transformers' own in folders, with tokenizers of several kinds."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from tests.generation.builders import BOS, EOS, VOCAB, byte_tokenizer

WINDOW = 32
ENDS: dict[str, Any] = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": None}
CONFIGS: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=WINDOW, **ENDS
    ),
    "llama": LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=WINDOW, **ENDS,
    ),
    "mamba": MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, **ENDS),
    "bert": BertConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, **ENDS,
    ),
}  # fmt: skip


def save_foreign(
    folder: Path,
    kind: str = "gpt2",
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Path:
    """A folder as the Hub has them; the byte tokenizer unless another is given."""
    config = CONFIGS[kind]
    if changes:
        config = type(config)(**{**config.to_dict(), **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data.mul_(5)  # so that logits differ clearly
    model.to(dtype).save_pretrained(folder)
    (byte_tokenizer() if tokenizer is None else tokenizer).save_pretrained(folder)
    return folder
