"""What a run takes over from the checkpoint of ``model.init_from``."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast, RwkvConfig, RwkvForCausalLM

from retnet import cli
from retnet.checkpoints import load_checkpoint
from retnet.checkpoints.convert.__main__ import main as convert
from retnet.errors import UserError
from retnet.training.config import load_config
from tests.checkpoints.folders import change_config, shard
from tests.generation.builders import byte_tokenizer
from tests.training.test_train import run, weights

STILL = {"train__learning_rate": 1e-9}  # the weights stay what they were


@pytest.fixture
def plain(options: list[str]) -> list[str]:
    """Without a model or tokenizer: those of the recipe, which are others than ``whole``'s."""
    given = [option for option in options if not option.startswith(("model.", "data.tokenizer"))]
    return [*given, "train.max_steps=2", "train.warmup_steps=0"]


def test_model_and_tokenizer_are_the_checkpoints(plain, whole: Path, tmp_path, capsys) -> None:
    """The recipe's give way, and a line says so; what is of training alone stays the recipe's.

    The weights may lie in several files.
    """
    source = shutil.copytree(whole / "final", tmp_path / "shards")
    (source / "manifest.json").unlink()
    shard(source)
    assert len(list(source.glob("*.safetensors"))) == 2
    assert run(plain, model__init_from=source, **STILL) == 0
    said = capsys.readouterr().err
    assert f"model.init_from ({source}) decides: model.hidden_size (192 -> 16), " in said
    assert f"data.tokenizer (bpe -> {source})" in said
    began = yaml.safe_load((whole / "config.yaml").read_text())
    recorded = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert began["model"].pop("dropout") == 0.1 and recorded["model"].pop("dropout") == 0.0
    assert recorded["model"].pop("init_from") == str(source)
    del began["model"]["init_from"]
    same = {key: value for key, value in began["model"].items() if value is not None}
    assert same.items() <= recorded["model"].items()  # and what null was
    for name, expected in weights(whole / "final").items():
        torch.testing.assert_close(
            weights(tmp_path / "run/final")[name], expected, atol=1e-6, rtol=0
        )


@pytest.mark.slow
@pytest.mark.parametrize("place", ["best", "checkpoints/step_4"])
def test_every_kind_of_checkpoint(plain, whole: Path, tmp_path: Path, place: str) -> None:
    folder = whole / place
    expected = load_checkpoint(folder).model.state_dict()
    assert run(plain, model__init_from=folder, train__max_steps=1, **STILL) == 0
    found = load_checkpoint(tmp_path / "run").model.state_dict()
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=0)


@pytest.mark.slow
def test_it_goes_on_without_what_it_began_from(plain, whole: Path, tmp_path, capsys) -> None:
    source = shutil.copytree(whole, tmp_path / "source")
    options = [*plain, f"model.init_from={source}"]
    assert run(options) == 0
    shutil.rmtree(source)
    assert run(options) == 0
    assert "is finished" in capsys.readouterr().err
    file = tmp_path / "run/config.yaml"  # as it was when the recipe had the last word
    recorded = yaml.safe_load(file.read_text())
    recorded["model"]["intermediate_size"] = recorded["model"]["value_size"] = None
    recorded["data"] |= {"tokenizer": "bytes", "vocab_size": 4096}
    file.write_text(yaml.safe_dump(recorded))
    assert run(options) == 0
    assert "is finished" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "cache")  # the text is made again, with the run's own tokenizer
    assert run(options, train__max_steps=4) == 0
    assert "finished 4 steps" in capsys.readouterr().err
    assert run(options, train__out_dir=tmp_path / "new") == 2
    assert f"checkpoint ({source}) does not exist" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("rows", [258, 270])
def test_a_converted_checkpoint(plain, tmp_path: Path, rows: int, capsys) -> None:
    """Of another project: it has rows that no token uses, or none left for a padding token."""
    torch.manual_seed(0)
    config = RwkvConfig(vocab_size=rows, hidden_size=16, num_hidden_layers=2, context_length=16)
    RwkvForCausalLM(config).save_pretrained(tmp_path / "theirs")
    backend = byte_tokenizer().backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>"
    )
    tokenizer.save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs/tokenizer.json"
    content = json.loads(file.read_text())
    content["added_tokens"] = [x for x in content["added_tokens"] if x["content"] != "<pad>"]
    file.write_text(json.dumps(content))
    ours = tmp_path / "ours"
    assert cli.run(convert, ["from-rwkv", str(tmp_path / "theirs"), str(ours)]) == 0
    before = load_file(ours / "model.safetensors")
    assert run(plain, model__init_from=ours, **STILL) == 0
    assert "model.mixer (retention -> rwkv)" in capsys.readouterr().err
    after = weights(tmp_path / "run/final")
    assert after["lm_head.weight"].shape[0] == rows
    for name, weight in after.items():
        torch.testing.assert_close(weight, before[name].float(), atol=1e-6, rtol=0)
    if rows == 270:  # and it goes on
        assert run(plain, model__init_from=ours, train__max_steps=3, **STILL) == 0


def test_what_the_command_line_asks_for_stays(plain, whole: Path, tmp_path: Path, capsys) -> None:
    for key, value, own in (("hidden_size", 32, 16), ("mixer", "aft", "retention")):
        assert run([*plain, f"model.{key}={value}"], model__init_from=whole) == 2
        assert capsys.readouterr().err == (
            f"error: model.{key} ({value}) is {own} in the model of model.init_from ({whole}), "
            "whose weights mean that: leave it out\n"
        )
    assert load_config("configs/tiny.yaml", [f"model.init_from={whole}", "model.hidden_size=16"])
    bpe = {"data__tokenizer": "bpe", "data__vocab_size": 300}
    assert run(plain, model__init_from=whole, **bpe) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: model.init_from ({whole}) is another model: lm_head.weight is ")
    assert f"its tokenizer is data.tokenizer={whole / 'final'}, and" in line
    assert not (tmp_path / "run").exists()


def test_what_is_no_checkpoint_of_ours(whole: Path, tmp_path: Path) -> None:
    other = shutil.copytree(whole / "best", tmp_path / "other")  # which carries no code
    for changes, words in (
        ({"model_type": "gpt2"}, r"config\.json: model_type \(gpt2\) is none of retnet_lm, "),
        ({"model_type": "retnet_lm", "num_heads": 5}, r"must be divisible by num_heads \(5\)"),
    ):
        change_config(other, **changes)
        with pytest.raises(UserError, match=words):
            load_config("configs/tiny.yaml", [f"model.init_from={other}"])
    (other / "config.json").unlink()
    (other / "model.safetensors").unlink()
    (other / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"is an adapter \(adapter_config\.json\), which needs its"):
        load_config("configs/tiny.yaml", [f"model.init_from={other}"])
