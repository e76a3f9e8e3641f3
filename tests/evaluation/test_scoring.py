"""Every target once, from the context that the windows state, whatever the batches."""

import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tqdm import tqdm

from retnet.errors import UserError
from retnet.evaluation import evaluate_batches, score_documents, scoring
from retnet.evaluation.scoring import token_nll, windows
from tests.generation.builders import BOS, EOS, MIXERS, byte_tokenizer, tiny_model

TOKENIZER = byte_tokenizer()
MODELS = {mixer: tiny_model(mixer) for mixer in MIXERS}
texts = st.lists(st.text(max_size=8), min_size=1, max_size=4).filter(any)


@torch.no_grad()
def one_target_at_a_time(model, text: str, context: int, stride: int) -> float:
    """The definition: target t sees its window's inputs up to t - 1 and nothing else."""
    ids = torch.tensor([BOS, *text.encode(), EOS])
    total = 0.0
    for target in range(1, len(ids)):
        # The first window whose inputs reach up to the token before the target.
        start = 0
        while start + context < target:
            start += stride
        logits = model(ids[None, start:target], use_cache=False).logits[0, -1]
        total -= logits.double().log_softmax(-1)[ids[target]].item()
    return total


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(MIXERS), texts, st.integers(1, 12), st.data())
def test_scores_equal_the_definition(mixer: str, documents: list[str], context: int, data) -> None:
    model = MODELS[mixer]
    stride = data.draw(st.integers(1, context))
    batch_size = data.draw(st.sampled_from([None, 1, 2, 50]))
    scores = score_documents(
        model, TOKENIZER, documents, context=context, stride=stride, batch_size=batch_size
    )
    expected = [one_target_at_a_time(model, text, context, stride) for text in documents]
    np.testing.assert_allclose(scores.nll, expected, rtol=1e-9)
    assert scores.targets.tolist() == [len(text.encode()) + 1 for text in documents]
    assert scores.bytes.tolist() == [len(text.encode()) for text in documents]


@given(st.integers(2, 60), st.integers(1, 20), st.data())
def test_windows_score_every_target_once(num_tokens: int, context: int, data) -> None:
    stride = data.draw(st.integers(1, context))
    seen = []
    for window in windows(0, num_tokens, context, stride):
        assert 1 <= window.end - window.start <= context
        targets = range(window.first_target, window.end + 1)
        seen += targets
        if window.start:
            assert window.first_target - window.start >= context - stride + 1
    assert seen == list(range(1, num_tokens))


@settings(max_examples=15, deadline=None)
@given(texts, st.integers(1, 9), st.sampled_from([None, 1, 3]))
def test_a_carried_state_sees_the_whole_document(documents, context, batch_size) -> None:
    model = MODELS["retention"]
    carried = score_documents(
        model, TOKENIZER, documents, context=context, batch_size=batch_size, carry_state=True
    )
    whole = score_documents(model, TOKENIZER, documents, context=1000)
    np.testing.assert_allclose(carried.nll, whole.nll, rtol=1e-9)


def test_a_smaller_stride_gives_more_context_and_another_result() -> None:
    def nll(stride: int | None) -> float:
        scores = score_documents(
            MODELS["retention"], TOKENIZER, ["abcdefgh" * 4], context=8, stride=stride
        )
        return scores.nll.sum()

    assert nll(8) == nll(None) != nll(2)


def test_the_figures_are_ratios_of_sums() -> None:
    scores = score_documents(MODELS["attention"], TOKENIZER, ["é", "", "abc"], context=8)
    total = scores.nll.sum()
    assert scores.targets.tolist() == [3, 1, 4]
    assert scores.nats_per_token == pytest.approx(total / 8)
    assert scores.perplexity == pytest.approx(math.exp(total / 8))
    assert scores.bits_per_byte == pytest.approx(total / 5 / math.log(2))


