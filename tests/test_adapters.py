"""generate.py and compare.py on folders that are only adapters of PEFT."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from retnet import cli
from retnet.checkpoints import load_checkpoint
from retnet.commands import compare, generate
from retnet.evaluation import load_contender
from tests.checkpoints.test_adapter import change_adapter, save_adapter
from tests.evaluation.foreign import save_foreign
from tests.generation.builders import byte_tokenizer, save_checkpoint

peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A base, an adapter of it, and the two as one."""
    parent = tmp_path_factory.mktemp("adapters")
    found = {name: parent / name for name in ("base", "adapter", "merged")}
    save_checkpoint(found["base"])
    save_adapter(found["adapter"], found["base"])
    load_checkpoint(found["adapter"], base=found["base"]).model.save_pretrained(found["merged"])
    byte_tokenizer().save_pretrained(found["merged"])
    return found


def test_generation(folders: dict[str, Path], capsys) -> None:
    base, adapter, merged = map(str, folders.values())
    made = {}
    for folder, options in ((base, []), (merged, []), (adapter, ["--base", base])):
        arguments = [folder, "--prompt", "ab", "--greedy", "--max-new-tokens", "9", *options]
        assert cli.run(generate.main, arguments) == 0
        made[folder], said = capsys.readouterr()
    assert made[base] != made[merged] == made[adapter]
    first, last = said.splitlines()
    assert first == f"adapter {adapter}: merged into {base} (named by --base)"
    assert last.endswith("| fast step")


def test_comparison(folders: dict[str, Path], tmp_path: Path, capsys) -> None:
    """--base is for all adapters, and each says so; the figures are the merged model's."""
    base, adapter, merged = map(str, folders.values())
    second, file = shutil.copytree(adapter, tmp_path / "second"), tmp_path / "out.json"
    change_adapter(second, base_model_name_or_path="nowhere")
    (tmp_path / "text.txt").write_text("some text that is not long\n" * 3)
    arguments = [base, merged, adapter, str(second), "--base", base, "--no-speed"]
    arguments += ["--text", str(tmp_path / "text.txt"), "--json", str(file)]
    assert cli.run(compare.main, arguments) == 0
    shown, said = capsys.readouterr()
    for name in (adapter, second):
        assert f"adapter {name}: merged into {base} (named by --base)\n" in said
    shown = " ".join(shown.split())
    assert shown.count("/adapter is an adapter, merged into /") == 1
    assert shown.count(" is an adapter, merged into /") == 2
    models = json.loads(file.read_text())["models"]
    assert [model["base"] for model in models] == [None, None, base, base]
    scores = [model["nats_per_token"] for model in models]
    assert scores[1:] == pytest.approx([scores[1]] * 3, abs=1e-5)
    assert abs(scores[0] - scores[1]) > 0.1
    assert len({model["parameters"] for model in models}) == 1


def test_a_base_without_an_adapter(folders: dict[str, Path], tmp_path: Path, capsys) -> None:
    base, adapter, merged = map(str, folders.values())
    for main, arguments, answer in (
        (generate.main, [base, "--base", merged], f"--base ({merged}) has no effect, checkpoint ("),
        (
            compare.main,
            [base, base, "--base", merged],
            f"({merged}) has no effect, none of {base},",
        ),
        (generate.main, [adapter], f"adapter ({adapter}) does not say what it is for: name the mo"),
        (compare.main, [base, adapter], f"adapter ({adapter}) does not say what it is for: name"),
        (generate.main, [adapter, "--base", f"{base}x"], f"--base: checkpoint ({base}x) does not"),
        (generate.main, [adapter, "--base="], "--base: checkpoint () is empty"),
    ):
        assert cli.run(main, arguments) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1 and answer in said, said


def test_an_adapter_of_a_model_of_transformers(tmp_path: Path) -> None:
    """Its tokenizer is its own where it has one."""
    base, ids = save_foreign(tmp_path / "gpt2"), torch.arange(9)[None]
    inner = load_contender(base).model.inner
    options = peft.LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False)
    adapted = peft.get_peft_model(inner, options).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    expected = adapted(ids).logits
    found = load_contender(tmp_path / "adapter", base=base)
    torch.testing.assert_close(found.model.inner(ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert (found.path, found.base) == (tmp_path / "adapter", base)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "own"
    tokenizer.save_pretrained(tmp_path / "adapter")
    assert load_contender(tmp_path / "adapter", base=base).tokenizer.chat_template == "own"
