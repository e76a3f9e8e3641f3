"""Documents into token files: in pieces where they are long, cut where max_tokens says so."""

import io
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

import retnet.data.tokenizer as tokenizer_module
from retnet.data import DataSpec, TokenFile, byte_tokenizer, prepare_data, train_bpe
from retnet.data.writing import phase, write_tokens

TOKENIZERS = {"bytes": byte_tokenizer(), "bpe": train_bpe(["the cat sat on the mat é "] * 9, 270)}
TEXTS = st.lists(st.text(alphabet="the cat\né", min_size=1, max_size=200), min_size=1, max_size=6)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None, max_examples=60)
@given(texts=TEXTS, share=st.floats(0.01, 1.2))
def test_a_file_holds_the_first_tokens_of_all_documents(
    name: str, texts: list[str], share: float
) -> None:
    tokenizer = TOKENIZERS[name]
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(tokenizer_module, "PIECE_CHARACTERS", 40)
        whole = list(tokenizer_module.encode_documents(tokenizer, texts))
        limit = max(1, int(share * sum(map(len, whole))))
        facts = write_tokens(Path(folder) / "t", iter(texts), tokenizer, limit, "test")
        file = TokenFile.open(Path(folder) / "t")
        assert file.tokens.tolist() == np.concatenate(whole)[:limit].tolist()
        starts = np.cumsum([0, *map(len, whole)])[:-1]
        assert file.document_starts.tolist() == [start for start in starts if start < limit]
        sizes = [len(text.encode()) for text in texts][: file.num_documents]
        assert file.document_bytes[:-1].tolist() == sizes[:-1]
        cut = starts[file.num_documents - 1] + len(whole[file.num_documents - 1]) > limit
        assert 0 <= file.document_bytes[-1] <= sizes[-1]
        assert cut or file.document_bytes[-1] == sizes[-1]
        assert facts["bytes"] == file.num_bytes and facts["tokens"] == file.num_tokens
        # the hash is that of the documents in the file, whatever the encoder had read ahead
        again = iter(texts[: file.num_documents])
        assert (
            write_tokens(Path(folder) / "u", again, tokenizer, None, "test")["sha256"]
            == (facts["sha256"])
        )


def test_memory_holds_the_text_of_one_long_document(
    tmp_path: Path, spec_for: Callable[..., DataSpec]
) -> None:
    """The text, its bytes for the hash, and a piece; all of its tokens were 13 bytes a byte."""
    size = 16_000_000
    (tmp_path / "long.txt").write_text("0123456 " * (size // 8))
    (tmp_path / "validation.txt").write_text("held back")
    spec = spec_for(
        tmp_path / "long.txt", streaming=True, validation=str(tmp_path / "validation.txt")
    )
    tracemalloc.start()
    try:
        prepared = prepare_data(spec)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert prepared.train.num_tokens == size + 2
    assert peak < 3 * size


@pytest.mark.parametrize("limit", [None, 18, 23])
def test_a_piece_without_ids_is_not_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int | None
) -> None:
    """The rest of a document after a long run of spaces, and its end, were dropped."""
    backend = Tokenizer(WordLevel({"<bos>": 0, "<eos>": 1, "<unk>": 2, "cat": 3}, "<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<unk>"
    )
    monkeypatch.setattr(tokenizer_module, "PIECE_CHARACTERS", 40)
    text = "cat " * 20 + " " * 200 + "cat " * 20
    write_tokens(tmp_path / "t", iter([text]), tokenizer, limit, "test")
    file = TokenFile.open(tmp_path / "t")
    assert file.tokens.tolist() == [0, *[3] * 40, 1][:limit]
    assert file.document_starts.tolist() == [0]
    assert file.num_bytes == len(text) if limit is None else 0 < file.num_bytes < len(text)


def test_a_bar_obeys_no_name(monkeypatch) -> None:
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", stream)
    with phase("reading x\x1b]0;owned\x07\ny"):
        pass
    assert "owned" in stream.getvalue() and "\x1b]" not in stream.getvalue()
    assert "\ny" not in stream.getvalue()
