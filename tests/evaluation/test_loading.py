"""Where models to compare are found, and that no code of theirs runs unasked."""

import json
import shutil
import sys
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest

from retnet.errors import UserError
from retnet.evaluation import EvaluationText, compare_checkpoints, load_contender, score_documents
from retnet.evaluation.comparison import short_names
from retnet.evaluation.foreign import runs_own_code
from retnet.evaluation.loading import find_contender, hub_name
from tests.evaluation.foreign import WINDOW, save_foreign
from tests.generation.builders import save_checkpoint

DOCUMENTS = [f"document {i} " * (i % 3 + 1) for i in range(6)]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Path:
    return save_foreign(tmp_path_factory.mktemp("foreign") / "gpt2")


@pytest.fixture
def hub(gpt2: Path, tmp_path: Path, monkeypatch) -> list[dict]:
    """A Hub with someone/tiny, and its cache in ``tmp_path``; returns what was fetched."""
    asked: list[dict] = []
    commit = "0123456789abcdef0123456789abcdef01234567"
    real = huggingface_hub.snapshot_download
    place = tmp_path / "hub" / "models--someone--tiny"

    def snapshot_download(name: str, **options) -> str:
        if options["local_files_only"]:
            return real(name, **options)
        asked.append({"name": name, **options})
        shutil.copytree(gpt2, place / "snapshots" / commit, dirs_exist_ok=True)
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs/main").write_text(commit)
        return str(place / "snapshots" / commit)

    def model_info(self, name: str, timeout: float):
        if name != "someone/tiny":
            raise ConnectionError("no network")
        return type("Info", (), {"sha": commit})

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    monkeypatch.chdir(tmp_path)
    return asked


def test_a_name_on_the_hub_is_fetched_once(hub: list[dict], monkeypatch) -> None:
    """Then it is there without a network; code comes along only for those who trust it."""
    found = load_contender("someone/tiny")
    assert hub_name(found.path) == "someone/tiny"
    assert hub[0]["revision"] == found.path.name
    assert not any(fnmatch("modeling.py", pattern) for pattern in hub[0]["allow_patterns"])
    assert not any(fnmatch("pytorch_model.bin", pattern) for pattern in hub[0]["allow_patterns"])
    assert any(fnmatch("model.safetensors", pattern) for pattern in hub[0]["allow_patterns"])
    with monkeypatch.context() as gone:
        gone.setattr("huggingface_hub.HfApi.model_info", None)
        assert find_contender("someone/tiny") == found.path
    assert len(hub) == 1
    comparison = compare_checkpoints([found, found], EvaluationText("some", DOCUMENTS))
    assert [model.name for model in comparison.models] == ["someone/tiny"] * 2


def test_what_the_cache_lacks_is_fetched(hub: list[dict]) -> None:
    folder = find_contender("someone/tiny")
    (folder / "model.safetensors").unlink()  # an interrupted download
    find_contender("someone/tiny")
    assert len(hub) == 2 and (folder / "model.safetensors").is_file()
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"auto_map": {}}))
    find_contender("someone/tiny", trust_remote_code=True)
    assert any(fnmatch("modeling.py", pattern) for pattern in hub[2]["allow_patterns"])


def test_a_name_that_is_nowhere(hub: list[dict], tmp_path: Path) -> None:
    """The Hub is not asked where the folder above is there: that name is a misspelt path."""
    with pytest.raises(UserError) as raised:
        find_contender("someone/else")
    line = str(raised.value)
    assert "(someone/else) is no local path, and the Hub cannot be reached (ConnectionErr" in line
    assert "does not exist: " in line and "\n" not in line
    save_checkpoint(tmp_path / "runs/tiny/final")
    for name in ("runs/tyni", "../nowhere", str(tmp_path / "nowhere"), "a/b/c", "no name"):
        with pytest.raises(UserError, match="does not exist: ") as raised:
            find_contender(name)
        assert "Hub" not in str(raised.value)
    assert not hub


def test_names_of_the_hub_beside_folders() -> None:
    cached = Path("/cache/models--openai-community--gpt2/snapshots/0123")
    assert short_names([cached, Path("runs/a/final")]) == ["openai-community/gpt2", "a"]
    names = short_names([Path("runs/a/final"), cached, Path("runs/b/final")])
    assert names == ["a", "openai-community/gpt2", "b"]
    assert short_names([cached, cached]) == ["openai-community/gpt2"] * 2
    assert hub_name(Path("a")) is None and hub_name(Path("/models--a--b/c/d")) is None


CODE = """
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
class OwnConfig(GPT2Config):
    model_type = "own"
class OwnModel(GPT2LMHeadModel):
    config_class = OwnConfig
"""


def with_config(folder: Path, **changes) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def test_code_of_its_own_runs_only_when_asked_for(gpt2: Path, tmp_path: Path) -> None:
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    folder = Path(shutil.copytree(gpt2, tmp_path / "coded"))
    with_config(folder, model_type="own", auto_map=classes)
    ran = tmp_path / "ran"
    (folder / "own.py").write_text(CODE + f"open({str(ran)!r}, 'w').close()\n")
    with pytest.raises(UserError, match="read that code, then add --trust-remote-code"):
        load_contender(folder)
    assert not ran.exists()
    coded, plain = load_contender(folder, trust_remote_code=True), load_contender(gpt2)
    assert ran.exists() and coded.mixer == "own"
    assert runs_own_code(coded.model) and not runs_own_code(plain.model)
    ours, theirs = (
        score_documents(one.model, one.tokenizer, DOCUMENTS, context=WINDOW)
        for one in (coded, plain)
    )
    np.testing.assert_array_equal(ours.nll, theirs.nll)


def test_flash_linear_attention_adds_its_models(gpt2: Path, tmp_path: Path, monkeypatch) -> None:
    """Its package is imported where transformers does not know an architecture."""
    folder = Path(shutil.copytree(gpt2, tmp_path / "model"))
    with_config(folder, model_type="own_of_fla")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"\('own_of_fla'\) is none .* install flash-linear-att"):
        load_contender(folder)
    monkeypatch.undo()
    (tmp_path / "fla").mkdir()
    (tmp_path / "fla/__init__.py").write_text(
        CODE.replace('"own"', '"own_of_fla"')
        + "AutoConfig.register('own_of_fla', OwnConfig)\n"
        + "AutoModelForCausalLM.register(OwnConfig, OwnModel)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert load_contender(folder).mixer == "own_of_fla"
    finally:
        sys.modules.pop("fla", None)


def test_ours_is_loaded_as_ours(tmp_path: Path) -> None:
    for mixer in ("retention", "attention"):
        checkpoint = load_contender(str(save_checkpoint(tmp_path / mixer, mixer)))
        assert checkpoint.mixer == mixer and hasattr(checkpoint.model, "new_cache")
        assert not hasattr(checkpoint.model, "inner")
