"""data.streaming: one pass, the same tokens, taken up again after a kill, bounded memory."""

import hashlib
import json
import logging
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from retnet.data import DataSpec, PreparedData, prepare, prepare_data, rebuild_validation, streaming
from retnet.errors import UserError

SpecFor = Callable[..., DataSpec]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    rng = random.Random(0)
    rows = [" ".join(rng.choices(["cat", "mat", "sat", "the"], k=rng.randint(1, 30))) + f" {i}"
            for i in range(400)]  # fmt: skip
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in rows))
    return path


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commits after each few documents."""
    monkeypatch.setattr(streaming, "BATCH_CHARACTERS", 1000)
    monkeypatch.setattr(streaming, "COMMIT_BYTES", 2000)


def same_tokens(one: PreparedData, two: PreparedData) -> bool:
    return all(
        np.array_equal(getattr(getattr(one, side), name), getattr(getattr(two, side), name))
        for side in ("train", "validation")
        for name in ("tokens", "document_starts", "document_bytes")
    )


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_the_tokens_are_those_of_the_other_way(
    corpus: Path, spec_for: SpecFor, tokenizer: str, small_steps: None
) -> None:
    options = {"tokenizer": tokenizer} | ({"vocab_size": 300} if tokenizer == "bpe" else {})
    plain = prepare_data(spec_for(corpus, **options))
    streamed = prepare_data(spec_for(corpus, **options, streaming=True))
    assert same_tokens(plain, streamed)
    assert streamed.tokenizer.get_vocab() == plain.tokenizer.get_vocab()
    for key in ("corpus_sha256", "train_sha256", "validation_sha256", "train", "validation"):
        assert streamed.record[key] == plain.record[key]
    assert streamed.record["documents_read"] == 400
    record = json.loads(json.dumps(streamed.record))
    assert rebuild_validation(record) == rebuild_validation(plain.record)


def test_max_tokens_ends_the_reading(corpus: Path, spec_for: SpecFor) -> None:
    prepared = prepare_data(spec_for(corpus, streaming=True, max_tokens=5000))
    assert prepared.train.num_tokens == 5000
    assert 40 < prepared.record["documents_read"] < 200
    assert len(rebuild_validation(prepared.record)) == prepared.validation.num_documents > 0


def test_validation_of_its_own(corpus: Path, tmp_path: Path, spec_for: SpecFor) -> None:
    held_back = tmp_path / "validation.txt"
    held_back.write_text("held back")
    prepared = prepare_data(spec_for(corpus, streaming=True, validation=str(held_back)))
    assert prepared.train.num_documents == 400
    assert rebuild_validation(prepared.record) == ["held back"]


def test_a_data_set_folder(corpus: Path, tmp_path: Path, spec_for: SpecFor) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    shutil.copy(corpus, folder / "train.jsonl")
    prepared = prepare_data(spec_for(folder, streaming=True))
    assert prepared.record["source"]["kind"] == "hub"
    assert same_tokens(prepared, prepare_data(spec_for(corpus)))


def test_one_document_can_not_be_divided(tmp_path: Path, spec_for: SpecFor) -> None:
    (tmp_path / "one.txt").write_text("only this " * 50)
    spec = spec_for(tmp_path / "one.txt", streaming=True)
    with pytest.raises(UserError, match="side empty: streaming holds whole documents back"):
        prepare_data(spec)
    assert not Path(spec.cache_dir).exists()


def test_a_tokenizer_is_trained_on_the_beginning_of_a_long_document(
    tmp_path: Path, spec_for: SpecFor, monkeypatch
) -> None:
    (tmp_path / "one.txt").write_text("only this " * 500)
    (tmp_path / "held.txt").write_text("held back")
    seen = []
    real = prepare.train_bpe

    def recorded(texts, *options):
        seen.extend(texts := list(texts))
        return real(texts, *options)

    monkeypatch.setattr(prepare, "train_bpe", recorded)
    monkeypatch.setattr(prepare, "STREAMED_TOKENIZER_BYTES", 1000)
    spec = {"streaming": True, "tokenizer": "bpe", "vocab_size": 262}
    prepare_data(spec_for(tmp_path / "one.txt", validation=str(tmp_path / "held.txt"), **spec))
    assert seen == ["only this " * 100]


DRIVER = """
import os, signal, sys
from retnet.data import DataSpec, prepare_data, streaming
streaming.BATCH_CHARACTERS, streaming.COMMIT_BYTES = 1000, 2000
real, calls = streaming._append, []
def append(*args):
    calls.append(1)
    if len(calls) == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
streaming._append = append
prepare_data(DataSpec(source=sys.argv[1], tokenizer="bpe", vocab_size=300, seq_len=8,
                      cache_dir=sys.argv[2], streaming=True))
