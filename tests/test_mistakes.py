"""Every mistake is answered: exit code 2, one line with key, value and fix, nothing written.

One row a mistake: the entry point, its arguments, and the words its answer must have. ``{...}`` in
arguments and words are paths of the ``places`` fixture.
"""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import compare
import generate
import train
from retnet import cli
from retnet.data import DataSpec, prepare_data
from retnet.generation import write_manifest
from tests.generation.builders import MIXERS, save_checkpoint

MAINS = {"train": train.main, "generate": generate.main, "compare": compare.main}
RUN = "{tiny} data.source={corpus} data.tokenizer=bytes data.seq_len=8 data.cache_dir={new}/cache "\
      "train.out_dir={new}/run model.hidden_size=16 model.num_heads=2 train.max_steps=1 "\
      "train.warmup_steps=0 train.device=cpu"  # fmt: skip

CONFIGURATION = [
    ("", "the following arguments are required: config"),
    ("train.max_steps=3", "configuration (train.max_steps=3) comes first: a YAML file"),
    ("{new}/no.yaml", "configuration ({new}/no.yaml) is not a file: give the path of a YAML file"),
    ("{bad}/list.yaml", "configuration ({bad}/list.yaml) must have the sections"),
    ("{bad}/broken.yaml", "configuration ({bad}/broken.yaml) is not valid YAML"),
    ("{bad}/latin.yaml", "configuration ({bad}/latin.yaml) is not valid YAML"),
    ("{bad}/twice.yaml", "configuration ({bad}/twice.yaml) is not valid YAML"),
    ("{bad}/unknown.yaml", "Key 'hiden_size' not in"),
    (RUN + " model.hiden_size=3", "Did you mean one of: 'hidden_size'"),
    (RUN + " trian.max_steps=3", "Did you mean: 'train'"),
    (RUN + " train.max_steps=many", "train.max_steps): Value 'many'"),
    (RUN + " train.max_steps=1.5", "train.max_steps): Value '1.5'"),
    (RUN + " train.compile=perhaps", "train.compile): Value 'perhaps' is not a valid bool"),
    (RUN + " train.max_steps=null", "train.max_steps): "),
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
    (RUN + " train.schedule=step", "expected one of ['cosine', 'linear', 'constant']"),
    (RUN + " train.precision=fp16", "expected one of ['auto', 'fp32', 'bf16']"),
    (RUN + " train.trackers=[mlflow]", "train.trackers (mlflow) must be any of wandb, tensorboard"),
    (RUN + " train.trackers=wandb", "train.trackers"),
    (RUN + " model.mixer=mamba", "expected one of ['retention', 'attention']"),
    (RUN + " model.hidden_size=15", "model.hidden_size (15) must be"),
    (RUN + " model.hidden_size=0", "model.hidden_size (0)"),
    (RUN + " model.num_hidden_layers=0", "model.num_hidden_layers (0)"),
    (RUN + " model.dropout=1.5", "model.dropout (1.5)"),
    (RUN + " model.decay=2", "model.decay (2)"),
    (RUN + " model.decay=papr", "model.decay ('papr') must be"),
    (RUN + " model.norm=batchnorm", "model.norm ('batchnorm') must be"),
    (RUN + " model.ffn=relu", "model.ffn ('relu') must be"),
    (RUN + " model.chunk_size=0", "model.chunk_size (0)"),
    (RUN + " model.mixer=attention train.carry_state=true", "train.carry_state (true) needs a"),
    (RUN + " train.carry_state=true data.reset_state_at_documents=false", "keeps documents apart"),
    (RUN + " train.carry_state=true train.gradient_checkpointing=true", "set it to false"),
    (RUN + " train.carry_state=true train.batch_size=999 data.cache_dir={folder}/cache",
     "use a smaller train.batch_size"),
    (RUN + " train.out_dir={corpus}", "train.out_dir ({corpus}) is a file: name a folder"),
    (RUN + " train.out_dir=/proc/nowhere", "train.out_dir (/proc/nowhere) can't be written"),
    (RUN + " train.resume={new}/no", "train.resume ({new}/no) must be auto, never, or"),
    (RUN + " train.resume={runs}/retention/final", "train.resume ({runs}/retention/final)"),
]  # fmt: skip

