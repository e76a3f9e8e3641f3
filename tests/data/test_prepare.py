"""The whole preparation: what is made, kept and noticed."""

import json
import logging
import os
import shutil
import time
from pathlib import Path

import pytest

from retnet.data import prepare_data, rebuild_validation, train_bpe
from retnet.data.tokenizer import byte_tokenizer
from retnet.errors import UserError
from tests.data.conftest import SpecFor, entries, write_documents


def test_both_sides_hold_the_documents(tmp_path: Path, spec_for: SpecFor) -> None:
    path = write_documents(tmp_path / "a.jsonl")
    prepared = prepare_data(spec_for(path))
    everything = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    held_back = rebuild_validation(json.loads(json.dumps(prepared.record)))
    trained = [text for text in everything if text not in held_back]
    assert held_back and trained
    for tokens, expected in ((prepared.train, trained), (prepared.validation, held_back)):
        text = "".join(f"<bos>{text}<eos>" for text in expected)
        assert prepared.tokenizer.decode(tokens.tokens.tolist()) == text
        assert tokens.document_bytes.tolist() == [len(text.encode()) for text in expected]
        assert (tokens.tokens[tokens.document_starts] == 256).all()
        assert prepared.record["train" if tokens is prepared.train else "validation"] == {
            "documents": len(expected),
            "bytes": tokens.num_bytes,
            "tokens": tokens.num_tokens,
        }


@pytest.mark.parametrize("streaming", [False, True])
def test_a_validation_text_that_is_trained_on(
    tmp_path: Path, spec_for: SpecFor, caplog, streaming: bool
) -> None:
    """A copy of the source under another name; of a part one line tells how large it is."""
    path, copy = write_documents(tmp_path / "a.jsonl"), tmp_path / "copy.jsonl"
    shutil.copy(path, copy)
    spec = spec_for(path, validation=str(copy), streaming=streaming)
    words = rf"data\.validation \({copy}\): all of its documents are in data\.source \({path}\) too"
    with pytest.raises(UserError, match=words):
        prepare_data(spec)
    assert entries(spec) == []
    lines = copy.read_text().splitlines()[::-1]
    copy.write_text("\n".join([*lines, '{"text": "a document of its own"}']))
    assert prepare_data(spec).validation.num_tokens
    told = [line for line in caplog.messages if "what is trained on makes the loss less" in line]
    assert len(told) == (not streaming)
    if not streaming:
        assert f"({copy}): {len(lines)} of its {len(lines) + 1} documents" in told[0]
        copy.write_text("\n".join(lines))
        with pytest.raises(UserError, match=words):
            prepare_data(spec)


def test_bpe_is_trained_on_the_training_side_only(tmp_path: Path, spec_for: SpecFor) -> None:
    text = "the cat sat on the mat\n" * 90 + "zyzzyva quokka\n" * 15
    (tmp_path / "a.txt").write_text(text)
    spec = spec_for(tmp_path / "a.txt", tokenizer="bpe", vocab_size=300)
    prepared = prepare_data(spec)
    cut = int(len(text) * 0.9)
    assert prepared.tokenizer.get_vocab() == train_bpe([text[:cut]], 300).get_vocab()
    assert prepared.tokenizer.get_vocab() != train_bpe([text], 300).get_vocab()
    assert prepared.record["train"]["tokens"] < cut / 2


def test_second_start_uses_the_cache(tmp_path: Path, spec_for: SpecFor, builds: list[int]) -> None:
    spec = spec_for(write_documents(tmp_path / "a.jsonl"), tokenizer="bpe", vocab_size=300)
    first = prepare_data(spec)
    second = prepare_data(spec)
    assert len(builds) == 1
    assert second.record == first.record
    assert second.tokenizer.get_vocab() == first.tokenizer.get_vocab()
    assert (second.train.tokens == first.train.tokens).all()
    prepare_data(spec_for(spec.source, tokenizer="bpe", vocab_size=300, seq_len=16))
    assert len(builds) == 1  # windows are cut from the same tokens


