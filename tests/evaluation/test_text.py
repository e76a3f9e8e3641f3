"""Which documents are compared on, and when --text has to name them."""

import json
from pathlib import Path

import pytest

from retnet.checkpoints import Checkpoint
from retnet.data import DataSpec, prepare_data
from retnet.errors import UserError
from retnet.evaluation import text_of_file, validation_text
from retnet.evaluation.text import _recorded_files
from tests.generation.builders import byte_tokenizer, tiny_model


def prepare(folder: Path, word: str = "word") -> dict:
    corpus = folder / f"{word}.txt"
    corpus.write_text(f"{word} " * 100)
    spec = DataSpec(
        source=str(corpus), tokenizer="bytes", seq_len=8, cache_dir=str(folder / "cache")
    )
    return prepare_data(spec).record


def checkpoint(name: str, record: dict | None) -> Checkpoint:
    return Checkpoint(Path(name), tiny_model("retention"), byte_tokenizer(), record)


def test_validation_data_is_rebuilt_from_the_first_record(tmp_path: Path) -> None:
    record = prepare(tmp_path)
    text = validation_text([checkpoint("a", record), checkpoint("b", record)])
    assert list(text.documents) == [("word " * 100)[450:]]
    assert text.num_bytes == 50
    assert str(tmp_path / "word.txt") in text.description
    assert record["corpus_sha256"][:12] in text.description


def test_the_standard_library_comes_with_its_python_version() -> None:
    from retnet.evaluation.text import describe_corpus

    record = {
        "source": {"kind": "python-stdlib", "python": "3.11.7"},
        "validation_source": None,
        "corpus_sha256": "0123456789abcdef",
    }
    assert describe_corpus(record) == "python-stdlib (Python 3.11.7, corpus 0123456789ab)"


def test_other_validation_data_asks_for_text(tmp_path: Path) -> None:
    models = [
        checkpoint("runs/a", prepare(tmp_path)),
        checkpoint("runs/b", prepare(tmp_path, "other")),
    ]
    with pytest.raises(UserError, match=r"runs/b was validated on other data .*--text FILE"):
        validation_text(models)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("split", None),
        ("split", {}),
        ("split", {"kind": "tail", "fraction": 0.1, "threshold": "many"}),
        ("source", None),
        ("source", {"kind": "files"}),
        ("validation_source", "x"),
        ("documents_read", "x"),
        ("documents_read", -1),
        ("documents_read", True),
    ],
)
def test_an_incomplete_record_asks_for_text(tmp_path: Path, key: str, value: object) -> None:
    record = {name: entry for name, entry in prepare(tmp_path).items() if name != key}
    if value is not None:
        record[key] = value
    with pytest.raises(UserError, match=r"data record \(data\.json\) is damaged.*--text FILE"):
        validation_text([checkpoint("a", record), checkpoint("b", record)])


def test_no_record_asks_for_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"runs/b has no data\.json .*--text FILE"):
        validation_text([checkpoint("a", prepare(tmp_path)), checkpoint("runs/b", None)])


def test_a_corpus_that_is_gone_or_changed_asks_for_text(tmp_path: Path) -> None:
    record = prepare(tmp_path)
    (tmp_path / "word.txt").write_text("text " * 100)
    with pytest.raises(UserError, match="--text FILE"):
        validation_text([checkpoint("a", record)])
    (tmp_path / "word.txt").unlink()
    with pytest.raises(UserError, match=r"word\.txt.*--text FILE"):
        validation_text([checkpoint("a", record)])


def test_a_file_of_rows_is_one_document_a_row(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"body": text}) for text in ("a", "", "é")))
    text = text_of_file(file, "body")
    assert (list(text.documents), text.num_bytes) == (["a", "é"], 3)


def test_a_missing_field_is_named_as_the_option(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"body": "a"}')
    with pytest.raises(UserError, match=r"--text-field \(text\) .*\(body\)"):
        text_of_file(tmp_path / "rows.jsonl")


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--text .* does not exist"):
        text_of_file(tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match=r"--text .* is empty"):
        text_of_file(tmp_path / "empty.txt")


def test_half_a_surrogate_pair_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800"}')
    with pytest.raises(UserError, match=r"a\.jsonl document 1 holds half a surrogate pair at cha"):
        text_of_file(tmp_path / "a.jsonl")


def test_a_field_of_plain_text_is_named_as_it_was_given(tmp_path: Path, caplog) -> None:
    (tmp_path / "a.txt").write_text("x")
    text_of_file(tmp_path / "a.txt", "body")
    assert caplog.messages == [
        f"--text-field (body) has no effect: {tmp_path / 'a.txt'} holds plain text"
    ]


def test_a_training_text_that_the_record_does_not_place() -> None:
    """It is asked for where results could be written over it."""
    for source in ({"kind": "files"}, {"kind": 3}, {"kind": "files", "location": 3}, {}, None):
        assert _recorded_files({"source": source, "validation_source": None}) == ()
