"""Every mistake is answered: exit code 2, one line with key, value and fix, nothing written.

Those of train.py stand here, one row a mistake: its arguments, and the words its answer must have.
``{...}`` in arguments and words are paths of the ``places`` fixture. Those of generate.py and
compare.py are in test_mistakes_checkpoints.py, and what needs more than arguments in
test_mistakes_outside.py.
"""

import io
from pathlib import Path

import pytest

from retnet import cli
from tests.places import AFT, MAINS, RUN

CONFIGURATION = [
    ("", "the following arguments are required: config"),
    ("train.max_steps=3", "configuration (train.max_steps=3) comes first: a YAML file"),
    ("{new}/no.yaml", "configuration ({new}/no.yaml) is not a file: give the path of a YAML file"),
    ("{bad}/list.yaml", "configuration ({bad}/list.yaml) must have the sections"),
    ("{bad}/broken.yaml", "configuration ({bad}/broken.yaml) is not valid YAML"),
    ("{bad}/latin.yaml", "configuration ({bad}/latin.yaml) is not valid YAML"),
    ("{bad}/deep.yaml", "configuration ({bad}/deep.yaml) is not valid YAML"),
    ("{bad}/twice.yaml", "configuration ({bad}/twice.yaml) is not valid YAML"),
    ("{long}.yaml", "configuration ({long}.yaml) cannot be reached (File name too long)"),
    ("{bad}/unknown.yaml", "{bad}/unknown.yaml): configuration key (model.hiden_size)"),
    (RUN + " model.hiden_size=3", "(model.hiden_size) is not known: did you mean hidden_size"),
    (RUN + " trian.max_steps=3", "(trian.max_steps) is not known: did you mean train?"),
    (RUN + " train.max_steps=many", "train.max_steps (many) must be a whole number"),
    (RUN + " train.max_steps=1.5", "train.max_steps (1.5) must be a whole number"),
    (RUN + " train.compile=perhaps", "train.compile (perhaps) must be true or false"),
    (RUN + " train.max_steps=null", "train.max_steps (null) must be a whole number"),
    (RUN + " train.max_steps=0", "train.max_steps (0) must be at least 1"),
    (RUN + " train.batch_size=-8", "train.batch_size (-8) must be at least 1"),
    (RUN + " train.learning_rate=0", "train.learning_rate (0.0) must be above 0"),
    (RUN + " train.learning_rate=inf", "train.learning_rate (inf) must be above 0"),
    (RUN + " train.warmup_steps=2", "train.warmup_steps (2) must be at most train.max_steps (1)"),
    (RUN + " train.beta1=1", "train.beta1 (1.0)"),
    (RUN + " train.seed=-1", "train.seed (-1) must be at least 0"),
    (RUN + " train.seed=18446744073709551616", "train.seed (18446744073709551616) must be"),
    (RUN + " train.weight_decay=nan", "train.weight_decay (nan) must be at least 0"),
    (RUN + " --train.lr=1e-3", "keys are written without dashes, as in train.lr=1e-3"),
    (RUN + " --train.learning_rate 1e-3", "as in train.learning_rate=VALUE"),
    (RUN + " train.learning_rate", "must be section.key=value"),
    (RUN + " train.schedule=step", "(step) must be one of cosine, linear, wsd, constant"),
    (RUN + " train.precision=fp16", "(fp16) must be one of auto, fp32, bf16"),
    (RUN + " train.export_code=best", "train.export_code (best) must be one of final, all, none"),
    (RUN + " train.export_code=null", "train.export_code (null) must be one of final, all, none"),
    (RUN + " train.precision=float32", "(float32) must be one of auto, fp32, bf16"),
    (RUN + " train.optimizer=adam", "train.optimizer (adam) must be one of adamw, muon"),
    (RUN + " train.optimizer=muon train.learning_rate=20", "train.learning_rate (20.0) must be ab"),
    (RUN + " train.optimizer=muon train.adamw_learning_rate=0", "adamw_learning_rate (0.0) must"),
    (RUN + " train.optimizer=muon train.learning_rate=0.02 train.weight_decay=60",
     "train.weight_decay (60.0) times train.learning_rate (0.02) is what"),
    (RUN + " train.adamw_learning_rate=1e-3", "(0.001) has no meaning with train.optimizer=adamw"),
    (RUN + " train.decay_fraction=0.5", "(0.5) has no meaning with train.schedule=linear"),
    (RUN + " train.schedule=wsd train.decay_fraction=0", "train.decay_fraction (0.0) is a share"),
    (RUN + " train.trackers=[comet_ml]", "train.trackers (comet_ml) must be any of wandb, "),
    (RUN + " train.trackers=[wandb,wandb]", "train.trackers names wandb twice: leave one out"),
    (RUN + " train.trackers=wandb", "train.trackers (wandb) must be a list, as [a, b]"),
    (RUN + " train.trackers={{a:1}}", "train.trackers (a mapping) must be a list, as [a, b]"),
    (RUN + " train.weight_decay=inf", "train.weight_decay (inf) times train.learning_rate (0.004)"),
    (RUN + " train.weight_decay=300", "train.weight_decay (300.0) times train.learning_rate"),
    (RUN + " train.optimizer=muon train.learning_rate=1e-4 train.adamw_learning_rate=9 "
     "train.weight_decay=100", "train.weight_decay (100.0) times train.adamw_learning_rate (9.0)"),
    (RUN + " train.optimizer=muon train.learning_rate=5e-324 train.adamw_learning_rate=1",
     "train.learning_rate (5e-324) must be above 0, 1e-20 at least, and below 10"),
    (RUN + " train.sample_tokens=999999999999 data.cache_dir={folder}/cache",
     "and train.sample_tokens (999,999,999,999) need"),
    (RUN + " model.mixer=mamba", "model.mixer (mamba) must be one of retention, attention"),
    (RUN + " model.hidden_size=15", "model.hidden_size (15) must be"),
    (RUN + " model.hidden_size=0", "model.hidden_size (0)"),
    (RUN + " model.num_hidden_layers=0", "model.num_hidden_layers (0)"),
    (RUN + " model.num_hidden_layers=1000000000", "model.num_hidden_layers (1000000000) must"),
    (RUN + " model.hidden_size=200000000", "model.hidden_size (200000000), model.num"),
    (RUN + " model.intermediate_size=999999999999", "model.intermediate_size (999999999999), mod"),
    (RUN + " train.batch_size=99999999999999", "train.batch_size (99999999999999) rows of"),
    (RUN + " train.gradient_accumulation_steps=1000000000000", "must be at most 1000000"),
    (RUN + " train.max_steps=99999999999999999999", "train.max_steps (99999999999999999999) must"),
    (RUN + " model.value_size=2000000", "model.value_size (2000000) leaves less than hidden_size"),
    (RUN + " model.dropout=1.5", "model.dropout (1.5)"),
    (RUN + " model.decay=2", "model.decay (2)"),
    (RUN + " model.decay=papr", "model.decay ('papr') must be"),
    (RUN + " model.norm=batchnorm", "model.norm ('batchnorm') must be"),
    (RUN + " model.ffn=relu", "model.ffn ('relu') must be"),
    (RUN + " model.chunk_size=0", "model.chunk_size (0)"),
    (RUN + " model.attention_layers=[9]", "model.attention_layers ([9]) must be among the layers"),
    (RUN + " model.attention_layers=[1,1]", "model.attention_layers ([1, 1]) names a layer twice"),
    (RUN + " model.attention_layers=[1.5]", "must be a list of whole numbers, as [1, 3]"),
    (RUN + " model.attention_window=4", "model.attention_window (4) needs layers that are"),
    (RUN + " model.attention_layers=[1] model.attention_window=0", "attention_window (0) must be"),
    (RUN + " model.mixer=attention model.attention_layers=[1]", "([1]) has no meaning with"),
    (RUN + " model.attention_layers=[1] train.carry_state=true", "or model.attention_window"),
    (RUN + " model.mixer=attention train.carry_state=true", "train.carry_state (true) needs a"),
    (RUN + " model.mixer=aft", "model.num_heads (2) has no meaning with model.mixer=aft"),
    (RUN + " model.aft_rank=8", "model.aft_rank (8) has no meaning with model.mixer=retention"),
    (AFT + " model.rotary_layout=half", "model.rotary_layout (half) has no meaning with"),
    (AFT + " model.aft_window=9", "model.aft_window (9) must be at most max_position_embeddings"),
    (AFT + " model.aft_variant=full model.aft_window=4", "model.aft_window (4) has no meaning"),
    (AFT + " model.aft_variant=conv", "model.aft_variant ('conv') must be one of local, simple"),
    (AFT + " model.positions=rotary", "model.positions ('rotary') has no meaning for aft"),
    (AFT + " train.carry_state=true", "train.carry_state (true) leads beyond data.seq_len (8)"),
    (RUN + " model.positions=learned train.carry_state=true", "leads beyond data.seq_len (8)"),
    (AFT + " model.init_from={runs}/aft data.seq_len=17", "data.seq_len (17) is beyond the 16"),
    (AFT + " train.sample_prompt=twelveletter data.cache_dir={folder}/cache",
     "train.sample_prompt has 13 tokens (with <bos>) and leaves no room"),
    (RUN + " model.mixer=performer model.num_features=0", "model.num_features (0) must be a whole"),
    (RUN + " model.mixer=performer model.num_features=1000000000000",
     "with num_features (1000000000000) the model needs 64,000,000,"),
    (RUN + " model.mixer=performer model.num_features=4611686018427387904", "must be at most 1099"),
    (RUN + " model.attention_layers=[1] model.attention_window=1000000000000 train.carry_state=1",
     "with attention_window (1000000000000) the state of 8 rows needs 1,024,000,"),
    (RUN + " model.mixer=performer model.feature_redraw_interval=-1",
     "model.feature_redraw_interval (-1) must be a whole number of at least 1"),
    (RUN + " model.mixer=linear model.num_features=8",
     "model.num_features (8) has no meaning with model.mixer=linear: leave it out"),
    (RUN + " model.mixer=linear model.decay=1.0", "model.decay (1.0) has no meaning with model.mi"),
    (RUN + " model.mixer=linear model.chunk_size=0", "model.chunk_size (0) must be a whole number"),
    (RUN + " model.mixer=performer model.feature_redraw_interval=5 train.carry_state=true",
     "train.carry_state (true) can't be had with model.feature_redraw_interval (5), after which a"),
    (RUN + " model.mixer=linear model.positions=learned train.carry_state=true",
     "train.carry_state (true) leads beyond data.seq_len (8)"),
    (RUN + " train.carry_state=true data.reset_state_at_documents=false", "keeps documents apart"),
    (RUN + " train.carry_state=true train.gradient_checkpointing=true", "set it to false"),
    (RUN + " train.carry_state=true train.batch_size=999 data.cache_dir={folder}/cache",
     "use a smaller train.batch_size"),
    (RUN + " train.sample_prompt=\udcff", "is not UTF-8: write it in UTF-8"),
    (RUN + " train.out_dir={corpus}", "train.out_dir ({corpus}) is a file: name a folder"),
    (RUN + " train.out_dir=/proc/nowhere", "train.out_dir (/proc/nowhere) can't be written"),
    (RUN + " train.out_dir={long}", "train.out_dir ({long}) cannot be reached (File name too"),
    (RUN + " train.resume={long}", "train.resume ({long}) cannot be reached (File name too"),
    (RUN + " train.out_dir=~nobodyx/x", "train.out_dir (~nobodyx/x) has no home folder"),
    ("{bad}/nowhere.yaml", "train.out_dir (a\0b) cannot be a path, it has a null byte"),
    (RUN + " train.resume=~nobodyx/x", "train.resume (~nobodyx/x) has no home folder"),
    ("~nobodyx/x.yaml", "configuration (~nobodyx/x.yaml) has no home folder"),
    (RUN + " train.resume={new}/no", "train.resume ({new}/no) must be auto, never, or"),
    (RUN + " train.resume={runs}/retention/final", "train.resume ({runs}/retention/final)"),
]  # fmt: skip

