"""Data sets in the Hub's layout; local folders stand in for the Hub."""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from huggingface_hub.errors import HfHubHTTPError

from retnet.data import DataSpec, hub, network, prepare_data, rebuild_validation, streaming
from retnet.data.sources import open_source
from retnet.errors import UserError

SpecFor = Callable[..., DataSpec]


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps({field: text, "n": 1}) for text in texts))


def texts(name: str, count: int = 30) -> list[str]:
    return [f"{name} document {index}" for index in range(count)]


@pytest.fixture
def splits(tmp_path: Path) -> Path:
    """A folder whose files are named after splits."""
    write_jsonl(tmp_path / "set/data/train-00000-of-00002.jsonl", texts("a"))
    write_jsonl(tmp_path / "set/data/train-00001-of-00002.jsonl", texts("b"))
    write_jsonl(tmp_path / "set/data/test-00000-of-00001.jsonl", texts("t"))
    (tmp_path / "set/README.md").write_text("# A data set")
    return tmp_path / "set"


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


@pytest.fixture
def online(splits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The Hub with one data set "some/set"; ``commit`` is what its main branch is at."""
    import datasets

    state: dict[str, Any] = {"commit": "c1", "loads": 0, "asked": 0}
    real = datasets.load_dataset_builder

    class Info:
        sha = "c1"

    class Api:
        def dataset_info(self, name: str, timeout: float) -> Info:
            state["asked"] += 1
            state.get("answer", lambda: None)()
            if state["commit"] is None:
                raise ConnectionError("no route to host")
            info = Info()
            info.sha = state["commit"]
            return info

        model_info = dataset_info

    def builder(name: str, config: str | None, revision: str | None, **options: Any) -> Any:
        state["loads"] += 1
        state["revision"] = revision
        state["offline"] = datasets.config.HF_HUB_OFFLINE
        state.get("meanwhile", lambda: None)()
        return real(str(splits), config, cache_dir=str(tmp_path / "library"), **options)

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    return state


def test_a_hub_name_is_kept_by_revision(online: dict[str, Any], spec_for: SpecFor) -> None:
    spec = spec_for("some/set", validation="test")
    prepared = prepare_data(spec)
    assert prepared.record["source"]["revision"] == online["revision"] == "c1"
    assert prepared.train.num_documents == 60
    loads = online["loads"]
    prepare_data(spec)
    assert online["loads"] == loads
    online["commit"] = None  # no network: what was prepared still serves
    assert prepare_data(spec).record == prepared.record
    assert online["loads"] == loads
    online["commit"] = "c2"
    assert prepare_data(spec).record["source"]["revision"] == "c2"
    assert online["loads"] > loads
    assert rebuild_validation(prepared.record) == texts("t")
    assert online["revision"] == "c1"


def test_a_hub_name_without_network(spec_for: SpecFor, tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(UserError, match=r"data\.source \(some/set\) is no local path, and the Hub"):
        prepare_data(spec_for("some/set"))
    assert time.monotonic() - started < 30
    assert not (tmp_path / "cache").exists()


def test_a_network_that_never_answers(spec_for: SpecFor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Client timeouts are per address and do not cover name resolution."""
    release = threading.Event()

    class Api:
        def dataset_info(self, name: str, timeout: float) -> None:
            release.wait()

        model_info = dataset_info

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr(network, "DEADLINE_S", 0.05)
    assert network.TIMEOUT_S < 30
    try:
        with pytest.raises(UserError, match=r"cannot be reached \(TimeoutError\)"):
            prepare_data(spec_for("some/set"))
    finally:
        release.set()


def test_what_is_not_kept_is_not_asked_for_again(online: dict[str, Any], spec_for: SpecFor) -> None:
    """The library alone tries a Hub that was seen not to answer for another 25 s."""
    prepared = prepare_data(spec_for("some/set", validation="test"))
    online["commit"] = None
    prepare_data(spec_for("some/set", validation="test", max_tokens=500))
    assert (online["offline"], online["revision"]) == (True, "c1")
    online["offline"] = False
    assert rebuild_validation(prepared.record) == texts("t")
    assert online["offline"]

    def gone() -> None:
        raise FileNotFoundError("not in the library's cache")

    online["meanwhile"] = gone
    with pytest.raises(network.HubUnreachableError, match="is not kept on this machine"):
        prepare_data(spec_for("some/set", validation="test", max_tokens=400))
    online["commit"] = "c1"
    with pytest.raises(UserError, match=r"correct data\.hub_config"):
        prepare_data(spec_for("some/set", validation="test", max_tokens=400))
    assert not online["offline"]


def test_a_load_that_never_ends(online: dict[str, Any], spec_for: SpecFor, monkeypatch) -> None:
    """The network goes after the revision is known: the client alone tries for minutes."""
    release = threading.Event()

    def block() -> None:
        online["commit"] = None
        release.wait()

    monkeypatch.setattr(network, "PATIENCE_S", 0.05)
    online["meanwhile"] = block
    try:
        with pytest.raises(network.HubUnreachableError, match="no route to host"):
            prepare_data(spec_for("some/set", validation="test"))
    finally:
        release.set()


def test_a_long_load_is_no_failure(online: dict[str, Any], spec_for: SpecFor, monkeypatch) -> None:
    monkeypatch.setattr(network, "PATIENCE_S", 0.05)
    online["meanwhile"] = lambda: time.sleep(0.3)
    assert prepare_data(spec_for("some/set", validation="test")).train.num_documents == 60
    assert online["asked"] > 2


def refused(status: int) -> HfHubHTTPError:
    response = httpx.Response(status, request=httpx.Request("GET", "https://hub"))
    return HfHubHTTPError(f"{status} from the Hub", response=response)


@pytest.mark.parametrize("status", [401, 429, 503])
def test_a_load_outlasts_a_few_failed_polls(
    online: dict[str, Any], spec_for: SpecFor, monkeypatch, status: int
) -> None:
    """Hours of download poll thousands of times, and any single failure ended them."""
    monkeypatch.setattr(network, "PATIENCE_S", 0.01)
    done = threading.Event()

    def answer() -> None:
        if online["asked"] > 9:
            done.set()
        if online["asked"] > 1 and online["asked"] % network.FAILURES:
            raise refused(status)

    online["answer"], online["meanwhile"] = answer, lambda: done.wait(60)
    assert prepare_data(spec_for("some/set", validation="test")).train.num_documents == 60
    assert done.is_set()


def test_a_slow_answer_is_one_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hub that is gone costs less than 30 s, of which each answer may take TIMEOUT_S."""
    assert network.FAILURES * network.PATIENCE_S + network.TIMEOUT_S < 30
    assert network.TIMEOUT_S < network.PATIENCE_S
    monkeypatch.setattr(network, "PATIENCE_S", 0.02)
    monkeypatch.setattr(network, "TIMEOUT_S", 0.01)
    release, asked = threading.Event(), []
    monkeypatch.setattr(network, "hub_revision", lambda *_: asked.append(1) or release.wait())
    try:
        with pytest.raises(network.HubUnreachableError, match=r"3 times in a row \(TimeoutError\)"):
            network.while_reachable(release.wait, "some/set", "dataset", "data.source (some/set)")
    finally:
        release.set()
    assert len(asked) == network.FAILURES


def http_error(status: int) -> Exception:
    response = type("Response", (), {"status_code": status})()
    error = OSError(f"status {status}")
    error.response = response  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize(
    ("error", "keeps"),
    [
        (ConnectionError("reset by peer"), True),
        (TimeoutError(), True),
        (http_error(503), True),
        (http_error(401), True),
        (http_error(403), True),
        (http_error(404), False),
        (ValueError("not JSON"), False),
    ],
)
def test_a_failing_network_loses_nothing_that_is_committed(
    online: dict[str, Any], spec_for: SpecFor, monkeypatch, error: Exception, keeps: bool
) -> None:
    monkeypatch.setattr(streaming, "BATCH_CHARACTERS", 500)
    monkeypatch.setattr(streaming, "COMMIT_BYTES", 1000)
    state = {"fails": True}

    class Rows:
        def iter(self, batch_size: int) -> Iterator[dict[str, list[str]]]:
            for number in range(10):
                if state["fails"] and number == 8:
                    raise RuntimeError("while reading") from error
                yield {"text": texts(f"batch {number}")}

    monkeypatch.setattr(hub, "_load", lambda source: Rows())
    spec = spec_for("some/set", streaming=True)
    with pytest.raises(UserError, match="while reading") as caught:
        prepare_data(spec)
    assert ("start again when it is back" in str(caught.value)) == keeps
    left = list(Path(spec.cache_dir).glob(".streaming-*/complete/progress.json"))
    assert len(left) == keeps
    state["fails"] = False
    encoded = []
    real = streaming.encode_in_pieces
    monkeypatch.setattr(
        streaming, "encode_in_pieces", lambda t, d: encoded.extend(d := list(d)) or real(t, d)
    )
    prepared = prepare_data(spec)
    assert prepared.train.num_documents + prepared.validation.num_documents == 300
    assert (len(encoded) < 200) == keeps


def test_a_refusal_while_streaming_loses_nothing(
    online: dict[str, Any], spec_for: SpecFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token that expires is not the text's fault: what was committed was deleted."""
    monkeypatch.setattr(streaming, "BATCH_CHARACTERS", 500)
    monkeypatch.setattr(streaming, "COMMIT_BYTES", 1000)
    monkeypatch.setattr(network, "PATIENCE_S", 0.05)
    release = threading.Event()

    def answer() -> None:
        if online["refuses"]:
            raise refused(401)

    class Rows:
        def iter(self, batch_size: int) -> Iterator[dict[str, list[str]]]:
            for number in range(10):
                if number == 8 and not release.is_set():
                    online["refuses"] = True
                    release.wait()
                yield {"text": texts(f"batch {number}")}

    online |= {"answer": answer, "refuses": False}
    monkeypatch.setattr(hub, "_load", lambda source: Rows())
    spec = spec_for("some/set", streaming=True)
    try:
        with pytest.raises(network.HubUnreachableError, match=r"401 from the Hub.*log in again"):
            prepare_data(spec)
    finally:
        release.set()
    assert list(Path(spec.cache_dir).glob(".streaming-*/complete/progress.json"))
    online["refuses"] = False
    prepared = prepare_data(spec)
    assert prepared.train.num_documents + prepared.validation.num_documents == 300


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
