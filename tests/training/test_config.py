"""Keys, defaults, overrides, and the answer to each mistake."""

import dataclasses
import re
from pathlib import Path

import pytest

from retnet import RetNetConfig
from retnet.data import DataSpec
from retnet.errors import UserError
from retnet.model import MIXERS
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
    assert f"model.mixer: {' | '.join(MIXERS)} = retention\n" in lines
    assert "data.validation: str | null = null\n" in lines
    for section in (Config().model, DataSpec, TrainSpec):
        for option in dataclasses.fields(section):
            assert len(option.metadata["help"]) > 5


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.hiden_size=3", "configuration key (model.hiden_size) is not known: did you mean h"),
        ("modl.hidden_size=3", "(modl.hidden_size) is not known: did you mean model?"),
        ("model.hidden_size=big", "model.hidden_size (big) must be a whole number"),
        ("model.hidden_size=16.5", "model.hidden_size (16.5) must be a whole number"),
        ("data.seq_len=\uff11\uff16", "data.seq_len (\uff11\uff16) must be a whole number"),
        ("data.seq_len=\u0663", "data.seq_len (\u0663) must be a whole number"),
        ("train.beta1=0.\uff15", "train.beta1 (0.\uff15) must be a number"),
        (
            "model.attention_layers=[\uff11]",
            "model.attention_layers (a list) must be a list of whole",
        ),
        ("model.tie_word_embeddings=2", "model.tie_word_embeddings (2) must be true or false"),
        ("model.mixer=lstm", "model.mixer (lstm) must be one of retention, attention"),
        ("model.decay=[1]", "model.decay (a list) must be text or a whole number or a number or n"),
        ("model=3", "argument (model=3) must be section.key=value"),
        ("--train.learning_rate=3", "without dashes, as in train.learning_rate=3"),
        ("--train.learning_rate", "as in train.learning_rate=VALUE"),
        ("train.resume=", "train.resume ('') must not be empty: set it or leave it out"),
        ("train.out_dir= ", "train.out_dir (' ') is empty"),
        ("model.init_from=", "model.init_from ('') must not be empty"),
        ("train.learning_rate=1" + "0" * 400, "train.learning_rate (a number of hundreds of"),
        ("train.max_steps=0x1" + "0" * 5000, "train.max_steps (a number of hundreds of digits) m"),
        ("train.max_steps=1" + "0" * 5000, "argument (train.max_steps=1000"),
        ("train.seed", "must be section.key=value"),
        (
            "train.seed=!!int ''",
            "argument (train.seed=!!int '') can't be read: a value that is non",
        ),
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
        ("train.precision=fp16", "train.precision (fp16) must be one of auto, fp32, bf16"),
        ("data.validation_fraction=2", "data.validation_fraction (2.0)"),
    ],
)
def test_mistakes(override: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(None, [override])
    assert words in str(caught.value)


def test_files_that_are_no_configuration(tmp_path) -> None:
    with pytest.raises(UserError, match=r"or a recipe's name: base, .*, tiny, "):
        load_config(tmp_path / "missing.yaml")
    for content, words in (
        ("model: [", "not valid YAML"),
        ("- 1", "sections"),
        ("a", "sections"),
        ("data: text", r"bad\.yaml\): data \(text\) must be a section with keys"),
        ("1: 2", r"configuration key \(1\) is not known"),
        ("train:\n  ? [a]\n  : 1", "not valid YAML"),
        ("train: &a\n  seed: *a", "not valid YAML: more than 10,000 values"),
        ("train: {compile: !!bool maybe}", "a value that is none of its tag .*:bool\n.* line 1"),
        ("train: {seed: !!int ''}", "not valid YAML: a value that is none of its tag .*:int"),
        ("train: {beta1: !!float ''}", "not valid YAML: a value that is none of its tag .*:float"),
        ("data: {split: !!timestamp x}", "a value that is none of its tag .*:timestamp"),
        ('train: {sample_prompt: "\\ud800"}', r"sample_prompt \('\\ud800'\) has half a surrogate"),
        ('data: {text_field: "a\\udc80"}', r"data\.text_field \('a\\udc80'\) has half a surrogate"),
        ("train:\n  trackers: [1]", r"train\.trackers \(a list\) must be a list, as \[a, b\]"),
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


AS_TYPED = [
    ("train.out_dir", "2024_01_05"), ("train.out_dir", "2024-01-05"), ("train.out_dir", "010"),
    ("train.out_dir", "1e3"), ("train.out_dir", "1:30"), ("train.out_dir", "0x10"),
    ("train.out_dir", "a=b"), ("train.out_dir", "null~"), ("data.split", "2021.10"),
    ("data.split", "null"), ("data.hub_config", "no"), ("data.hub_config", "~"),
    ("data.source", "notes #2.txt"), ("data.source", "*.txt"), ("data.source", "&a"),
    ("data.source", "???"), ("data.source", "[a-z]*.md"), ("data.source", "a: b"),
    ("train.sample_prompt", "def "), ("train.sample_prompt", "x = 1 # c"),
    ("train.sample_prompt", ""), ("train.sample_prompt", "'quoted'"),
    ("train.sample_prompt", '"quoted"'), ("train.sample_prompt", "line\nline\n\n"),
    ("train.sample_prompt", "\t- {a} \\n \x85 \ufeff \U0001f600"),
    ("train.sample_prompt", "${oc.env:HOME}"), ("train.sample_prompt", "${"),
    ("train.sample_prompt", "\\${a} ${train.seed}} " + "long " * 40),
]  # fmt: skip


@pytest.mark.parametrize(("key", "text"), AS_TYPED)
def test_text_is_what_was_typed(tmp_path, said, key: str, text: str) -> None:
    """On the command line all that stands after the first =; and so it stays when it is saved."""
    config = load_config(None, [f"{key}={text}"])
    assert flatten(config)[key] == text
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(file, recorded=True) == config
    assert not said


def test_null_is_none_where_the_key_may_have_it() -> None:
    config = load_config(None, ["train.out_dir=null", "data.validation=null", "data.split=null"])
    assert config.train.out_dir == "runs/default-retention"
    assert config.data.validation is None and config.data.split == "null"


def test_other_keys_are_read_as_yaml() -> None:
    given = ["model.decay=0.97", "train.grad_clip=null", "train.learning_rate=1e-3",
             "train.compile=on", "train.trackers=[wandb, tensorboard]", "train.seed='7'",
             "train.gradient_checkpointing=1"]  # fmt: skip
    config = load_config(None, given)
    assert config.model.decay == 0.97 and config.train.grad_clip is None
    assert config.train.learning_rate == 1e-3 and config.train.seed == 7
    assert config.train.compile is True and config.train.gradient_checkpointing is True
    assert config.train.trackers == ["wandb", "tensorboard"]
    assert load_config(None, ["model.decay=paper"]).model.decay == "paper"


@pytest.mark.parametrize(
    "value", ["2021.10", "010", "1e3", "1:30", "no", "2024-01-05", "2024-01-05 10:00:00", "0x10"]
)
def test_text_in_a_file_that_yaml_reads_as_something_else(tmp_path, value: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"data:\n  split: {value}\n")
    with pytest.raises(UserError, match=r"mine\.yaml\): data\.split \(.*must be text.*in quotes"):
        load_config(file)
    file.write_text(f"data:\n  split: '{value}'\n")
    assert load_config(file).data.split == value


def test_a_dollar_in_a_recipe_is_text_and_one_line_says_so(tmp_path, said, monkeypatch) -> None:
    monkeypatch.setenv("SECRET", "s3cret")
    file = tmp_path / "mine.yaml"
    values = {"sample_prompt": "${oc.env:SECRET}", "resume": "${train.seed}"}
    file.write_text("train:\n" + "".join(f"  {k}: '{v}'\n" for k, v in values.items()))
    config = load_config(file)
    assert flatten(config)["train.sample_prompt"] == "${oc.env:SECRET}"
    assert "s3cret" not in to_yaml(config)
    assert said == [
        f"train.sample_prompt, train.resume in {file}: ${{...}} is text, nothing is replaced"
    ]


def test_a_file_of_aliases_that_grow_is_refused(tmp_path) -> None:
    """Each line ten times the one before: what was 10^9 numbers took the memory."""
    lines = ["a0: &a0 [1]"] + [f"a{i}: &a{i} [{f'*a{i - 1}, ' * 10}]" for i in range(1, 10)]
    file = tmp_path / "mine.yaml"
    file.write_text("\n".join(lines))
    with pytest.raises(UserError, match="more than 10,000 values"):
        load_config(file)
    file.write_text("x: &x {seed: 3}\n")
    with pytest.raises(UserError, match=r"configuration key \(x\) is not known"):
        load_config(file)
    file.write_text("model: &m {hidden_size: 32}\ntrain:\n  <<: {seed: 1}\n  seed: 2\n")
    assert load_config(file).train.seed == 2


# as a run wrote it while OmegaConf wrote these files
RECORDED = """\
model:
  mixer: retention
  decay: paper
  init_from: null
data:
  source: '2024'
  text_field: '1e3'
  split: "no"
  validation_fraction: 0.1
train:
  learning_rate: 0.0002
  final_learning_rate: 1.0e-05
  out_dir: '2024-01-05'
  sample_prompt: "class Parser:\\n    def __init__(self"
  trackers: []
"""


def test_files_that_runs_wrote_so_far_are_read(tmp_path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(RECORDED)
    config = flatten(load_config(file, recorded=True))
    assert config["data.source"] == "2024" and config["data.text_field"] == "1e3"
    assert config["data.split"] == "no" and config["train.out_dir"] == "2024-01-05"
    assert config["train.sample_prompt"] == "class Parser:\n    def __init__(self"
    assert config["train.final_learning_rate"] == 1e-5


def test_a_warm_up_of_the_file_fits_the_steps_of_the_command_line(tmp_path, said) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("train:\n  max_steps: 1000\n  warmup_steps: 100\n")
    assert load_config(file, ["train.max_steps=100"]).train.warmup_steps == 100
    assert not said
    assert load_config(file, ["train.max_steps=20"]).train.warmup_steps == 2
    assert load_config(file, ["train.max_steps=9"]).train.warmup_steps == 0
    assert said == [
        f"train.warmup_steps (100) is too long for train.max_steps ({steps}): it is {warmup}, a "
        "tenth of them"
        for steps, warmup in ((20, 2), (9, 0))
    ]
    with pytest.raises(UserError, match=r"train\.warmup_steps \(50\) must be at most"):
        load_config(file, ["train.max_steps=20", "train.warmup_steps=50"])
    file.write_text("train:\n  max_steps: 20\n  warmup_steps: 100\n")
    with pytest.raises(UserError, match=r"train\.warmup_steps \(100\) must be at most"):
        load_config(file)


def test_a_file_that_is_too_long_is_not_read(tmp_path) -> None:
    """One of 30 MB took minutes."""
    (tmp_path / "a.yaml").write_text("# " + "a" * (1 << 20))
    with pytest.raises(UserError, match=r"a\.yaml\) has 1,048,578 characters, and no more"):
        load_config(tmp_path / "a.yaml")
