"""Checkpoints that carry the model's code: which do, and that our own process never runs it."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from retnet import cli
from retnet.checkpoints import load_checkpoint
from retnet.checkpoints.code import flat_code, model_code
from retnet.checkpoints.verify import checkpoint_damage
from retnet.commands import generate
from tests.training.test_train import run

CODE = {f"{name}.py" for name, _ in flat_code("models")}
AUTO = {
    "AutoConfig": "models.RetNetConfig",
    "AutoModel": "models.RetNetModel",
    "AutoModelForCausalLM": "models.RetNetForCausalLM",
}


def code_in(folder: Path) -> set[str]:
    """The names of its code; what config.json and the manifest say of it agrees."""
    found = {path.name for path in folder.glob("*.py")}
    described = json.loads((folder / "manifest.json").read_text())["files"]
    assert {name for name in described if name.endswith(".py")} == found
    auto_map = json.loads((folder / "config.json").read_text()).get("auto_map")
    assert auto_map == (AUTO if found else None)
    assert checkpoint_damage(folder, resumable=folder.parent.name == "checkpoints") is None
    return found


def test_final_by_default(finished: Path) -> None:
    assert code_in(finished / "final") == CODE >= {"models.py", "mixers_retention.py"}
    assert not code_in(finished / "best") and not code_in(finished / "checkpoints/step_6")


def test_all_and_none_in_one_run(options, tmp_path: Path, capsys) -> None:
    """The key may differ when a run goes on."""
    run(options, train__max_steps=4, train__export_code="none")
    folder = tmp_path / "run"
    assert not code_in(folder / "final")
    assert "trust_remote_code" not in (folder / "final/README.md").read_text()
    assert run(options, train__export_code="all") == 0
    for name in ("final", "best", "checkpoints/step_6"):
        assert code_in(folder / name) == CODE, name
    assert not code_in(folder / "checkpoints/step_4")
    assert "checkpoints need this package" not in capsys.readouterr().err


def test_code_that_was_changed_makes_a_damaged_end(options, finished: Path, capsys) -> None:
    (finished / "final/models.py").write_text("import os")
    assert run(options) == 0
    assert "final) is damaged, models.py has 9 bytes" in capsys.readouterr().err
    assert code_in(finished / "final") == CODE


def test_a_model_without_a_public_class(options, tmp_path: Path, monkeypatch, capsys) -> None:
    """A mixer that somebody has added works, without being exported."""
    monkeypatch.setattr("retnet.checkpoints.code.PUBLIC", ())
    assert run(options, train__max_steps=1, train__warmup_steps=0) == 0
    assert "checkpoints need this package: mixer retention has no class in" in (
        capsys.readouterr().err
    )
    assert not code_in(tmp_path / "run/final")


def test_the_code_is_that_of_the_start_of_the_run(monkeypatch) -> None:
    before = model_code("retnet_lm")
    monkeypatch.setattr("retnet.checkpoints.code.MODEL", Path("gone"))
    assert before is not None and model_code("retnet_lm") == before
    assert model_code("average_lm") is None


@pytest.fixture
def trapped(finished: Path, tmp_path: Path, monkeypatch) -> Path:
    """A checkpoint whose code must not run."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    for file in (finished / "final").glob("*.py"):
        file.write_text("raise SystemExit('code of a checkpoint ran')")
    yield finished / "final"
    assert not [name for name in sys.modules if name.startswith("transformers_modules.final")]
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": True}, {"trust_remote_code": False}])
def test_our_process_uses_the_installed_package(trapped: Path, tmp_path: Path, trust) -> None:
    config = AutoConfig.from_pretrained(trapped, **trust)
    model = AutoModelForCausalLM.from_pretrained(trapped, **trust)
    for kind in (type(config), type(model)):
        assert kind.__module__ == "retnet.model.models"
    AutoTokenizer.from_pretrained(trapped, **trust)
    own = load_checkpoint(trapped, **trust).model
    assert type(own) is type(model)
    for number, kept in enumerate((model, own)):  # and does not say of a copy that code is there
        kept.save_pretrained(tmp_path / f"copy{number}")
        assert "auto_map" not in (tmp_path / f"copy{number}/config.json").read_text()


def test_our_commands_use_the_installed_package(trapped: Path, capsys) -> None:
    arguments = [str(trapped), "--prompt", "a", "--max-new-tokens", "2"]
    for more in ([], ["--trust-remote-code"]):
        assert cli.run(generate.main, [*arguments, *more]) == 0, capsys.readouterr().err


def test_going_on_from_weights_with_code(options, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "final", tmp_path / "given")
    more = {"model__init_from": tmp_path / "given", "train__out_dir": tmp_path / "other"}
    assert run(options, **more, train__max_steps=2) == 0
    assert code_in(tmp_path / "other/final") == CODE