"""


@pytest.mark.slow
def test_a_killed_preparation_is_taken_up_again(
    corpus: Path, spec_for: SpecFor, small_steps: None, monkeypatch, caplog
) -> None:
    spec = spec_for(corpus, tokenizer="bpe", vocab_size=300, streaming=True)
    killed = subprocess.run(
        [sys.executable, "-c", DRIVER, str(corpus), spec.cache_dir], check=False
    )
    assert killed.returncode == -9
    (left,) = Path(spec.cache_dir).glob(".streaming-*/complete/progress.json")
    read = json.loads(left.read_text())["documents_read"]
    assert 50 < read < 350
    tokenised = []
    real = streaming.pieces_of

    def counted(tokenizer, documents):
        documents = list(documents)
        tokenised.extend(documents)
        return real(tokenizer, documents)

    monkeypatch.setattr(streaming, "pieces_of", counted)
    monkeypatch.setattr(prepare, "train_bpe", None)  # the tokenizer is there already
    with caplog.at_level(logging.INFO):
        taken_up = prepare_data(spec)
    assert len(tokenised) == 400 - read
    assert f"reading what is tokenised already: {read} documents" in caplog.text
    monkeypatch.undo()
    whole = prepare_data(spec_for(corpus, tokenizer="bpe", vocab_size=300,
                                  streaming=True, cache_dir=spec.cache_dir + "2"))  # fmt: skip
    assert same_tokens(taken_up, whole) and taken_up.record == whole.record
    names = [path.name for path in Path(spec.cache_dir).iterdir()]
    assert len(names) == 1 and not names[0].startswith(".")
    assert not list(Path(spec.cache_dir).rglob("*.part"))


def test_a_changed_file_is_noticed(corpus: Path, spec_for: SpecFor) -> None:
    spec = spec_for(corpus, streaming=True)
    first = prepare_data(spec)
    with corpus.open("a") as stream:
        stream.write('\n{"text": "one more"}')
    assert prepare_data(spec).record["documents_read"] == first.record["documents_read"] + 1


@pytest.mark.slow
def test_a_gigabyte_in_bounded_memory(tmp_path: Path) -> None:
    """1 GB of generated text; its own process, because the peak is that of the whole process."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9)))
             for _ in range(20_000)]  # fmt: skip
    path = tmp_path / "large.jsonl"
    with path.open("w") as stream:
        pool = [" ".join(rng.choices(words, k=300)) for _ in range(2000)]
        number = 0
        while stream.tell() < 1_000_000_000:
            stream.write(json.dumps({"text": f"{number} {rng.choice(pool)}"}) + "\n")
            number += 1
    program = (
        "import sys; from retnet.data import DataSpec, prepare_data; prepare_data(DataSpec("
        "source=sys.argv[1], cache_dir=sys.argv[2], tokenizer=sys.argv[3], streaming=True))"
    )
    began = time.perf_counter()
    command = [sys.executable, "-c", program, str(path), str(tmp_path / "cache"),
               os.environ.get("LARGE_TOKENIZER", "bytes")]  # fmt: skip
    assert subprocess.run(command, check=False).returncode == 0
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    (record,) = (tmp_path / "cache").glob("*/record.json")
    tokens = json.loads(record.read_text())["train"]["tokens"]
    print(f"{tokens:,} tokens, {tokens / seconds:,.0f} tokens/s, peak {peak / 1e6:,.0f} MB")
    assert peak < 2e9


def test_a_full_disk_keeps_what_is_committed(
    corpus: Path, spec_for: SpecFor, small_steps: None, monkeypatch
) -> None:
    spec = spec_for(corpus, streaming=True)
    real, calls = streaming._append, []

    def fail(*arguments) -> bool:
        calls.append(1)
        if len(calls) == 9:
            raise OSError(28, "No space left on device")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(streaming, "_append", fail)
        with pytest.raises(UserError, match=r"data\.cache_dir .*No space left on device"):
            prepare_data(spec)
    assert list(Path(spec.cache_dir).glob(".streaming-*/complete/progress.json"))
    assert same_tokens(prepare_data(spec), prepare_data(spec_for(corpus)))


def test_two_processes_do_not_write_the_same_stream(
    corpus: Path, spec_for: SpecFor, monkeypatch
) -> None:
    spec = spec_for(corpus, streaming=True)
    real, errors = streaming._append, []

    def second(*arguments) -> bool:
        with pytest.raises(UserError, match="another process is preparing the same text"):
            prepare_data(spec)
        errors.append(1)
        return real(*arguments)

    monkeypatch.setattr(streaming, "_append", second)
    prepare_data(spec)
    assert errors


@pytest.mark.parametrize("counts", [(5, 5, 5), (10**30, 5, 5), (1, 1, 10**30), (-1, 1, 1)])
def test_what_was_committed_and_is_not_there(
    corpus: Path, spec_for: SpecFor, monkeypatch: pytest.MonkeyPatch, counts: tuple[int, ...]
) -> None:
    """The cache "could not be written" then, at every further attempt."""
    committed = dict(zip(("documents", "bytes", "tokens"), counts, strict=True))
    facts = {"documents_read": 0, "sha256": hashlib.sha256().hexdigest()}
    facts |= {side: committed for side in ("train", "validation")}
    write = streaming.write_stream

    def resumed(folder: Path, *arguments):
        for side in ("train", "validation"):
            (folder / side).mkdir()
            for name in ("tokens.bin", "document_starts.npy.part", "document_bytes.npy.part"):
                (folder / side / name).write_bytes(bytes(16))
        (folder / "progress.json").write_text(json.dumps(facts))
        return write(folder, *arguments)

    monkeypatch.setattr(prepare, "write_stream", resumed)
    prepared = prepare_data(spec_for(corpus, streaming=True))
    assert prepared.train.num_documents + prepared.validation.num_documents == 400


def test_a_damaged_tokenizer_of_an_earlier_attempt_is_made_again(
    spec_for: SpecFor, corpus: Path, caplog
) -> None:
    spec = spec_for(corpus, streaming=True, tokenizer="bpe", vocab_size=270)
    first = prepare_data(spec)
    (entry,) = (path for path in Path(spec.cache_dir).iterdir() if path.is_dir())
    shutil.rmtree(entry)
    left = entry.with_name(f".streaming-{entry.name}") / "complete/tokenizer"
    left.mkdir(parents=True)
    (left / "tokenizer.json").write_text('{"version"')
    assert same_tokens(prepare_data(spec), first)
    assert f"{left} is damaged and is made again" in caplog.text