DATA = [
    (RUN + " data.source={new}/no.txt", "data.source ({new}/no.txt) does not exist"),
    (RUN + " data.source=", "data.source"),
    (RUN + " data.source={bad}/empty.txt", "data.source ({bad}/empty.txt) is empty"),
    (RUN + " data.source={bad}/nothing", "is a folder without a file to read"),
    (RUN + " data.source={bad}/*.xyz", "data.source ({bad}/*.xyz) matches no file"),
    (RUN + " data.source={bad}/binary.txt", "{bad}/binary.txt is not UTF-8 text: the first bad"),
    (RUN + " data.source={bad}/latin.txt", "{bad}/latin.txt is not UTF-8 text"),
    (RUN + " data.source={bad}/image.png", "data.source ({bad}/image.png) has a suffix"),
    (RUN + " data.source={bad}/short.txt", "data.seq_len (8)"),
    (RUN + " data.source={bad}/broken.jsonl", "{bad}/broken.jsonl line 2 is not JSON"),
    (RUN + " data.source={bad}/broken.parquet", "is not a readable parquet file"),
    (RUN + " data.source={bad}/broken.jsonl.gz", "{bad}/broken.jsonl.gz is damaged"),
    (RUN + " data.text_field=body", "data.text_field (body) is not a field of"),
    (RUN + " data.text_field=number", "data.text_field (number) of"),
    (RUN + " data.validation={new}/no.txt", "data.validation ({new}/no.txt)"),
    (RUN + " data.validation={bad}/empty.txt", "data.validation ({bad}/empty.txt) is empty"),
    (RUN + " data.validation=test", "data.validation (test) is no file, folder or glob"),
    (RUN + " data.validation_fraction=1", "data.validation_fraction (1.0) is out of range"),
    (RUN + " data.seq_len=100000", "data.seq_len (100000) is longer than the training text"),
    (RUN + " data.max_tokens=4", "data.seq_len (8) is longer than the training text"),
    (RUN + " data.tokenizer=bpe data.vocab_size=100", "data.vocab_size (100) is too small"),
    (RUN + " data.tokenizer={bad}", "data.tokenizer ({bad}) is a folder without a tokenizer"),
    (RUN + " data.tokenizer={new}/no", "data.tokenizer ({new}/no) is not a folder"),
    (RUN + " data.tokenizer=nobody/nothing", "data.tokenizer (nobody/nothing)"),
    (RUN + " data.source=nobody/nothing", "data.source (nobody/nothing)"),
    (RUN + " data.hub_config=x", "data.hub_config (x) has no meaning"),
    (RUN + " data.split=test", "data.split (test) has no meaning"),
    (RUN + " data.cache_dir=/proc/nowhere", "data.cache_dir (/proc/nowhere) cannot be written"),
    (RUN + " model.init_from={new}/no", "checkpoint ({new}/no) does not exist"),
    (
        RUN + " model.init_from={runs}/retention data.cache_dir={folder}/cache",
        "model.init_from ({runs}/retention) is another",
    ),
]

G, C = "{runs}/retention", "{runs}/retention {runs}/attention --no-speed"
GENERATION = [
    ("", "the following arguments are required: checkpoint"),
    ("{runs}/retentoin", "retention/final"),
    ("{runs}/retention/final/config.json", "is a file: name its folder"),
    ("{bad}", "checkpoint ({bad}) holds no config.json"),
    ("{broken}/weightless", "model.safetensors is missing: copy it again"),
    ("{broken}/cut", "checkpoint ({broken}/cut) is damaged"),
    ("{broken}/config", "config.json is not readable JSON"),
    ("{broken}/other", "{broken}/other"),
    ("{broken}/tokenless", "tokenizer.json is missing"),
    ("{broken}/garbled", "checkpoint ({broken}/garbled) has a tokenizer that cannot be loaded"),
    ("{broken}/unsettled", "checkpoint ({broken}/unsettled) has a tokenizer that cannot be loaded"),
    ("{broken}/typeless", "{broken}/typeless/config.json: dtype (float7) is none of torch's"),
    ("{broken}/foreign", "use the tokenizer the model was trained with"),
    (G + " --max-new-tokens -1", "--max-new-tokens: '-1' must be a whole number of at least 1"),
    (G + " --max-new-tokens many", "--max-new-tokens: 'many' must be"),
    (G + " --temperature 0", "temperature (0.0) must be above 0: use --greedy"),
    (G + " --temperature -1", "temperature (-1.0) must be above 0"),
    (G + " --temperature nan", "temperature (nan)"),
    (G + " --temperature warm", "--temperature: invalid float value: 'warm'"),
    (G + " --top-p 0", "top_p (0.0)"),
    (G + " --top-p 1.5", "top_p (1.5)"),
    (G + " --top-k 0", "top_k (0)"),
    (G + " --repetition-penalty 0", "repetition_penalty (0.0)"),
    (G + " --seed -1", "seed (-1)"),
    (G + " --greedy --top-k 3", "--top-k has no effect with --greedy"),
    (G + " --num-samples 0", "--num-samples: '0' must be"),
    (G + " --prompt-file {new}/no", "--prompt-file ({new}/no) cannot be read"),
    (G + " --prompt-file {bad}/binary.txt", "{bad}/binary.txt is not UTF-8 at byte"),
    (G + " -", "standard input is not UTF-8 at byte 1 (0xff): convert it"),
    (G + " --prompt a -", "give one of them"),
    (G + " --dtype float8", "--dtype: invalid choice: 'float8'"),
    (G + " --device cuda:99", "--device (cuda:99) cannot be used"),
    (G + " --device gpu", "--device (gpu) cannot be used"),
    (G + " --wrong", "unrecognized arguments: --wrong"),
]

