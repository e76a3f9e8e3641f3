"""Conversations as tokens: the template's ids, answers as targets, text that spells no marker."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import retnet.data.streaming as streaming
from retnet.data import CarriedBatches, TrainingBatches, ValidationBatches, prepare_data
from retnet.data.chat import CHATML, MARKERS, ChatFormat, prepare_for_chat
from retnet.data.messages import Conversation
from retnet.data.tokenizer import load_tokenizer, train_bpe
from retnet.errors import UserError
from tests.conversations import END, SPELLED, START, chat_tokenizer, rows, turns, write_rows
from tests.generation.builders import byte_tokenizer

BPE = train_bpe([f"user\n{i} hello world assistant\n\n" for i in range(9)], 300, MARKERS)
prepare_for_chat(BPE)
LETTERS = st.text(alphabet="ab é\n\t'<|", max_size=8).filter(str.strip)

# Forms of other families. None has a marker before each message as ChatML does.
ZEPHYR = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token }}[INST] "
    "{{ m['content'] | trim }} [/INST]{% elif m['role'] == 'assistant' %} {{ m['content'] | trim "
    "}} {{ eos_token }}{% else %}{{ raise_exception('no system here') }}{% endif %}{% endfor %}"
)


def encoded(tokenizer, messages):
    """Ids, and those that are targets, of one conversation."""
    ((_, piece),) = ChatFormat(tokenizer).encode([Conversation.of(messages, "a test")])
    counts = np.searchsorted(piece.bounds, np.arange(len(piece.ids)), side="right") % 2 == 1
    return piece.ids.tolist(), counts, piece.num_bytes


@settings(max_examples=10, deadline=None)
@given(st.lists(LETTERS, min_size=2, max_size=5), st.booleans())
def test_ids_and_targets_are_those_of_apply_chat_template(said: list[str], bpe: bool) -> None:
    tokenizer = BPE if bpe else chat_tokenizer()
    messages = turns(*said, system=said[0])
    expected = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, counts, num_bytes = encoded(tokenizer, messages)
    assert ids == expected["input_ids"]
    assert counts.astype(int).tolist() == expected["assistant_masks"]
    assert num_bytes == sum(len(text.encode()) for text in said[1::2])


def test_text_that_spells_markers_is_text() -> None:
    tokenizer = chat_tokenizer()
    ids, counts, _ = encoded(tokenizer, turns(SPELLED, SPELLED, system=SPELLED))
    assert ids.count(END) == ids.count(START) == 3 and tokenizer.eos_token_id not in ids
    assert tokenizer.decode(np.array(ids)[counts]) == f"{SPELLED.strip()}<|im_end|>"


def test_a_marker_is_one_token_after_saving_and_loading(tmp_path: Path) -> None:
    """It was cut into letters: the tokenizers were saved with split_special_tokens."""
    chat_tokenizer().save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == CHATML
    for tokenizer in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)):
        text = tokenizer.apply_chat_template(turns("a", "b"), tokenize=False)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ids == encoded(tokenizer, turns("a", "b"))[0] and ids.count(END) == 2
        assert tokenizer(text, add_special_tokens=False).input_ids == ids  # after our own call
        tokenizer.save_pretrained(tmp_path / "again")
        again = AutoTokenizer.from_pretrained(tmp_path / "again")
        assert again("<|im_end|>", add_special_tokens=False).input_ids == [END]
    plain = byte_tokenizer()
    plain.save_pretrained(tmp_path / "plain")
    loaded = load_tokenizer(tmp_path / "plain")
    assert len(loaded("<eos>", add_special_tokens=False).input_ids) == 5  # as ever


@pytest.mark.parametrize(("template", "said"), [(ZEPHYR, "a {}</s>"), (LLAMA2, "a {} </s>")])
def test_a_template_of_its_own_is_kept(template: str, said: str) -> None:
    tokenizer = train_bpe(["user assistant hello INST"], 300)
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    tokenizer.chat_template = template
    prepared = prepare_for_chat(tokenizer)
    assert not prepared and tokenizer.chat_template == template
    messages = turns("q 1", "a 1", "q 2", "a 2")
    ids, counts, _ = encoded(tokenizer, messages)
    assert ids == tokenizer.apply_chat_template(messages, return_dict=False)
    targets = tokenizer.decode(np.array(ids)[counts])
    assert targets.replace(" ", "") == (said.format(1) + said.format(2)).replace(" ", "")
    if template is LLAMA2:
        with pytest.raises(UserError, match=r"fails on messages of system, user.*no system here"):
            encoded(tokenizer, turns("a", "b", system="c"))


def test_of_several_templates_the_default_is_kept(tmp_path: Path) -> None:
    """The others were written into a folder, of which a checkpoint has no description."""
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = {"default": CHATML, "tool_use": "no"}
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "additional_chat_templates").is_dir()
    assert load_tokenizer(tmp_path).chat_template == CHATML


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages %}{{ m.content | upper }}</s>{% endfor %}", "changes what messages"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "does not end each answer with"),
        ("{{ messages[0].nothing.content }}", "fails on messages of user, assistant"),
        ("{% if %}", "fails on messages of user, assistant"),
    ],
)
def test_a_template_that_cannot_be_followed_is_refused(template: str, words: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=f"its chat template {words}"):
        prepare_for_chat(tokenizer)


@pytest.fixture
def spec(spec_for, tmp_path: Path):
    def make(**options: object):
        path = write_rows(tmp_path / "rows.jsonl")
        return spec_for(path, **{"format": "messages", **options})

    return make


def documents_of(tokens) -> list[list[int]]:
    return [part.tolist() for part in np.split(tokens.tokens, tokens.document_starts[1:])]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_what_is_prepared(spec, tokenizer: str) -> None:
    options = {"tokenizer": "bpe", "vocab_size": 290} if tokenizer == "bpe" else {}
    data = prepare_data(spec(**options))
    sides = [*documents_of(data.train), *documents_of(data.validation)]
    wanted = [
        data.tokenizer.apply_chat_template(row["messages"], return_dict=False) for row in rows()
    ]
    assert sorted(sides) == sorted(wanted)  # whole conversations, each on one side
    for side in (data.train, data.validation):
        counts = side.counts(np.arange(side.num_tokens))
        ends = [(np.array(part)[own] == data.tokenizer.convert_tokens_to_ids("<|im_end|>")).sum()
                for part, own in zip(documents_of(side), np.split(counts, side.document_starts[1:]),
                                     strict=True)]  # fmt: skip
        assert sum(ends) == len(side.answer_bounds) // 2 and min(ends) >= 1
        assert side.num_targets == counts.sum()
        said = data.tokenizer.decode(side.tokens[counts]).replace("<|im_end|>", "")
        assert side.num_bytes == len(said.encode())


def test_batches_count_answers_alone(spec) -> None:
    data = prepare_data(spec(seq_len=16))
    tokens, cut = data.train, {"seq_len": 16, "batch_size": 4, "seed": 0}
    where = tokens.counts(np.arange(tokens.num_tokens))
    for batches in (TrainingBatches(tokens, **cut), CarriedBatches(tokens, **cut)):
        seen = 0
        for step in range(2 * batches.windows_per_epoch // 4):
            batch = batches.batch(step)
            counted = batch["shift_labels"] != -100
            assert batches.num_targets(step) == counted.sum()
            seen += int(counted.sum())
        assert 0 < seen <= 2 * where.sum()
    for most in (None, 200):
        batches = ValidationBatches(data.validation, seq_len=16, batch_size=3, max_tokens=most)
        labels = [batch["shift_labels"] for batch in batches]
        assert batches.num_targets == sum(int((own != -100).sum()) for own in labels)
        share = batches.num_targets / data.validation.num_targets
        assert batches.num_bytes == pytest.approx(share * data.validation.num_bytes, rel=0.15)


def test_few_conversations_are_held_back_whole(spec_for, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "two.jsonl", rows(2))
    data = prepare_data(spec_for(path, format="messages"))
    assert data.train.num_documents == data.validation.num_documents == 1
    path = write_rows(tmp_path / "one.jsonl", rows(1) * 3)
    with pytest.raises(UserError, match="has one conversation, or equal ones"):
        prepare_data(spec_for(path, format="messages"))


def test_training_tokens_that_end_before_an_answer(spec) -> None:
    with pytest.raises(UserError, match=r"data\.max_tokens \(9\) ends before the first answer of"):
        prepare_data(spec(max_tokens=9))
    data = prepare_data(spec(max_tokens=100))
    assert data.train.num_tokens == 100 and data.train.answer_bounds[-1] <= 100


def test_a_killed_stream_goes_on(spec, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = prepare_data(spec(streaming=True, cache_dir=spec().cache_dir + "2"))
    monkeypatch.setattr(streaming, "BATCH_CHARACTERS", 400)
    monkeypatch.setattr(streaming, "COMMIT_BYTES", 400)
    real, calls = streaming._commit, []

    def killed(*arguments) -> None:
        real(*arguments)
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(streaming, "_commit", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare_data(spec(streaming=True))
    again = prepare_data(spec(streaming=True))
    for one, other in ((whole.train, again.train), (whole.validation, again.validation)):
        assert np.array_equal(one.tokens, other.tokens)
        assert np.array_equal(one.answer_bounds, other.answer_bounds)
    assert whole.record == again.record


def test_another_template_is_another_preparation(spec, tmp_path: Path, builds) -> None:
    tokenizer = chat_tokenizer()
    tokenizer.save_pretrained(tmp_path / "t")
    prepare_data(spec(tokenizer=str(tmp_path / "t")))
    prepare_data(spec(tokenizer=str(tmp_path / "t")))
    assert len(builds) == 1
    tokenizer.chat_template = CHATML.replace("{{- bos_token -}}", "")
    tokenizer.save_pretrained(tmp_path / "t")
    data = prepare_data(spec(tokenizer=str(tmp_path / "t")))
    assert len(builds) == 2 and data.train.tokens[0] == START


def test_a_damaged_file_of_bounds_is_made_again(spec, builds) -> None:
    folder = Path(spec().cache_dir)
    prepare_data(spec())
    (file,) = folder.glob("*/train/answer_bounds.npy")
    file.write_bytes(file.read_bytes()[:-8])
    prepare_data(spec())
    assert len(builds) == 2


def test_what_has_no_template_is_named() -> None:
    without, slow = chat_tokenizer(), SimpleNamespace(name_or_path="own", chat_template=CHATML)
    without.chat_template = None
    for tokenizer, name in ((without, type(without).__name__), (slow, "own")):
        with pytest.raises(UserError, match=rf"^tokenizer \({name}\) has no chat template"):
            ChatFormat(tokenizer)
