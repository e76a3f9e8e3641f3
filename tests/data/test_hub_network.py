"""Data sets on the Hub through a network that fails, stalls or answers no."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from huggingface_hub.errors import HfHubHTTPError

from retnet.data import hub, network, prepare_data, rebuild_validation, streaming
from retnet.errors import UserError
from tests.data.conftest import SpecFor, texts


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
    real = streaming.pieces_of
    monkeypatch.setattr(
        streaming, "pieces_of", lambda t, d: encoded.extend(d := list(d)) or real(t, d)
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