DATA = [
    (
        RUN + " data.format=messages",
        "{corpus} line 1 has no field messages (there are text, number",
    ),
    (
        RUN + " data.format=messages data.source={bad}/chat.jsonl",
        '{bad}/chat.jsonl line 2: message 1 has the role "human": name it as one of system',
    ),
    (
        RUN + " data.format=messages data.source={bad}/short.txt",
        "is not one of conversations (.txt",
    ),
    (
        RUN + " data.format=messages data.text_field=a",
        "data.text_field (a) has no meaning with dat",
    ),
    (
        RUN + " data.format=messages data.source=python-stdlib",
        "(python-stdlib) has no conversations",
    ),
    (RUN + " data.format=chat", "data.format (chat) must be one of text, messages"),
    (RUN + " data.source={new}/no.txt", "data.source ({new}/no.txt) does not exist"),
    (RUN + " data.source=", "data.source"),
    (RUN + " data.source={long}", "data.source ({long}) cannot be reached (File name too long)"),
    (RUN + " data.source=~nobodyx/x", "data.source (~nobodyx/x) has no home folder"),
    (RUN.replace("{tiny} data.source={corpus}", "{bad}/null.yaml"), "data.source (a\0b) cannot be"),
    (RUN + " data.source={bad}/empty.txt", "data.source ({bad}/empty.txt) is empty"),
    (RUN + " data.source={bad}/empty.txt data.streaming=true", "{bad}/empty.txt) is empty"),
    (RUN + " data.source={bad}/short.txt data.streaming=true", "short.txt) leaves the validation"),
    (RUN + " data.source={bad}/nothing", "is a folder without a file to read"),
    (RUN + " data.source={bad}/*.xyz", "data.source ({bad}/*.xyz) matches no file"),
    (RUN + " data.source={bad}/binary.txt", "{bad}/binary.txt is not UTF-8 text: the first bad"),
    (RUN + " data.source={bad}/latin.txt", "{bad}/latin.txt is not UTF-8 text"),
    (RUN + " data.source={bad}/image.png", "data.source ({bad}/image.png) has a suffix"),
    (RUN + " data.source={bad}/short.txt", "data.seq_len (8)"),
    (RUN + " data.source={bad}/broken.jsonl", "{bad}/broken.jsonl line 2 is not JSON"),
    (RUN + " data.source={bad}/deep.jsonl", "{bad}/deep.jsonl line 1 is not JSON"),
    (RUN + " data.source={bad}/deep.jsonl data.streaming=true", "deep.jsonl line 1 is not JSON"),
    (RUN + " data.source={bad}/broken.parquet", "is not a readable parquet file"),
    (RUN + " data.source={bad}/broken.jsonl.gz", "{bad}/broken.jsonl.gz is damaged"),
    (RUN + " data.text_field=body", "data.text_field (body) is not a field of"),
    (RUN + " data.text_field=number", "data.text_field (number) of"),
    (RUN + " data.validation={long}", "data.validation ({long}) cannot be reached"),
    (RUN + " data.validation={new}/no.txt", "data.validation ({new}/no.txt)"),
    (RUN + " data.validation={bad}/empty.txt", "data.validation ({bad}/empty.txt) is empty"),
    (RUN + " data.validation=test", "data.validation (test) is no file, folder or glob"),
    (RUN + " data.validation_fraction=1", "data.validation_fraction (1.0) is out of range"),
    (RUN + " data.seq_len=100000", "data.seq_len (100000) is longer than the training text"),
    (RUN + " data.max_tokens=4", "data.seq_len (8) is longer than the training text"),
    (RUN + " data.tokenizer=bpe data.vocab_size=100", "data.vocab_size (100) is too small"),
    (
        RUN + " data.tokenizer=bpe data.vocab_size=99999999999999999999",
        "is too large to be trained",
    ),
    (RUN + " data.max_tokens=99999999999999999999", "data.max_tokens (99999999999999999999)"),
    (RUN + " data.vocab_size=5000", "data.vocab_size (5000) is the size of a bpe tokenizer to be"),
    (
        RUN.replace("{tiny}", "{bad}/size.yaml").replace("data.tokenizer=bytes", ""),
        "and data.tokenizer (bytes) has 259 entries",
    ),
    (RUN + " data.tokenizer={bad}", "data.tokenizer ({bad}) is a folder without a tokenizer"),
    (
        RUN + " data.tokenizer={runs}/retention",
        "has no tokenizer.json: name {runs}/retention/final in it",
    ),
    (RUN + " data.tokenizer={long}", "data.tokenizer ({long}) cannot be reached"),
    (RUN + " data.tokenizer=~nobodyx/x", "data.tokenizer (~nobodyx/x) has no home folder"),
    (RUN + " data.tokenizer={new}/no", "data.tokenizer ({new}/no) is not a folder"),
    (RUN + " data.tokenizer=nobody/nothing", "data.tokenizer (nobody/nothing)"),
    (RUN + " data.source=nobody/nothing", "data.source (nobody/nothing)"),
    (RUN + " data.hub_config=x", "data.hub_config (x) has no meaning"),
    (RUN + " data.split=test", "data.split (test) has no meaning"),
    (RUN + " data.cache_dir=/proc/nowhere", "data.cache_dir (/proc/nowhere) cannot be written"),
    (RUN + " data.cache_dir={long}", "data.cache_dir ({long}"),
    (RUN + " data.cache_dir=~nobodyx/x", "data.cache_dir (~nobodyx/x) has no home folder"),
    (RUN + " model.init_from={long}", "checkpoint ({long}) cannot be reached"),
    (RUN + " model.init_from=~nobodyx/x", "checkpoint (~nobodyx/x) has no home folder"),
    (RUN + " data.validation=~nobodyx/x", "data.validation (~nobodyx/x) has no home folder"),
    (RUN + " model.init_from={runs}/int8", "has quantised weights (int8), which can't be trained:"),
    (RUN + " model.init_from={new}/no", "checkpoint ({new}/no) does not exist"),
    (
        RUN + " model.num_hidden_layers=4 model.init_from={runs}/retention",
        "model.num_hidden_layers (4) is 2 in the model of model.init_from ({runs}/retention)",
    ),
    (
        RUN + " model.mixer=gated_retention model.init_from={runs}/aft",
        "model.mixer (gated_retention) is aft in the model of model.init_from ({runs}/aft), whose",
    ),
]