def test_second_start_on_ten_megabytes_is_quick(tmp_path: Path, spec_for: SpecFor) -> None:
    (tmp_path / "a.txt").write_text("some words of text\n" * 550_000)
    spec = spec_for(tmp_path / "a.txt")
    prepare_data(spec)
    started = time.perf_counter()
    prepare_data(spec)
    assert time.perf_counter() - started < 2.0


@pytest.mark.parametrize(
    "changed",
    [
        {"tokenizer": "bytes", "vocab_size": 259},
        {"vocab_size": 262},
        {"validation_fraction": 0.3},
        {"max_tokens": 100},
        {"text_field": "other"},
    ],
)
def test_each_option_makes_other_tokens(
    tmp_path: Path, spec_for: SpecFor, changed: dict[str, object]
) -> None:
    rows = [{"text": f"text number {index}", "other": f"{index} other"} for index in range(60)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    options: dict[str, object] = {"tokenizer": "bpe", "vocab_size": 266}
    plain = prepare_data(spec_for(path, **options))
    other = prepare_data(spec_for(path, **{**options, **changed}))
    assert plain.train.tokens.tolist() != other.train.tokens.tolist()


def test_changed_content_with_unchanged_time_and_size(tmp_path: Path, spec_for: SpecFor) -> None:
    path = tmp_path / "a.txt"
    path.write_text("before " * 20)
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    before = prepare_data(spec_for(path))
    path.write_text("after! " * 20)
    os.utime(path, ns=times)
    after = prepare_data(spec_for(path))
    assert before.record["corpus_sha256"] != after.record["corpus_sha256"]
    assert b"after!" in bytes(after.train.tokens[1:-1].astype("uint8"))


def test_max_tokens_caps_training_only(tmp_path: Path, spec_for: SpecFor) -> None:
    path = write_documents(tmp_path / "a.jsonl")
    whole = prepare_data(spec_for(path))
    capped = prepare_data(spec_for(path, max_tokens=100))
    assert capped.train.tokens.tolist() == whole.train.tokens[:100].tolist()
    assert capped.train.num_bytes <= 100
    assert capped.validation.tokens.tolist() == whole.validation.tokens.tolist()


def test_given_validation(tmp_path: Path, spec_for: SpecFor) -> None:
    (tmp_path / "a.txt").write_text("training text")
    (tmp_path / "b.txt").write_text("validation text")
    spec = spec_for(tmp_path / "a.txt", validation=str(tmp_path / "b.txt"))
    prepared = prepare_data(spec)
    assert prepared.train.num_bytes == len("training text")
    assert rebuild_validation(prepared.record) == ["validation text"]
    (tmp_path / "b.txt").write_text("Validation text")
    assert prepare_data(spec).record["validation_sha256"] != prepared.record["validation_sha256"]


def test_pretrained_tokenizer_by_folder(tmp_path: Path, spec_for: SpecFor) -> None:
    train_bpe(["the cat sat on the mat"] * 9, 280).save_pretrained(tmp_path / "tokenizer")
    path = write_documents(tmp_path / "a.jsonl")
    folder = str(tmp_path / "tokenizer")
    with pytest.raises(UserError, match=r"data\.vocab_size \(999\).*tokenizer\) has \d+ entries"):
        prepare_data(spec_for(path, tokenizer=folder, vocab_size=999))
    prepared = prepare_data(spec_for(path, tokenizer=str(tmp_path / "tokenizer")))
    again = prepare_data(spec_for(path, tokenizer=str(tmp_path / "tokenizer")))
    assert again.record == prepared.record
    assert prepared.tokenizer.decode(prepared.train.tokens[:6]).startswith("<bos>doc")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_tokenizer_that_leaves_nothing(tmp_path: Path, spec_for: SpecFor, streaming) -> None:
    """The loss of documents that are nothing but their ends is soon zero."""
    byte_tokenizer().save_pretrained(tmp_path / "t")
    file = tmp_path / "t/tokenizer.json"
    nothing = {"type": "Replace", "pattern": {"Regex": "."}, "content": ""}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"normalizer": nothing}))
    source = write_documents(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match=r"data\.tokenizer .*/t\) makes no token of the .* bytes"):
        prepare_data(spec_for(source, tokenizer=str(tmp_path / "t"), streaming=streaming))
    assert not (tmp_path / "cache").exists()


