"""A checkpoint with its code runs where this package is not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from retnet.checkpoints import load_checkpoint
from retnet.checkpoints.code import flat_code
from retnet.checkpoints.export import export_checkpoint, main
from retnet.checkpoints.verify import find_damage
from retnet.errors import UserError
from tests.generation.builders import save_checkpoint

THERE = """
import sys
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
out, ids = {}, torch.arange(60).view(2, 30)
for name in ("retention", "attention"):
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True).eval()
    with torch.no_grad():
        out[name] = model(ids).logits
    greedy = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    out[name + " text"] = model.generate(ids, **greedy)
    assert model.generate(ids, **greedy, use_cache=False).equal(out[name + " text"])
    assert AutoModel.from_pretrained(name, trust_remote_code=True)(ids).last_hidden_state.dim() == 3
    assert type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
assert "retnet" not in sys.modules
save_file(out, "out.safetensors")
"""


@pytest.mark.slow
def test_two_exports_in_a_process_without_the_package(tmp_path: Path) -> None:
    """Bit for bit our logits."""
    expected = {}
    for mixer in ("retention", "attention"):
        checkpoint = save_checkpoint(tmp_path / "runs" / mixer / "final", mixer)
        main([str(checkpoint.parent), str(tmp_path / mixer)])
        model = load_checkpoint(tmp_path / mixer).model
        with torch.no_grad():
            expected[mixer] = (
                type(model).from_pretrained(checkpoint)(torch.arange(60).view(2, 30)).logits
            )
    script = tmp_path / "there.py"
    script.write_text(THERE)
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    environment["HF_HUB_OFFLINE"] = "1"
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "out.safetensors")
    for mixer, logits in expected.items():
        assert torch.equal(found[mixer], logits)


def test_what_is_in_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    checkpoint = save_checkpoint(tmp_path / "final", record={"key": 1})
    adapter = ("adapter_config.json", "adapter_model.safetensors")  # transformers would apply it
    for name in ("optimizer.safetensors", "training_state.json", *adapter):
        (checkpoint / name).write_text("{}")
    main([str(checkpoint), str(tmp_path / "out")])
    assert str(tmp_path / "out") in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"models.py", "mixers_retention.py", "ops_decay.py", "data.json"} <= names
    assert not {"optimizer.safetensors", "training_state.json", "__init__.py"} & names
    code = sum(name.endswith(".py") for name in names)
    assert f"({code} files of Python" in Path("docs/checkpoints.md").read_text()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["auto_map"]["AutoConfig"] == "models.RetNetConfig"
    assert config["auto_map"]["AutoModel"] == "models.RetNetModel"
    described = json.loads((tmp_path / "out" / "manifest.json").read_text())["files"]
    assert names - {"manifest.json"} == set(described)


def test_all_imports_are_flat() -> None:
    for name, text in flat_code("models"):
        assert "." not in name and "from .." not in text and "from .mixers." not in text


def test_an_export_of_an_export(tmp_path: Path, caplog) -> None:
    """Its code is today's, and what it had is no news; its card may have been edited."""
    checkpoint = save_checkpoint(tmp_path / "final")
    (checkpoint / "README.md").write_text("first")
    export_checkpoint(checkpoint, tmp_path / "a")
    (tmp_path / "a/README.md").write_text("edited")
    assert find_damage(tmp_path / "a") is None
    (tmp_path / "a/models.py").write_text("of another time")
    export_checkpoint(tmp_path / "a", tmp_path / "b")
    notice, text = (tmp_path / "b/models.py").read_text().split("\n", 1)
    assert text == dict(flat_code("models"))["models"]
    license_text = Path("LICENSE").read_text()
    for words in ("MIT", "Copyright (c) 2026 The RetNet developers"):
        assert words in notice and words in license_text
    assert (tmp_path / "b/README.md").read_text() == "edited"
    assert not caplog.messages


def test_mistakes(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "final")
    with pytest.raises(UserError, match=r"folder \(.*\) exists: name one that does not"):
        export_checkpoint(checkpoint, tmp_path)
    with pytest.raises(UserError, match="cannot be written"):
        export_checkpoint(checkpoint, tmp_path / "absent" / "out")
    with pytest.raises(UserError, match="does not exist"):
        export_checkpoint(tmp_path / "nothing", tmp_path / "out")
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"model_type": "average_lm"}))
    with pytest.raises(UserError, match=r"model_type \(average_lm\) has no class in"):
        export_checkpoint(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_not_into_the_checkpoint_itself(tmp_path: Path) -> None:
    """A run's next final/ takes the place of this one, with all that is in it."""
    checkpoint = save_checkpoint(tmp_path / "final")
    before = {file.name for file in checkpoint.iterdir()}
    with pytest.raises(UserError, match=r"x\) lies in the checkpoint .*: name one elsewhere$"):
        export_checkpoint(checkpoint, checkpoint / "a/x")
    assert {file.name for file in checkpoint.iterdir()} == before


def test_what_a_stranger_put_beside_the_model_stays_behind(tmp_path: Path, caplog) -> None:
    """Code, names of code, and files of this machine that links lead to."""
    checkpoint = save_checkpoint(tmp_path / "final")
    (tmp_path / "secret").write_text("a secret")
    (checkpoint / "evil.py").write_text("print(1)")
    for name in ("notes.txt", "README.md"):
        (checkpoint / name).symlink_to(tmp_path / "secret")
    for name, key in (("tokenizer_config.json", "auto_map"), ("config.json", "custom_pipelines")):
        content = json.loads((checkpoint / name).read_text())
        (checkpoint / name).write_text(json.dumps(content | {key: {"x": "evil.X"}}))
    weights = checkpoint / "model.safetensors"  # links as huggingface_hub makes them are followed
    (tmp_path / "blobs").mkdir()
    for file in (weights, checkpoint / "tokenizer.json"):
        file.symlink_to(file.rename(tmp_path / "blobs" / file.stem))
    export_checkpoint(checkpoint, tmp_path / "out")
    files = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert not {"evil.py", "notes.txt", "README.md"} & files.keys()
    assert {"model.safetensors", "tokenizer.json"} <= files.keys()
    assert not any(b"secret" in content or b"evil" in content for content in files.values())
    assert caplog.messages == ["not exported: README.md, evil.py, notes.txt"]
