"""Data sets in the Hub's layout; local folders stand in for the Hub."""

import json
import os
from pathlib import Path

import pytest

from retnet.data import prepare_data, rebuild_validation
from retnet.data.sources import open_source
from retnet.errors import UserError
from tests.data.conftest import SpecFor, texts, write_jsonl


@pytest.fixture
def configured(tmp_path: Path) -> Path:
    """A folder whose card declares two configurations."""
    card = {
        "configs": [
            {
                "config_name": name,
                "data_files": [
                    {"split": "train", "path": f"{name}.jsonl"},
                    {"split": "validation", "path": "held.jsonl"},
                ],
            }
            for name in ("one", "two")
        ]
    }
    for name in ("one", "two", "held"):
        write_jsonl(tmp_path / f"set/{name}.jsonl", texts(name), field="body")
    # JSON is YAML, and the key must begin a line.
    configs = json.dumps(card["configs"])
    (tmp_path / "set/README.md").write_text(f"---\nconfigs: {configs}\n---\n# A data set")
    return tmp_path / "set"


def test_splits_by_file_name(splits: Path, spec_for: SpecFor) -> None:
    prepared = prepare_data(spec_for(splits, validation="test"))
    assert prepared.train.num_documents == 60
    assert rebuild_validation(prepared.record) == texts("t")
    other = prepare_data(spec_for(splits, split="test"))
    assert other.train.num_documents + other.validation.num_documents == 30


def test_a_split_is_not_validation_of_itself(splits: Path, spec_for: SpecFor) -> None:
    words = rf"data\.validation \(train\): {splits}, split train is in data\.source"
    with pytest.raises(UserError, match=words):
        prepare_data(spec_for(splits, validation="train"))


def test_a_folder_of_texts_is_not_a_data_set(tmp_path: Path, spec_for: SpecFor) -> None:
    """One file that happens to be called train must not hide the others."""
    for name in ("train.txt", "notes.txt", "v1_train_head.txt"):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / name).write_text("some words of text")
    assert prepare_data(spec_for(tmp_path / "texts")).train.num_documents == 3


def test_a_table_of_a_data_set_is_read_as_any_other(tmp_path: Path, spec_for: SpecFor) -> None:
    """The data set library takes "null" for no text and fills up short rows."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set/train.csv").write_text("id,text\n1,null\n2,NA and more\n")
    (tmp_path / "set/test.csv").write_text("id,text\n1\n")
    spec = spec_for(tmp_path / "set", validation="test")
    with pytest.raises(UserError, match=r"data\.validation \(.*test\): .*test\.csv line 2 has 1"):
        prepare_data(spec)
    (tmp_path / "set/test.csv").write_text("id,text\n1,nan\n")
    prepared = prepare_data(spec)
    assert prepared.train.document_bytes.tolist() == [4, 11]
    assert rebuild_validation(prepared.record) == ["nan"]
    with pytest.raises(UserError, match=r"no such split: there are test, train"):
        prepare_data(spec_for(tmp_path / "set", split="dev"))
    with pytest.raises(UserError, match=r"data\.hub_config \(x\) has no meaning"):
        prepare_data(spec_for(tmp_path / "set", hub_config="x"))


def test_text_files_of_a_data_set_are_documents(tmp_path: Path, spec_for: SpecFor) -> None:
    (tmp_path / "set").mkdir()
    for name in ("train", "valid"):
        (tmp_path / f"set/{name}.txt").write_text(f"{name} one\n\n{name} two\n")
    prepared = prepare_data(spec_for(tmp_path / "set", validation="validation"))
    assert prepared.train.num_documents == 1
    assert rebuild_validation(prepared.record) == ["valid one\n\nvalid two\n"]


def test_configuration_and_field(configured: Path, spec_for: SpecFor) -> None:
    spec = {"text_field": "body", "validation": "validation"}
    prepared = prepare_data(spec_for(configured, hub_config="two", **spec))
    first = bytes(prepared.train.tokens[1:15].astype("uint8"))
    assert first == b"two document 0"
    assert rebuild_validation(prepared.record) == texts("held")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_field": "body"}, r"data\.hub_config.*'one', 'two'|'one', 'two'.*data\.hub_config"),
        ({"text_field": "body", "hub_config": "six"}, r"configuration six.*'one', 'two'"),
        ({"hub_config": "one"}, r"data\.text_field \(text\).*\(body, n\)"),
        ({"text_field": "body", "hub_config": "one", "split": "x"}, r"split x.*'train', 'val"),
        ({"text_field": "body", "hub_config": "one", "validation": "y"}, r"data\.validation.*y"),
    ],
)
def test_what_is_not_there_is_listed(
    configured: Path, spec_for: SpecFor, tmp_path: Path, options: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        prepare_data(spec_for(configured, **options))
    assert not (tmp_path / "cache").exists()


def test_changed_folder_with_unchanged_times(splits: Path, spec_for: SpecFor) -> None:
    """The data set library's own cache would return the old rows."""
    path = splits / "data/test-00000-of-00001.jsonl"
    before = prepare_data(spec_for(splits, validation="test"))
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_text(path.read_text().replace("t document 7", "T document 7"))
    os.utime(path, ns=times)
    after = prepare_data(spec_for(splits, validation="test"))
    assert before.record["validation_sha256"] != after.record["validation_sha256"]
    assert "T document 7" in rebuild_validation(after.record)
    with pytest.raises(UserError, match="not what it was"):
        rebuild_validation(before.record)


