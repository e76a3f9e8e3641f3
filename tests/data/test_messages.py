"""Rows of messages: what a conversation is, and what is wrong with others, by file and line."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retnet.data.messages import Conversation
from retnet.data.sources import open_source, reopen_source
from retnet.errors import UserError
from tests.conversations import rows, turns, write_rows

GOOD = turns("hello", "hi")


def test_all_kinds_of_files_hold_the_same_conversations(spec_for, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    write_rows(tmp_path / "a/rows.jsonl")
    (tmp_path / "a/README.md").write_text("about the rows")  # no conversation, and no matter
    with gzip.open(tmp_path / "b/rows.jsonl.gz", "wt") as stream:
        stream.write("\n".join(map(json.dumps, rows())))
    pq.write_table(pa.Table.from_pylist(rows()), tmp_path / "c/rows.parquet")
    found = []
    for name in ("a", "b", "c"):
        source = open_source(spec_for(tmp_path / name, format="messages"))
        found.append(list(source.documents()))
        assert list(reopen_source(source.to_record()).documents()) == found[-1]
    assert found[0] == found[1] == found[2]
    assert [own.messages for own in found[0]] == [row["messages"] for row in rows()]
    answers = [one["content"] for one in rows()[0]["messages"] if one["role"] == "assistant"]
    assert found[0][0].answers == answers


def test_a_folder_laid_out_like_a_data_set(spec_for, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    write_rows(tmp_path / "set/train.jsonl", rows(3))
    write_rows(tmp_path / "set/test.jsonl", rows(2))
    spec = spec_for(tmp_path / "set", format="messages")
    assert len(list(open_source(spec).documents())) == 3


def test_a_data_set_with_a_card(spec_for, tmp_path: Path) -> None:
    """The data set library reads it, as it does what is on the Hub."""
    (tmp_path / "set/data").mkdir(parents=True)
    write_rows(tmp_path / "set/data/rows.jsonl", rows(3))
    card = "configs:\n- config_name: one\n  data_files:\n  - split: train\n    path: data/*.jsonl\n"
    (tmp_path / "set/README.md").write_text(f"---\n{card}---\n")
    source = open_source(spec_for(tmp_path / "set", format="messages", hub_config="one"))
    found = [own.messages for own in source.documents()]
    assert found == [row["messages"] for row in rows(3)]
    assert source.to_record()["format"] == "messages"
    write_rows(tmp_path / "set/data/rows.jsonl", [{"messages": turns("a")}])
    with pytest.raises(UserError, match="row 1: no message of the assistant has text"):
        list(source.documents())
    write_rows(tmp_path / "set/data/rows.jsonl", [{"turns": GOOD}])
    with pytest.raises(UserError, match=r"has no field messages \(there are turns\)"):
        list(source.documents())


BAD = {
    "null": (None, "holds NoneType, not a list of messages"),
    "text": ("hello", "holds str, not a list of messages"),
    "empty": ([], "holds an empty list, not a list"),
    "strings": (["hello"], "message 1 is str, not an object"),
    "role": ([*GOOD, {"role": "human", "content": "a"}], 'message 3 has the role "human": name'),
    "roleless": ([{"content": "a"}], "message 1 has no role: name it as one of system, user, as"),
    "number": ([*GOOD, {"role": "user", "content": 3}], "message 3 has content that is int, not"),
    "parts": ([{"role": "user", "content": [{"type": "text"}]}], "has content that is list, not"),
    "contentless": ([{"role": "user"}], "message 1 has no content, not text"),
    "unanswered": (turns("hello"), "no message of the assistant has text"),
    "silent": (turns("hello", " "), "no message of the assistant has text"),
    "tools": ([*GOOD, {"role": "assistant", "content": "", "tool_calls": [1]}], "has tool_calls"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named_by_file_and_line(name: str, spec_for, tmp_path: Path) -> None:
    value, words = BAD[name]
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": GOOD}, {"messages": value}])
    with pytest.raises(UserError) as error:
        list(open_source(spec_for(path, format="messages")).documents())
    assert words in str(error.value) and f"{path} line 2: " in str(error.value)


def test_a_bad_row_of_a_table_is_named_by_its_number(spec_for, tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"messages": [GOOD, None]}), path)
    with pytest.raises(UserError, match=r"rows\.parquet row 2: messages holds NoneType"):
        list(open_source(spec_for(path, format="messages")).documents())


def test_what_has_no_messages_is_refused(spec_for, tmp_path: Path) -> None:
    other = write_rows(tmp_path / "other.jsonl", [{"conversations": GOOD, "id": 1}])
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / "a.csv").write_text("messages\nhello\n")
    (tmp_path / "set").mkdir()
    (tmp_path / "set/train.csv").write_text("messages\nhello\n")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("hello")
    for path, words in (
        (other, r"line 1 has no field messages \(there are conversations, id\)"),
        (tmp_path / "a.txt", r"a suffix that is not one of conversations \(\.txt\): use one of"),
        (tmp_path / "a.csv", r"a suffix that is not one of conversations \(\.csv\)"),
        (tmp_path / "*.csv", r"matches a\.csv, whose suffix is not one of conversations"),
        (tmp_path / "set", r"train\.csv has no conversations"),
        (tmp_path / "texts", r"a folder without a file to read: put files of \.jsonl"),
    ):
        with pytest.raises(UserError, match=words):
            list(open_source(spec_for(path, format="messages")).documents())


def test_options_that_mean_nothing_for_messages() -> None:
    from retnet.data import DataSpec

    for options, words in (
        (
            {"text_field": "body"},
            r"data\.text_field \(body\) has no meaning with data\.format=mess",
        ),
        ({"source": "python-stdlib"}, r"data\.source \(python-stdlib\) has no conversations"),
        ({"vocab_size": 261}, r"has 256 bytes and 5 special tokens.*use at least 262"),
    ):
        with pytest.raises(UserError, match=words):
            DataSpec(**{"source": "a.jsonl", "format": "messages", **options}).validate()


def test_a_conversation_is_written_alike_however_its_row_was() -> None:
    row = [{"content": "hé", "weight": 1, "role": "user"}, {"role": "assistant", "content": "hi"}]
    assert Conversation.of(row, "here") == Conversation.of(turns("hé", "hi"), "there")
