"""Bugs of other implementations that make figures wrong: losses, perplexity, latency.

Each check is run twice, as in ``test_known_bugs``.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from retnet.data import ValidationBatches
from retnet.evaluation import decode_speed, evaluate_batches, score_documents, speed
from retnet.training import load_config, train
from tests.data.corpora import tokens_of
from tests.generation.builders import BOS, EOS, byte_tokenizer, tiny_model
from tests.test_known_bugs import Patch, both_mixers, fails, run


def test_bug_10_labels_and_averages(tmp_path: Path) -> None:
    """Padding trained as token 0, texts cut at seq_len, means of means, the last micro-batch only.

    Put in here: the wrong average differs from the right one on the same batches.
    """
    model = tiny_model("retention", vocab_size=1100)
    tokens = tokens_of([40, 3, 11])  # the first is longer than a window of 8
    batches = list(ValidationBatches(tokens, seq_len=8, batch_size=2))
    seen = [label for b in batches for label in b["shift_labels"].flatten().tolist() if label >= 0]
    starts = set(tokens.document_starts.tolist())
    targets = [tokens.tokens[i] for i in range(tokens.num_tokens) if i not in starts]
    assert seen == targets

    losses, counts = [], []
    for batch in batches:
        logits = run(model, batch["input_ids"], segment_ids=batch.get("segment_ids"))
        labels = batch["shift_labels"].flatten()
        losses.append(F.cross_entropy(logits.flatten(0, 1), labels, reduction="sum").item())
        counts.append(int((labels >= 0).sum()))
    total, number = evaluate_batches(model, batches)
    right = sum(losses) / len(targets)
    assert number == len(targets)
    assert total / number == pytest.approx(right, rel=1e-9)
    means = [loss / count for loss, count in zip(losses, counts, strict=True)]
    assert sum(means) / len(means) != pytest.approx(right, rel=1e-6)

    logged = []
    for batch_size, accumulation in ((4, 1), (1, 4)):
        folder = tmp_path / str(accumulation)
        values = {
            "model.hidden_size": 16, "model.num_hidden_layers": 1, "model.num_heads": 2,
            "data.source": _corpus(tmp_path), "data.tokenizer": "bytes", "data.seq_len": 16,
            "data.cache_dir": tmp_path / "cache", "train.batch_size": batch_size,
            "train.gradient_accumulation_steps": accumulation, "train.max_steps": 1,
            "train.sample_tokens": 0, "train.device": "cpu", "train.out_dir": folder,
            "model.dropout": 0, "train.warmup_steps": 0,
        }  # fmt: skip
        recipe = Path(__file__).parent.parent / "configs" / "tiny.yaml"
        assert train(load_config(str(recipe), [f"{k}={v}" for k, v in values.items()])) == 0
        logged.append(json.loads((folder / "metrics.jsonl").read_text().splitlines()[0]))
    assert logged[0]["train/loss"] == pytest.approx(logged[1]["train/loss"], abs=1e-5)


def _corpus(folder: Path) -> Path:
    corpus = folder / "corpus"
    corpus.mkdir(exist_ok=True)
    for i in range(30):
        (corpus / f"{i}.txt").write_text(f"text {i} " * (1 + i % 7))
    return corpus


def test_bug_11_block_ends_labelled_end_of_text() -> None:
    """Perplexity whose last target of each block is end-of-text instead of the next token."""
    model, text = tiny_model("retention"), "a text longer than a block"
    ids = torch.tensor([[BOS, *text.encode(), EOS]])
    right = wrong = 0.0
    for start in range(0, ids.shape[1] - 1, 8):
        block = ids[:, start : start + 8][:, : ids.shape[1] - 1 - start]
        labels = ids[0, start + 1 : start + 1 + block.shape[1]]
        logits = run(model, block)[0]
        right += F.cross_entropy(logits, labels, reduction="sum").item()
        labels = F.pad(labels[:-1], (0, 1), value=EOS)
        wrong += F.cross_entropy(logits, labels, reduction="sum").item()
    scores = score_documents(model, byte_tokenizer(), [text], context=8)
    assert scores.nll[0] == pytest.approx(right, rel=1e-9)
    assert scores.nll[0] != pytest.approx(wrong, rel=1e-3)


@both_mixers
def test_bug_12_latency_that_reads_the_prefix_again(mixer: str, monkeypatch: Patch) -> None:
    """A "decode" benchmark that runs the whole text through the model for every token."""
    model, lengths = tiny_model(mixer), []
    model.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))

    def check() -> bool:
        lengths.clear()
        decode_speed([model], (30,), tokens=3, rounds=2)
        return lengths[0] == 30 and len(lengths) == 1 + 3 * 3 and set(lengths[1:]) == {1}

    def whole(model) -> Callable[..., Tensor]:
        return lambda tokens, _: model(tokens.new_zeros(1, 31), use_cache=False).logits[:, -1]

    assert check()
    assert fails(check, monkeypatch, speed, "make_step", whole)
