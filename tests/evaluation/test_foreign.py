"""Models of transformers' own: scored by the same windows, and measured by the same clock."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import ByT5Tokenizer, GPT2LMHeadModel, PreTrainedTokenizerFast

from retnet.checkpoints import Checkpoint
from retnet.errors import UserError
from retnet.evaluation import (
    EvaluationText,
    compare_checkpoints,
    costs,
    decode_speed,
    format_comparison,
    load_contender,
    score_documents,
    to_json,
)
from retnet.evaluation.foreign import ForeignMemory, ForeignModel
from retnet.evaluation.report import Reach, contents, find_out
from retnet.evaluation.report.curves import styles
from retnet.evaluation.report.pictures import _contexts
from retnet.evaluation.speed import DecodeSpeed
from retnet.evaluation.tokens import identity, tokens_of
from tests.evaluation.foreign import WINDOW, save_foreign
from tests.generation.builders import BOS, EOS, VOCAB, byte_tokenizer, save_checkpoint, tiny_model
from tests.model.conftest import make_model
from tests.model.mixers.test_attention import llama_of

DOCUMENTS = [f"document {i} of <bos> some é " * (i % 3 + 1) for i in range(6)]
TEXT = EvaluationText("some text", DOCUMENTS)
KINDS = ("gpt2", "llama", "mamba")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("foreign")
    for kind in KINDS:
        save_foreign(folder / kind, kind)
    return folder


@pytest.fixture(scope="module")
def contenders(folders: Path) -> dict[str, Checkpoint]:
    return {kind: load_contender(str(folders / kind)) for kind in KINDS}


def by_hand(model, ids: list[int], context: int) -> float:
    """The sum of -log p of all tokens but the first, in float64, in windows without overlap."""
    total = 0.0
    for start in range(0, len(ids) - 1, context):
        window = torch.tensor([ids[start : start + context + 1]])
        logits = model(window[:, :-1]).logits[0]
        chances = logits.log_softmax(-1)
        total -= chances[torch.arange(len(chances)), window[0, 1:]].sum().item()
    return total


def test_a_llama_of_our_weights_has_our_figures(tmp_path: Path) -> None:
    """The same weights by another's code, and the same tokenizer: the same nats and bits."""
    options = {"vocab_size": VOCAB, "norm": "rmsnorm", "ffn": "swiglu"}
    ours = make_model("attention", torch.float64, **options)
    byte_tokenizer().save_pretrained(tmp_path)
    llama_of(ours).save_pretrained(tmp_path)
    theirs = load_contender(tmp_path)
    assert isinstance(theirs.model, ForeignModel) and theirs.mixer == "llama"
    own = Checkpoint(Path("ours"), ours.eval(), byte_tokenizer(), None)
    comparison = compare_checkpoints([own, theirs], TEXT, context=7, stride=3)
    first, second = comparison.models
    assert second.same_tokenizer and first.parameters == second.parameters
    assert second.scores.nats_per_token == pytest.approx(first.scores.nats_per_token, abs=1e-6)
    assert second.scores.bits_per_byte == pytest.approx(first.scores.bits_per_byte, abs=1e-6)
    np.testing.assert_allclose(second.scores.nll, first.scores.nll, rtol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("eos", [True, False])
def test_figures_of_gpt2_by_hand(folders: Path, eos: bool) -> None:
    model = GPT2LMHeadModel.from_pretrained(folders / "gpt2").double().eval()
    found = load_contender(folders / "gpt2", dtype=torch.float64)
    scores = score_documents(found.model, found.tokenizer, DOCUMENTS, context=9, eos=eos)
    end = [EOS] if eos else []
    expected = [by_hand(model, [BOS, *text.encode(), *end], 9) for text in DOCUMENTS]
    np.testing.assert_allclose(scores.nll, expected, rtol=1e-9)
    assert scores.targets.tolist() == [len(text.encode()) + eos for text in DOCUMENTS]
    sizes = sum(len(text.encode()) for text in DOCUMENTS)
    assert scores.bits_per_byte == pytest.approx(sum(expected) / math.log(2) / sizes)


@torch.no_grad()
def test_no_eos_leaves_out_the_last_target_of_ours() -> None:
    model, tokenizer = tiny_model("retention"), byte_tokenizer()
    for carry in (False, True):
        options = {"context": 9, "carry_state": carry, "eos": False}
        scores = score_documents(model, tokenizer, ["abc" * 9, ""], **options)
        ids = [BOS, *(b"abc" * 9)]
        expected = by_hand(model, ids, len(ids) if carry else 9)
        assert scores.nll.tolist() == pytest.approx([expected, 0])
        assert scores.targets.tolist() == [27, 0]


def test_the_beginning_stands_once_and_special_tokens_in_a_text_are_text() -> None:
    """lm-eval's default asks a tokenizer that adds <bos> for one more; here none is doubled."""
    tokenizer, model = byte_tokenizer(), tiny_model("retention")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", pair="$A $B", special_tokens=[("<bos>", BOS)]
    )
    assert tokenizer("ab")["input_ids"] == [BOS, *b"ab"]
    (ids,) = tokens_of(model, tokenizer, ["ab<bos>"])
    assert ids.tolist() == [BOS, *b"ab<bos>", EOS]