def test_corpus_that_is_gone_or_changed(tmp_path: Path, spec_for: SpecFor) -> None:
    path = write_documents(tmp_path / "a.jsonl")
    record = prepare_data(spec_for(path)).record
    write_documents(path, 400)
    with pytest.raises(UserError, match=r"a\.jsonl is not what it was"):
        rebuild_validation(record)
    path.unlink()
    with pytest.raises(UserError, match=r"a\.jsonl\) does not exist"):
        rebuild_validation(record)


DAMAGES = [
    ("split", None, r"'split' \(None\) is unusable"),
    ("split", {}, r"'kind' is missing"),
    *(
        (f"split.{name}", value, rf"'{name}' \(.*\) is unusable")
        for name, values in {
            "kind": ["half", None, 1],
            "fraction": [float("nan"), float("inf"), "0.1", None, True, -0.5, 1, 10**400],
            "threshold": [7, None, "", "x", "-1", "1_0", "f" * 17],
        }.items()
        for value in values
    ),
    *(
        ("documents_read", value, r"'documents_read' \(.*\) is unusable")
        for value in (1e30, 10**30, -1, "3", True, [])
    ),
    ("validation_source", [], r"'validation_source' \(\[\]\) is unusable"),
    ("validation_sha256", 5, r"'validation_sha256' \(5\) is unusable"),
    ("source", "text", r"'source' \('text'\) is unusable"),
    ("source.kind", "tape", r"'kind' \('tape'\) is unusable"),
    ("source.location", ["a"], r"'location' \(\['a'\]\) is unusable"),
    ("source.location", "a\0b", r"cannot be a path"),
    ("source.text_field", None, r"'text_field' \(None\) is unusable"),
    ("source.python", 3.11, r"'python' \(3.11\) is unusable"),
]


@pytest.mark.parametrize(("place", "value", "message"), DAMAGES)
def test_a_record_with_a_wrong_entry_says_which(
    tmp_path: Path, spec_for: SpecFor, place: str, value: object, message: str
) -> None:
    record = prepare_data(spec_for(write_documents(tmp_path / "a.jsonl"))).record
    *outer, name = place.split(".")
    (record[outer[0]] if outer else record)[name] = value
    with pytest.raises(UserError, match=message) as caught:
        rebuild_validation(json.loads(json.dumps(record)))
    assert len(str(caught.value)) < 300


def test_phases_are_logged(
    tmp_path: Path, spec_for: SpecFor, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="retnet")
    path = write_documents(tmp_path / "a.jsonl")
    prepare_data(spec_for(path, tokenizer="bpe", vocab_size=280))
    for phase in ("reading", "training the tokenizer", "tokenising train", "tokenising validation"):
        assert any(line.startswith(phase) and "documents" in line for line in caplog.messages)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_tuning_leaves_the_validation_text_alone(
    tmp_path: Path, spec_for: SpecFor, streaming: bool, given: bool
) -> None:
    """It trains on less, judges on that, and the record finds it again."""
    source = write_documents(tmp_path / "a.jsonl", 400)
    other = write_documents(tmp_path / "b.jsonl", 30)
    other.write_text(other.read_text().replace("cat", "dog"))
    own = {"validation": str(other)} if given else {}
    plain, tuning = (
        prepare_data(spec_for(source, streaming=streaming, tuning_fraction=share, **own))
        for share in (0.0, 0.3)
    )
    judged = rebuild_validation(tuning.record)
    assert len(judged) == tuning.validation.num_documents > 0
    kept = tuning.train.num_documents + tuning.validation.num_documents
    assert kept == plain.train.num_documents
    if not given:
        assert not set(judged) & set(rebuild_validation(plain.record))