def test_sums_keep_float64_and_bfloat16_is_widened_before_the_softmax() -> None:
    logits = torch.randn(1, 3, 5).bfloat16()
    labels = torch.tensor([[1, -100, 4]])
    nll = token_nll(logits, labels)
    expected = -logits.double().log_softmax(-1)
    assert nll.dtype == torch.float64
    assert nll[0, 1] == 0
    torch.testing.assert_close(nll[0, 0], expected[0, 0, 1], rtol=1e-6, atol=0)


def test_memory_is_bounded_by_the_batch(monkeypatch) -> None:
    """A long document must not go through the model at once."""
    model, sizes = tiny_model("retention"), []
    model.lm_head.register_forward_hook(lambda _, inputs, output: sizes.append(output.numel()))
    score_documents(model, TOKENIZER, ["x" * 5000], context=10, batch_size=4)
    assert max(sizes) <= 4 * 10 * 259
    sizes.clear()
    score_documents(model, TOKENIZER, ["x" * 50_000], context=10)
    assert max(sizes) <= 1 << 23
    sizes.clear()
    documents = ["x" * 500, "y" * 9]
    score_documents(model, TOKENIZER, documents, context=10, batch_size=4, carry_state=True)
    assert max(sizes) == 4 * 10 * 259, "also where the longer document is alone"
    sizes.clear()
    score_documents(model, TOKENIZER, ["x" * 50_000], context=10, carry_state=True)
    assert max(sizes) <= 1 << 23


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 0}, r"context \(0\)"),
        ({"context": 4, "stride": 5}, r"--stride \(5\) must be from 1 to --context \(4\)"),
        ({"context": 4, "stride": 0}, r"stride \(0\)"),
        ({"context": 4, "stride": 2, "carry_state": True}, r"stride \(2\) has no effect"),
    ],
)
def test_windows_that_do_not_fit(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        score_documents(MODELS["retention"], TOKENIZER, ["a"], **options)


def test_attention_carries_no_state() -> None:
    with pytest.raises(UserError, match="--carry-state needs a recurrent model"):
        score_documents(MODELS["attention"], TOKENIZER, ["a"], context=4, carry_state=True)


@pytest.mark.parametrize("documents", [[], [""]])
def test_no_text_is_an_error(documents: list[str]) -> None:
    with pytest.raises(UserError, match="is empty"):
        score_documents(MODELS["retention"], TOKENIZER, documents, context=4)


@pytest.mark.parametrize("mixer", MIXERS)
def test_batches_are_weighted_by_targets(mixer: str) -> None:
    model = tiny_model(mixer).train()
    ids = torch.randint(259, (2, 6), generator=torch.Generator().manual_seed(0))
    labels = ids.roll(-1, dims=1)
    labels[1, 2:] = -100
    segments = torch.tensor([[0, 0, 0, 1, 1, 1], [0] * 6])
    batch = {"input_ids": ids, "shift_labels": labels, "segment_ids": segments}
    single = {"input_ids": ids[:1, :2], "shift_labels": labels[:1, :2]}
    total, targets = evaluate_batches(model, [batch, single])
    assert model.training
    with torch.no_grad():
        loss = model.eval()(**batch).loss.item() * 8 + model(**single).loss.item() * 2
    assert targets == 10
    assert total == pytest.approx(loss, rel=1e-9)
    unpacked = {name: batch[name] for name in ("input_ids", "shift_labels")}
    assert evaluate_batches(model, [unpacked])[0] != evaluate_batches(model, [batch])[0]


def test_no_batches_are_nothing() -> None:
    assert evaluate_batches(MODELS["retention"], []) == (0.0, 0)


@pytest.mark.parametrize("carry_state", [False, True])
def test_the_bar_ends_where_all_is_scored(carry_state: bool, monkeypatch) -> None:
    bars: list[tqdm] = []

    def bar(total: int, title: str | None) -> tqdm:
        bars.append(tqdm(total=total, desc=title, file=io.StringIO()))
        return bars[-1]

    monkeypatch.setattr(scoring, "_bar", bar)
    documents = ["eight...", "two"]
    score_documents(
        MODELS["retention"],
        TOKENIZER,
        documents,
        context=4,
        carry_state=carry_state,
        progress="scoring",
    )
    (one,) = bars
    assert one.n == one.total == len("eight...") + len("two") + 2
