"""Tiny random models with a byte tokenizer, in memory and as checkpoint folders."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from retnet.checkpoints import Progress
from retnet.data.tokenizer import tokenizer_hash
from retnet.model.models import model_class

MIXERS = ("retention", "attention")
BOS, EOS, PAD = 256, 257, 258
VOCAB = 259


def byte_tokenizer(merges: tuple[tuple[str, str], ...] = ()) -> PreTrainedTokenizerFast:
    """Ids 0..255 are bytes, then the merges, then <bos>, <eos>, <pad>."""
    vocab = {symbol: byte for byte, symbol in bytes_to_unicode().items()}
    for left, right in merges:
        vocab[left + right] = len(vocab)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )


def tiny_model(
    mixer: str, *, dtype: torch.dtype = torch.float64, seed: int = 0, vocab_size: int = VOCAB
) -> PreTrainedModel:
    """Two layers of width 16; wide weights, so that the logits differ clearly."""
    sizes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_heads": 2,
        "max_position_embeddings": 16,
    }
    ids = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    sizes |= {name: own for name, own in ids.items() if own < vocab_size}
    torch.manual_seed(seed)
    kind: Any = model_class(mixer)
    own = {"chunk_size": 4, "aft_rank": 4}
    sizes |= {k: v for k, v in own.items() if k in kind.config_class.__dataclass_fields__}
    model = kind(kind.config_class(**sizes))
    model.lm_head.weight.data.mul_(20)
    fill_zeros(model)
    return model.to(dtype).eval()


def fill_zeros(model: PreTrainedModel) -> None:
    """Matrices that begin at zero, as some of RWKV's do, would hide what is multiplied by them."""
    for parameter in model.parameters():
        if parameter.dim() == 2 and parameter.std() < 1e-3:
            parameter.data.normal_(std=0.2)


def save_checkpoint(
    folder: Path,
    mixer: str = "retention",
    *,
    record: dict | None = None,
    seed: int = 0,
    precision: str | None = None,
) -> Path:
    """A float32 checkpoint folder with everything that training writes for loading."""
    tiny_model(mixer, dtype=torch.float32, seed=seed).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    if record is not None:
        own = {"tokenizer_sha256": tokenizer_hash(byte_tokenizer())}
        (folder / "data.json").write_text(json.dumps(record | own))
    if precision is not None:
        state = asdict(Progress(precision=precision))
        (folder / "training_state.json").write_text(json.dumps(state))
    return folder