def without(*ends: str):
    tokenizer = byte_tokenizer()
    for name in ends:
        setattr(tokenizer, f"{name}_token", None)
    return tokenizer


@torch.no_grad()
def test_a_tokenizer_without_bos_begins_with_eos(tmp_path: Path) -> None:
    path = save_foreign(tmp_path / "m", "gpt2", without("bos"), dtype=torch.float64)
    found = load_contender(path)
    (ids,) = tokens_of(found.model, found.tokenizer, ["ab"])
    assert ids.tolist() == [EOS, *b"ab", EOS]
    comparison = compare_checkpoints([found, found], TEXT)
    said = " m has its <eos>, <eos>, in place of <bos>. 2 m has"
    assert said in " ".join(format_comparison(comparison).split())
    assert to_json(comparison, [])["models"][0]["begins_with"] == "<eos>"


@torch.no_grad()
def test_a_tokenizer_without_both_ends(tmp_path: Path) -> None:
    """A first token costs as one of the vocabulary; the end is nobody's target."""
    path = save_foreign(tmp_path / "m", "gpt2", without("bos", "eos"), dtype=torch.float64)
    found = load_contender(path)
    with pytest.raises(UserError, match=r"has no <eos>.* add --no-eos"):
        compare_checkpoints([found, found], TEXT)
    comparison = compare_checkpoints([found, found], TEXT, context=9, eos=False)
    scores = comparison.models[0].scores
    model = GPT2LMHeadModel.from_pretrained(path).double().eval()
    expected = [by_hand(model, [*text.encode()], 9) + math.log(VOCAB) for text in DOCUMENTS]
    np.testing.assert_allclose(scores.nll, expected, rtol=1e-9)
    assert scores.targets.tolist() == [len(text.encode()) for text in DOCUMENTS]
    table = " ".join(format_comparison(comparison).split())
    assert "without <eos> at the end of a document (--no-eos)" in table
    assert "has no <bos> or <eos>: of a document's first token all" in table
    content = to_json(comparison, [])
    assert content["eos_scored"] is False and content["models"][0]["begins_with"] is None


@torch.no_grad()
def test_a_slow_tokenizer(tmp_path: Path) -> None:
    """ByT5's: a byte is an id of its own, three higher; no <bos>."""
    tokenizer = ByT5Tokenizer(extra_ids=0)
    path = save_foreign(tmp_path / "m", "gpt2", tokenizer, dtype=torch.float64)
    found = load_contender(path)
    (ids,) = tokens_of(found.model, found.tokenizer, ["é</s>"])
    end = tokenizer.eos_token_id
    assert ids.tolist() == [end, *(byte + 3 for byte in "é</s>".encode()), end]
    scores = score_documents(found.model, found.tokenizer, ["é", "ab"], context=9)
    assert scores.targets.tolist() == [3, 3] and np.isfinite(scores.nll).all()
    assert identity(found.tokenizer) == identity(load_contender(path).tokenizer)
    assert identity(found.tokenizer) != identity(ByT5Tokenizer(extra_ids=9))


