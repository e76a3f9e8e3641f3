"""Tokenizers: any text comes back, spelled-out special tokens are text, training is repeatable."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import retnet.data.tokenizer as module
from retnet.data import byte_tokenizer, encode_documents, load_tokenizer, train_bpe
from retnet.data.tokenizer import tokenizer_hash
from retnet.errors import UserError

TEXTS = ["def f(x):\n    return x + 1\n\n", "the cat sat on the mat <eos> ", "naïve Größe 漢字 🙂"]
BPE_TOKENIZER = train_bpe(TEXTS * 5, 300)
BYTE_TOKENIZER = byte_tokenizer()
ANY_TEXT = st.lists(
    st.one_of(
        st.text(),
        st.sampled_from(["<eos>", "<bos>", "<pad>", "\x00", "\r\n", "   ", "'s", "\x1c", "\u0301"]),
    )
).map("".join)


@pytest.mark.parametrize("tokenizer", [BYTE_TOKENIZER, BPE_TOKENIZER], ids=["bytes", "bpe"])
@settings(deadline=None, max_examples=150)
@given(text=ANY_TEXT)
def test_decode_inverts_encode(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(ids) == text
    (document,) = encode_documents(tokenizer, [text])
    assert document.tolist() == [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    assert tokenizer(text)["input_ids"] == [tokenizer.bos_token_id, *ids]


@settings(deadline=None, max_examples=50)
@given(st.lists(ANY_TEXT))
def test_documents_in_groups_are_documents_alone(texts: list[str]) -> None:
    together = list(encode_documents(BPE_TOKENIZER, texts))
    assert len(together) == len(texts)
    for text, ids in zip(texts, together, strict=True):
        assert ids.tolist() == next(encode_documents(BPE_TOKENIZER, [text])).tolist()


@settings(deadline=None, max_examples=100)
@given(st.text(alphabet="ab' \n\t\x1c\x85.!1é", min_size=0, max_size=300))
def test_pieces_of_a_long_document_give_the_same_tokens(text: str) -> None:
    whole = next(encode_documents(BPE_TOKENIZER, [text]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE_CHARACTERS", 40)
        pieces = list(module._pieces(text))
        cut_at_borders = all(piece[-1:].strip() for piece in pieces[:-1])
        in_pieces = next(encode_documents(BPE_TOKENIZER, [text]))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 40
    if cut_at_borders and all(piece[:1] in {" ", "\n"} for piece in pieces[1:]):
        np.testing.assert_array_equal(in_pieces, whole)


def test_one_huge_word_is_trained_on_and_encoded_quickly() -> None:
    """Without a bound on words, merges over one of a million letters take hours."""
    text = "abcdefghij" * 100_000
    tokenizer = train_bpe([text], 300)
    (ids,) = encode_documents(tokenizer, [text])
    assert tokenizer.decode(ids[1:-1]) == text
    assert len(ids) < len(text) / 5


def test_byte_ids_are_the_bytes() -> None:
    text = "a\n\xff€"
    assert BYTE_TOKENIZER.encode(text, add_special_tokens=False) == list(text.encode())
    specials = ["<bos>", "<eos>", "<pad>"]
    assert BYTE_TOKENIZER.convert_tokens_to_ids(specials) == [256, 257, 258]
    assert len(BYTE_TOKENIZER) == 259


def test_training_is_deterministic_and_keeps_to_its_size() -> None:
    again = train_bpe(iter(TEXTS * 5), 300)
    assert tokenizer_hash(again) == tokenizer_hash(BPE_TOKENIZER)
    assert len(again) == 300
    assert tokenizer_hash(train_bpe(TEXTS * 5, 290)) != tokenizer_hash(again)


def test_a_saved_tokenizer_loads_with_transformers(tmp_path: Path) -> None:
    """A checkpoint's tokenizer must still take "<eos>" for five characters."""
    BPE_TOKENIZER.save_pretrained(tmp_path)
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))):
        text = "x <eos> y"
        assert loaded(text)["input_ids"] == BPE_TOKENIZER(text)["input_ids"]
        assert loaded.eos_token_id not in loaded(text)["input_ids"]
        assert tokenizer_hash(loaded) == tokenizer_hash(BPE_TOKENIZER)


def foreign(folder: Path, **specials: str) -> str:
    """A word tokenizer of somebody else's, with only the given special tokens."""
    vocabulary = {word: index for index, word in enumerate(["[UNK]", "a", "b", "END"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, **specials).save_pretrained(folder)
    return str(folder)


def test_missing_special_tokens_are_added(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(foreign(tmp_path))
    ends = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert sorted(ends) == [4, 5, 6]
    (ids,) = encode_documents(tokenizer, ["a b"])
    assert ids.tolist() == [ends[0], 1, 2, ends[1]]


def test_a_special_token_without_letters_is_missing(tmp_path: Path) -> None:
    """It has no id, and every document needs one to end with."""
    tokenizer = load_tokenizer(foreign(tmp_path, eos_token=""))
    (ids,) = encode_documents(tokenizer, ["a"])
    assert ids.tolist() == [tokenizer.bos_token_id, 1, tokenizer.eos_token_id]
    assert tokenizer.eos_token == "<eos>"


def test_padding_with_the_end_token_is_replaced(tmp_path: Path) -> None:
    """generate cannot tell padding from an end otherwise."""
    tokenizer = load_tokenizer(foreign(tmp_path, eos_token="END", pad_token="END"))
    assert tokenizer.eos_token_id == 3
    assert tokenizer.pad_token_id != 3


def test_truncation_of_a_pretrained_tokenizer_is_off(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(foreign(tmp_path))
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    (ids,) = encode_documents(tokenizer, ["a b a b"])
    assert len(ids) == 6


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bpe", "trained on the corpus"),
        ("nobody/nothing", r"data\.tokenizer \(nobody/nothing\) is no local path, and the Hub"),
        ("./missing", r"data\.tokenizer \(\./missing\) is not a folder"),
    ],
)
def test_tokenizers_that_are_not_there(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_tokenizer(name)


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"without a tokenizer"):
        load_tokenizer(str(tmp_path))


def test_documents_are_read_as_they_are_needed() -> None:
    read = 0

    def texts() -> Iterator[str]:
        nonlocal read
        while True:
            read += 1
            yield "word " * 20_000

    next(encode_documents(BPE_TOKENIZER, texts()))
    assert read < 20


def test_a_path_is_always_a_folder_and_named_as_asked(tmp_path: Path, monkeypatch) -> None:
    """One that begins with ~ is of no user: ./~m was typed."""
    monkeypatch.chdir(tmp_path)
    byte_tokenizer().save_pretrained("~m")
    assert load_tokenizer(Path("~m")).get_vocab() == byte_tokenizer().get_vocab()
    (tmp_path / "~m/tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"^tokenizer of x \(~m\) is a folder without a tokenizer"):
        load_tokenizer(Path("~m"), "tokenizer of x")


def test_a_document_without_an_end(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match=r"has no eos_token, which every document has: set eos_tok"):
        list(encode_documents(tokenizer, ["a"]))