COMPARISON = [
    ("", "the following arguments are required: CHECKPOINT"),
    ("{runs}/retention", "compares with nothing: name a second one"),
    ("{runs}/retention {runs}/no", "checkpoint ({runs}/no) does not exist"),
    ("{runs}/retention {broken}/cut", "checkpoint ({broken}/cut) is damaged"),
    (C + " --text {new}/no.txt", "--text ({new}/no.txt) does not exist"),
    (C + " --text {bad}/empty.txt", "--text ({bad}/empty.txt) is empty"),
    (C + " --text {bad}/latin.txt", "{bad}/latin.txt is not UTF-8 text"),
    (C + " --text {corpus} --text-field body", "--text-field (body) is not a field of"),
    (C + " --text-field body", "--text-field (body) has no effect without --text"),
    (C + " --context 0", "--context: '0' must be a whole number of at least 1"),
    (C + " --context 99999", "--context (99999) is longer than the text"),
    (C + " --context 8 --stride 9", "stride (9) must be from 1 to context (8)"),
    (C + " --carry-state", "--carry-state needs a recurrent model"),
    (C + " --contexts 8", "not allowed with argument --no-speed"),
    (C + " --json {new}/no/out.json", "--json ({new}/no/out.json)"),
    ("{runs}/retention {runs}/unrecorded --no-speed", "{runs}/unrecorded"),
    ("{runs}/retention {runs}/lost --no-speed", "--text FILE"),
    ("{runs}/partial {runs}/partial --no-speed", "is damaged, 'split' is missing"),
    ("{runs}/retention {broken}/garbled", "checkpoint ({broken}/garbled) has a tokenizer that"),
    (C + " --json /proc/out.json", "--json (/proc/out.json) cannot be written"),
    (C + " --json /dev/null", "--json (/dev/null) is a device or pipe: name a file"),
]

ROWS = [
    pytest.param(entry, arguments, words, id=f"{entry}-{number:02}")
    for entry, table in (
        ("train", CONFIGURATION), ("train", DATA), ("generate", GENERATION), ("compare", COMPARISON)
    )
    for number, (arguments, words) in enumerate(table)
]  # fmt: skip


def make_bad_files(folder: Path) -> None:
    (folder / "nothing").mkdir(parents=True)
    texts = {
        "list.yaml": b"- a\n", "broken.yaml": b"train: [", "latin.yaml": b"a: \xe9",
        "twice.yaml": b"train:\n  seed: 1\n  seed: 2\n",
        "unknown.yaml": b"model:\n  hiden_size: 3\n", "empty.txt": b"", "short.txt": b"abc",
        "binary.txt": bytes(range(256)), "latin.txt": "é".encode("latin-1"), "image.png": b"\x89",
        "broken.jsonl": b'{"text": "a"}\n{"text"', "broken.parquet": b"PAR1",
        "broken.jsonl.gz": b"\x1f\x8b\x08",
    }  # fmt: skip
    for name, content in texts.items():
        (folder / name).write_bytes(content)