def test_what_a_tokenizer_does_not_know_is_said(tmp_path: Path, caplog) -> None:
    backend = Tokenizer(WordLevel({"[UNK]": 0, "a": 1, "<s>": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="<s>", unk_token="[UNK]"
    )
    found = load_contender(save_foreign(tmp_path / "m", "gpt2", tokenizer))
    score_documents(found.model, found.tokenizer, ["a a"], context=9)
    assert "[UNK]" not in caplog.text
    score_documents(found.model, found.tokenizer, ["a b c"], context=9)
    assert "has [UNK] for 2 tokens of the text" in caplog.text


def test_a_vocabulary_beyond_the_models(contenders: dict[str, Checkpoint]) -> None:
    model, tokenizer = contenders["gpt2"].model, byte_tokenizer((("a", "b"), ("c", "d")))
    with pytest.raises(UserError, match=r"gives an id \(259\) beyond the model's vocab_size \(259"):
        score_documents(model, tokenizer, ["ab"], context=9)


def test_a_model_that_fails_on_a_length(contenders: dict[str, Checkpoint]) -> None:
    """As Roberta's, which has two positions less than it says."""
    model = contenders["gpt2"].model
    with pytest.raises(UserError, match=r"fails on 1 rows of 33 tokens \(.*take shorter windows"):
        model(torch.zeros(1, 33, dtype=torch.int64))


def test_decoding_is_that_of_the_whole_text(contenders: dict[str, Checkpoint]) -> None:
    """And bytes are those of the memory, which grows or does not."""
    models = [contenders[kind].model for kind in KINDS]
    for model in models:
        assert model.decodes(1) and model.decodes(4)
    gpt2, llama, mamba = decode_speed(models, (4, 8, 64), tokens=2, rounds=2)
    a_token = 2 * 2 * 16 * 4  # keys and values of two layers, 16 wide, in float32
    for own in (gpt2, llama):
        assert [one.cache_bytes for one in own] == [4 * a_token, 8 * a_token, None]
    assert mamba[0].cache_bytes == mamba[2].cache_bytes > 0
    assert 0 < mamba[2].ms_low <= mamba[2].ms_per_token and mamba[2].prefill_s > 0
    assert not gpt2[2].stopped  # beyond its positions nothing is defined
    ((four,),) = decode_speed(models[:1], (4,), rows=4, tokens=2, rounds=2)
    assert four.cache_bytes == 16 * a_token


def test_a_memory_that_is_copied_is_left_alone(contenders: dict[str, Checkpoint]) -> None:
    model = contenders["gpt2"].model
    memory = model.new_cache()
    ids = torch.tensor([[1, 2, 3]])
    with torch.inference_mode():
        model(ids, past_key_values=memory, use_cache=True)
    size = memory.num_bytes()
    own = copy.deepcopy(memory)
    with torch.inference_mode():
        model(ids, past_key_values=own, use_cache=True)
    assert memory.num_bytes() == size and own.num_bytes() == 2 * size
    assert ForeignMemory().num_bytes() == 0


def test_a_model_whose_single_tokens_are_wrong_does_not_decode(folders: Path, monkeypatch) -> None:
    inner = GPT2LMHeadModel.from_pretrained(folders / "gpt2").eval()
    own = inner.forward

    def forgetful(input_ids, cache=None, past_key_values=None, logits_to_keep=0, **options):
        return own(input_ids, **options)

    monkeypatch.setattr(inner, "forward", forgetful)
    model = ForeignModel(inner)
    assert not model.decodes(1)
    ((one,),) = decode_speed([model], (4,), tokens=2, rounds=2, limit_s=9.0)
    assert one.ms_per_token is None and not one.stopped

    def failing(input_ids, cache=None, past_key_values=None, use_cache=False, **options):
        if use_cache:
            raise ValueError("no cache today")
        return own(input_ids, use_cache=False)

    monkeypatch.setattr(inner, "forward", failing)
    model = ForeignModel(inner)
    assert not model.decodes(1)
    assert score_documents(model, byte_tokenizer(), DOCUMENTS, context=9).nats_per_token > 0


def test_lengths_that_nothing_holds(contenders: dict[str, Checkpoint], monkeypatch) -> None:
    checkpoint = contenders["mamba"]
    with pytest.raises(UserError, match=r"--contexts \(999,999,999,999,999\) needs"):
        compare_checkpoints([checkpoint, checkpoint], TEXT, speed_contexts=(999_999_999_999_999,))
    monkeypatch.setattr("retnet.evaluation.scoring.memory_of", lambda device: 8 * VOCAB * 20)
    with pytest.raises(UserError, match=r"a window of 25 tokens .* take at most 20"):
        compare_checkpoints([checkpoint, checkpoint], TEXT, context=25)
    assert compare_checkpoints([checkpoint, checkpoint], TEXT, context=20).context == 20


def test_the_window_that_nobody_asked_for(contenders: dict[str, Checkpoint], tmp_path) -> None:
    """The first model's training window; of others at most 2,048 tokens, and so many if none."""
    for kind, context in (("gpt2", WINDOW), ("mamba", 2048)):
        checkpoint = contenders[kind]
        assert compare_checkpoints([checkpoint, checkpoint], TEXT).context == context
    path = save_foreign(tmp_path, "llama", max_position_embeddings=1_000_000)
    long = load_contender(path)
    assert compare_checkpoints([long, long], TEXT).context == 2048


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"context": 33}, r"--context \(33\) is beyond the 32 tokens for which a GPT2LMHeadModel"),
        ({"carry_state": True}, "--carry-state is for models of this package, and a GPT2LMHeadMod"),
    ],
)
def test_windows_that_do_not_fit(contenders, options: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        compare_checkpoints([contenders["gpt2"]] * 2, TEXT, **options)


def test_a_report_of_ours_and_others(contenders, monkeypatch, tmp_path: Path) -> None:
    """Where something is not to be had from a model, the others have it."""
    ours = load_contender(save_checkpoint(tmp_path / "ours"))
    checkpoints = [ours, *contenders.values()]
    comparison = compare_checkpoints(checkpoints, TEXT, eos=False, speed_contexts=(4,))
    monkeypatch.setattr(costs, "STEP_TOKENS", 8)
    monkeypatch.setattr(costs, "ROUNDS", 1)
    reach = Reach((2,), (4, 64), peaks=False)
    findings = find_out(checkpoints, comparison, reach)
    assert findings.carried[0] and findings.carried[1:] == [None] * 3
    assert findings.trained == [16, WINDOW, WINDOW, None] and findings.windows[1:] == [[]] * 3
    assert findings.weights[0] and findings.weights[1:] == [None] * 3
    profiles = findings.profiles
    for one, model in zip(profiles, comparison.models, strict=True):
        targets = sum(loss.targets for loss in one.by_position.values())
        assert targets == model.scores.targets.sum()  # without <eos>
    assert profiles[0].by_context[64] and profiles[3].by_context[64]
    assert profiles[1].by_context[WINDOW] and profiles[1].by_context[64] is None
    _, gpt2, llama, mamba = findings.costs
    assert gpt2.training[0].tokens_per_second and gpt2.training[1].tokens_per_second is None
    assert mamba.training[1].tokens_per_second and llama.by_batch[0].tokens_per_second
    monkeypatch.setattr(contents, "pictures", lambda findings: list(_contexts(findings)))
    page = contents.page_of(findings, ["compare.py"])
    assert any("without <eos> at the end of a document" in line for line in page.about)
    assert any("not defined" in row for table in page.tables for row in table.rows)
    assert [picture.name for picture in page.pictures] == ["contexts"]
    found = styles(findings)
    assert len({(one["color"], one["linestyle"]) for one in found}) == len(found)


@pytest.mark.slow
def test_peaks_of_training_in_a_process_of_its_own(contenders) -> None:
    (own,) = costs.measure_costs(
        [contenders["gpt2"]], by_context=[[DecodeSpeed(4)]], batches=[1], lengths=[8], limit_s=60
    )
    assert own.training[0].row_bytes is not None and own.training[0].row_bytes >= 0
