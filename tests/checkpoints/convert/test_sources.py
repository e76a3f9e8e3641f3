"""Names on the Hub: what is kept is used, else it is fetched, and one line where it can't be."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from retnet.checkpoints.convert.sources import find_source
from tests.checkpoints.convert.references import convert, source_folder

NAME = "somebody/retnet"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A Hub with one model, of which nothing is kept."""
    folder = source_folder("fla_fused_untied", tmp_path / "snapshot")
    state: dict[str, Any] = {"folder": folder, "kept": None, "asked": [], "online": True}

    class Api:
        def model_info(self, name: str, **_: Any) -> Any:
            if not state["online"]:
                raise ConnectionError("no route to host")
            return SimpleNamespace(sha="c0ffee")

    def snapshot(name: str, **options: Any) -> str:
        if options.pop("local_files_only", False):
            if state["kept"] is None:
                raise LocalEntryNotFoundError("nothing is kept")
            return str(state["kept"])
        state["asked"].append((name, options))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.chdir(tmp_path)
    return state


def test_it_is_fetched_without_code_or_pickles(hub: dict[str, Any]) -> None:
    assert find_source(NAME) == hub["folder"]
    (asked,) = hub["asked"]
    assert asked[0] == NAME and asked[1]["revision"] == "c0ffee"
    assert asked[1]["allow_patterns"] == ["*.json", "*.safetensors", "*.txt"]


def test_what_is_kept_needs_no_network_if_it_is_whole(hub: dict[str, Any], tmp_path: Path) -> None:
    hub["kept"] = shutil.copytree(hub["folder"], tmp_path / "kept")
    hub["online"] = False
    assert find_source(NAME) == tmp_path / "kept"
    (tmp_path / "kept/model.safetensors").unlink()
    hub["online"] = True
    assert find_source(NAME) == hub["folder"]


def test_a_folder_of_that_name_comes_first(hub: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir(parents=True)
    assert find_source(NAME) == Path(NAME) and not hub["asked"]


@pytest.mark.parametrize("name", ["é/x", "a..b/x", "a/b--c", "a/b-"])
def test_what_cannot_be_a_name_is_a_path(hub: dict[str, Any], name: str) -> None:
    assert find_source(name) == Path(name) and not hub["asked"]


def test_offline(hub: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    hub["online"] = False
    assert convert("from-fla", NAME, tmp_path / "new") == 2
    error = capsys.readouterr().err
    words = f"error: source ({NAME}) is no local path, and the Hub cannot be reached (ConnectionErr"
    assert error.startswith(words) and error.count("\n") == 1
    assert convert("from-fla", "./" + NAME, tmp_path / "new") == 2
    assert f"source ({NAME}) does not exist" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