def make_broken_checkpoints(folder: Path, good: Path) -> None:
    for name in ("weightless", "cut", "config", "other", "tokenless", "foreign", "garbled",
                 "unsettled", "typeless"):  # fmt: skip
        shutil.copytree(good, folder / name)
    (folder / "weightless/model.safetensors").unlink()
    weights = folder / "cut/model.safetensors"
    write_manifest(folder / "cut")
    weights.write_bytes(weights.read_bytes()[:-7])
    (folder / "config/config.json").write_text("{")
    config = json.loads((good / "config.json").read_text())
    (folder / "other/config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    (folder / "tokenless/tokenizer.json").unlink()
    (folder / "typeless/config.json").write_text(json.dumps(config | {"dtype": "float7"}))
    (folder / "garbled/tokenizer.json").write_bytes(b"\xff")
    (folder / "unsettled/tokenizer_config.json").write_text("{")
    tokenizer = folder / "foreign/tokenizer.json"
    content = json.loads(tokenizer.read_text())
    content["added_tokens"][-1]["id"] = 5000
    content["model"]["vocab"]["far"] = 5001
    tokenizer.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("mistakes")
    names = ("bad", "broken", "runs")
    places = {name: folder / name for name in names} | {"corpus": folder / "corpus.jsonl"}
    rows = [{"text": f"row {i} " * 3, "number": i} for i in range(40)]
    places["corpus"].write_text("\n".join(map(json.dumps, rows)))
    spec = DataSpec(source=str(places["corpus"]), tokenizer="bytes", seq_len=8,
                    cache_dir=str(folder / "cache"))  # fmt: skip
    record = prepare_data(spec).record
    for mixer in MIXERS:
        save_checkpoint(places["runs"] / mixer / "final", mixer, record=record)
    save_checkpoint(places["runs"] / "unrecorded" / "final")
    lost = record | {"validation_sha256": "0" * 64}
    save_checkpoint(places["runs"] / "lost" / "final", record=lost)
    partial = {key: value for key, value in record.items() if key != "split"}
    save_checkpoint(places["runs"] / "partial" / "final", record=partial)
    make_bad_files(places["bad"])
    make_broken_checkpoints(places["broken"], places["runs"] / "retention/final")
    return places | {"tiny": Path("configs/tiny.yaml").absolute(), "folder": folder}


def tree(*folders: Path) -> dict[str, int]:
    """Every file there with the time it was changed."""
    files = [file for folder in folders for file in folder.rglob("*")]
    return {str(file): file.stat().st_mtime_ns for file in files if file.is_file()}


@pytest.mark.parametrize(("entry", "arguments", "words"), ROWS)
def test_a_mistake(
    places: dict[str, Path], tmp_path: Path, capsys, monkeypatch, entry: str, arguments: str,
    words: str,
) -> None:  # fmt: skip
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_that_is_absent(places: dict[str, Path], tmp_path: Path, capsys) -> None:
    arguments = [*RUN.format(**places, new=tmp_path).split(), "train.device=cuda"]
    assert cli.run(train.main, arguments) == 2
    assert capsys.readouterr().err.startswith("error: train.device (cuda)")


@pytest.mark.parametrize("damage", ["tokens.bin", "manifest.json"])
def test_a_token_file_that_changed_is_made_again(
    places: dict[str, Path], tmp_path: Path, capsys, damage: str
) -> None:
    """Not a mistake that needs the user: the run warns and goes on."""
    arguments = RUN.format(**places, new=tmp_path).split()
    assert cli.run(train.main, arguments) == 0
    (file,) = (tmp_path / "cache").glob(f"*/train/{damage}")
    file.write_bytes(file.read_bytes()[:-3])
    shutil.rmtree(tmp_path / "run")
    assert cli.run(train.main, arguments) == 0
    assert "is damaged and is made again" in capsys.readouterr().err


def test_a_huge_line_is_a_document(places: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("word " * 1_000_000)
    arguments = RUN.format(**places, new=tmp_path).split()
    more = [f"data.source={tmp_path / 'one.txt'}", "train.eval_max_tokens=64"]
    assert cli.run(train.main, [*arguments, *more]) == 0


def test_no_answer_within_seconds_is_an_answer(monkeypatch, capsys, tmp_path, places) -> None:
    """A Hub that never answers costs seconds, not minutes."""
    monkeypatch.setattr("retnet.data.network.DEADLINE_S", 0.2)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *a, **k: os.read(pipe[0], 1))
    pipe = os.pipe()
    arguments = [*RUN.format(**places, new=tmp_path).split(), "data.source=nobody/nothing"]
    assert cli.run(train.main, arguments) == 2
    assert "the Hub cannot be reached" in capsys.readouterr().err
    os.close(pipe[1])  # and the thread that waits for it ends


def test_as_a_process() -> None:
    """train.py and generate.py have such a test in their own files."""
    program = Path(compare.__file__)
    result = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