def test_a_folder_that_is_gone(splits: Path, spec_for: SpecFor) -> None:
    record = prepare_data(spec_for(splits)).record
    splits.rename(splits.with_name("elsewhere"))
    with pytest.raises(UserError, match="does not exist"):
        rebuild_validation(record)


def test_a_damaged_row_file(splits: Path, spec_for: SpecFor) -> None:
    with (splits / "data/test-00000-of-00001.jsonl").open("ab") as stream:
        stream.write(b'\n{"text": \xff')
    with pytest.raises(UserError, match=r"data\.validation"):
        prepare_data(spec_for(splits, validation="test"))


@pytest.mark.parametrize(
    "named",
    ["../secret.txt", "a/../../secret.txt", "/etc/hostname", "~/x.txt", "https://a.b/c.txt"],
)
def test_a_card_that_leads_out_of_its_folder(tmp_path: Path, spec_for: SpecFor, named: str) -> None:
    """Any file of this machine became text."""
    (tmp_path / "set").mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "set/a.txt").write_text("a")
    card = f"homepage: https://a.b\nconfigs:\n- config_name: default\n  data_files: ['{named}']\n"
    (tmp_path / "set/README.md").write_text(f"---\n{card}---\n")
    source = open_source(spec_for(tmp_path / "set"))
    with pytest.raises(UserError) as caught:
        list(source.documents())
    assert f"README.md names '{named}', which is outside of the folder" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("README.md", "---\ndataset_info: {}\n<<:\n  configs: CONFIGS\n---\n"),
        ("README.md", "---\ndataset_info: {}\n---x: 1\nconfigs: CONFIGS\n---\n"),
        (".huggingface.yaml", "configs: CONFIGS\n"),
    ],
)
def test_a_card_that_hides_where_it_leads(
    tmp_path: Path, spec_for: SpecFor, name: str, card: str
) -> None:
    """What the library reads counts: merged keys, its own end of the card, the second card."""
    (tmp_path / "set").mkdir()
    (tmp_path / "secret.jsonl").write_text('{"text": "secret"}\n')
    (tmp_path / "set/a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "set/README.md").write_text("---\ndataset_info: {}\n---\n")
    configs = "[{config_name: default, data_files: ../secret.jsonl}]"
    (tmp_path / "set" / name).write_text(card.replace("CONFIGS", configs))
    source = open_source(spec_for(tmp_path / "set"))
    with pytest.raises(UserError) as caught:
        list(source.documents())
    words = f"{name} names '../secret.jsonl', which is outside of the folder"
    assert words in str(caught.value)


def test_a_card_that_is_no_yaml(tmp_path: Path, spec_for: SpecFor) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "README.md").write_text("---\nconfigs: [\n---\n")
    with pytest.raises(UserError, match=r"README\.md is not valid YAML"):
        list(open_source(spec_for(tmp_path)).documents())


def test_a_card_of_aliases_that_grow(tmp_path: Path, spec_for: SpecFor) -> None:
    """The library wrote them out, a billion, for its message."""
    lines = ["a0: &a0 [x]"] + [f"a{i}: &a{i} [{f'*a{i - 1}, ' * 10}]" for i in range(1, 10)]
    card = "\n".join([*lines, "configs:", "- config_name: default", "  data_files: *a9"])
    (tmp_path / "README.md").write_text(f"---\n{card}\n---\n")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match=r"README\.md has more than 10,000 values before its text"):
        list(open_source(spec_for(tmp_path)).documents())


def test_a_card_that_is_too_long(tmp_path: Path, spec_for: SpecFor) -> None:
    """It is not read for minutes."""
    (tmp_path / "a.jsonl").write_text('{"text": "a b c"}')
    head = "configs:\n- config_name: default\n  data_files: a.jsonl\n# " + "a" * (1 << 20)
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\n")
    with pytest.raises(UserError, match=r"README\.md has .* or more than 1,048,576 characters"):
        prepare_data(spec_for(tmp_path))
