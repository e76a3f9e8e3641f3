"""Keys, defaults, overrides, and the answer to each mistake."""

import dataclasses
import re
from pathlib import Path

import pytest

from retnet import RetNetConfig
from retnet.data import DataSpec
from retnet.errors import UserError
from retnet.training.config import load_config, to_yaml
from retnet.training.spec import RESUMABLE_KEYS, Config, TrainSpec, describe_keys, flatten


def test_defaults_file_arguments(tmp_path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("model:\n  hidden_size: 64\ntrain:\n  learning_rate: 3e-4\n  seed: 5\n")
    config = load_config(file, ["train.seed=7", "model.decay=0.9", "train.trackers=[wandb]"])
    assert config.model.hidden_size == 64
    assert config.train.learning_rate == 3e-4
    assert config.train.seed == 7
    assert config.model.decay == 0.9
    assert config.train.trackers == ["wandb"]
    assert config.model.num_heads == RetNetConfig.num_heads
    assert config.train.out_dir == "runs/mine-retention"
    assert load_config(file, ["model.mixer=attention"]).train.out_dir == "runs/mine-attention"
    assert load_config(file, ["train.out_dir=x"]).train.out_dir == "x"
    assert load_config(file, ["model.decay=1"]).model.decay == 1


def test_the_resolved_configuration_is_itself_one(tmp_path) -> None:
    config = load_config(None, ["model.mixer=attention", "train.grad_clip=null"])
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert load_config(file) == config


def test_an_empty_file_is_all_defaults(tmp_path) -> None:
    file = tmp_path / "empty.yaml"
    file.write_text("")
    assert load_config(file).model == load_config(None).model


def test_every_key_is_described() -> None:
    lines = "\n".join(describe_keys())
    for key in flatten(Config()):
        assert f"  {key}: " in lines
    assert "model.mixer: retention | attention = retention\n" in lines
    assert "data.validation: str | null = null\n" in lines
    for section in (Config().model, DataSpec, TrainSpec):
        for option in dataclasses.fields(section):
            assert len(option.metadata["help"]) > 5


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.hiden_size=3", "model.hiden_size): Key 'hiden_size' not in"),
        ("modl.hidden_size=3", "Did you mean: 'model'"),
        ("model.hidden_size=big", "model.hidden_size): Value 'big'"),
        ("model.mixer=lstm", "expected one of ['retention', 'attention']"),
        ("model=3", "sections"),
        ("--train.learning_rate=3", "without dashes, as in train.learning_rate=3"),
        ("--train.learning_rate", "as in train.learning_rate=VALUE"),
        ("data.source=???", "(data.source): ??? is no value: set it, or leave it out"),
        ("train=???", "(train): ??? is no value"),
        ("train.seed", "must be section.key=value"),
        ("=3", "must be section.key=value"),
        ("train.trackers=[wandb", "argument (train.trackers=[wandb) can't be read"),
        ("train.trackers=[comet]", "train.trackers (comet) must be any of wandb, tensorboard"),
        ("train.max_steps=0", "train.max_steps (0) must be at least 1"),
        ("train.batch_size=-1", "train.batch_size (-1)"),
        ("train.learning_rate=0", "train.learning_rate (0.0)"),
        ("train.learning_rate=nan", "train.learning_rate (nan)"),
        ("train.warmup_steps=99999", "train.warmup_steps (99999) must be at most train.max_steps"),
        ("train.final_learning_rate=2", "train.final_learning_rate (2.0)"),
        ("train.beta2=1", "train.beta2 (1.0)"),
        ("train.grad_clip=0", "train.grad_clip (0.0)"),
        ("train.eval_max_tokens=0", "train.eval_max_tokens (0)"),
        ("train.eval_max_tokens=1", "train.eval_max_tokens (1) must be at least 2"),
        ("train.seed=-1", "train.seed (-1)"),
        ("train.precision=fp16", "expected one of ['auto', 'fp32', 'bf16']"),
        ("data.validation_fraction=2", "data.validation_fraction (2.0)"),
    ],
)
def test_mistakes(override: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(None, [override])
    assert words in str(caught.value)


def test_files_that_are_no_configuration(tmp_path) -> None:
    with pytest.raises(UserError, match=r"configs/tiny\.yaml"):
        load_config(tmp_path / "missing.yaml")
    for content, words in (
        ("model: [", "not valid YAML"),
        ("data:\n  source: ???", r"data\.source"),
        ("- 1", "sections"),
        ("a", "sections"),
    ):
        file = tmp_path / "bad.yaml"
        file.write_text(content)
        with pytest.raises(UserError, match=words):
            load_config(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not valid YAML"):
        load_config(file)


def test_all_problems_at_once() -> None:
    with pytest.raises(UserError, match=r"train\.keep \(0\).*train\.seed \(-1\)"):
        load_config(None, ["train.keep=0", "train.seed=-1"])


def test_the_documentation_lists_the_keys_that_may_change() -> None:
    text = Path("docs/training.md").read_text()
    paragraph = next(part for part in text.split("\n\n") if part.startswith("`train.max_steps`"))
    assert re.findall(r"`([a-z_.]+)`", paragraph) == list(RESUMABLE_KEYS)