ROWS = [
    pytest.param(("train", arguments, words), id=f"train-{number:03}")
    for number, (arguments, words) in enumerate([*CONFIGURATION, *DATA])
]


def tree(*folders: Path) -> dict[str, int]:
    """Every file there with the time it was changed, and every folder."""
    files = [file for folder in folders for file in folder.rglob("*")]
    return {str(file): file.stat().st_mtime_ns if file.is_file() else 0 for file in files}


@pytest.mark.parametrize("row", ROWS)
def test_a_mistake(row, places: dict[str, Path], tmp_path: Path, capsys, monkeypatch) -> None:
    is_answered(*row, places, tmp_path, capsys, monkeypatch)


def is_answered(
    entry: str, arguments: str, words: str, places: dict[str, Path], tmp_path: Path, capsys,
    monkeypatch,
) -> None:  # fmt: skip
    """Check that a mistake ends as all do; nothing in ``tmp_path``, {new}, may have changed."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\xff")))
    monkeypatch.chdir(tmp_path)
    here = places | {"new": tmp_path}
    before = tree(places["folder"], tmp_path)
    code = cli.run(MAINS[entry], [part.format(**here) for part in arguments.split(" ") if part])
    out, err = capsys.readouterr()
    assert (code, out) == (2, ""), err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert lines == err.splitlines()[-1:], err
    assert words.format(**here) in lines[0], lines[0]
    assert "Traceback" not in err
    assert tree(places["folder"], tmp_path) == before


def test_there_are_enough() -> None:
    assert len(ROWS) >= 60
