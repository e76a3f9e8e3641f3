"""train.py as a user runs it."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from retnet import cli
from retnet.checkpoints import load_checkpoint
from retnet.commands import train
from retnet.data import TrainingBatches
from retnet.training import loop
from retnet.training.config import load_config
from retnet.training.summary import count_parameters
from tests.training.conftest import as_options, tiny_options

TINY = "configs/tiny.yaml"
WALL_CLOCK = ("perf/", "seconds")


def run(options: list[str], **changes: object) -> int:
    extra = as_options({key.replace("__", "."): value for key, value in changes.items()})
    return cli.run(train.main, [TINY, *options, *extra])


def metrics(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith(WALL_CLOCK)}
        for line in lines
    ]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_whole_run(options, tmp_path: Path, capsys) -> None:
    assert run(options) == 0
    folder = tmp_path / "run"
    assert {p.name for p in folder.iterdir() if not p.name.startswith(".")} == {
        "config.yaml", "metrics.jsonl", "checkpoints", "best", "final",
    }  # fmt: skip
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step_4", "step_6"]
    rows = metrics(folder)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [("val/loss" in row) for row in rows] == [False, False, True] * 2
    assert rows[0]["train/loss"] == pytest.approx(math.log(259), abs=0.1)
    assert rows[-1]["val/perplexity"] == pytest.approx(math.exp(rows[-1]["val/loss"]))
    assert load_config(folder / "config.yaml").data.seq_len == 24

    checkpoint = load_checkpoint(folder)
    assert checkpoint.path == folder / "final"
    assert checkpoint.model.config.max_position_embeddings == 24
    assert checkpoint.model.config.eos_token_id == checkpoint.tokenizer.eos_token_id
    printed = capsys.readouterr().err
    total = sum(p.numel() for p in checkpoint.model.parameters())
    assert f"retention, {total:,} parameters" in printed
    assert count_parameters(checkpoint.model)["total"] == total
    for words in ("memory      about", "corpus      ", "6 steps of 96 tokens: 576 tokens",
                  "heads: 32, 64 tokens", "cpu, fp32, 1 process", f"run folder  {folder}",
                  "step 6/6  loss", "tokens/s", "left", "  | ", "bits per byte"):  # fmt: skip
        assert words in printed, words


def test_a_finished_run_says_so(options, finished: Path, capsys) -> None:
    before = (finished / "metrics.jsonl").read_text()
    assert run(options) == 0
    assert "is finished (6 steps): nothing to do" in capsys.readouterr().err
    assert (finished / "metrics.jsonl").read_text() == before


@pytest.mark.slow  # test_kill.py does the same with processes that are really killed
def test_going_on_is_the_uninterrupted_run(options, tmp_path: Path, monkeypatch) -> None:
    """Weights, moments and metrics are equal to the bit, dropout on, across an epoch end."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(options, train__out_dir=whole, train__max_steps=68, train__keep=40) == 0
    real = loop.Trainer._step

    def dies(self, step, stop):
        if step == self.dies_at:
            raise RuntimeError("power cut")
        return real(self, step, stop)

    monkeypatch.setattr(loop.Trainer, "_step", dies)
    for step in (3, 3, 11, 65):
        monkeypatch.setattr(loop.Trainer, "dies_at", step, raising=False)
        with pytest.raises(RuntimeError, match="power cut"):
            run(options, train__out_dir=parts, train__max_steps=68, train__keep=40)
    monkeypatch.setattr(loop.Trainer, "dies_at", None)
    assert run(options, train__out_dir=parts, train__max_steps=68, train__keep=40) == 0
    assert metrics(whole)[-1]["data/epoch"] > 1
    assert metrics(parts) == metrics(whole)
    for name in ("model", "optimizer"):
        a, b = (load_file(x / f"checkpoints/step_68/{name}.safetensors") for x in (whole, parts))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name


def test_accumulation_gives_the_losses_of_the_large_batch(options, tmp_path: Path) -> None:
    losses = []
    for batch, steps in ((4, 1), (2, 2), (1, 4)):
        folder = tmp_path / f"b{batch}"
        changes = {"train__batch_size": batch, "train__gradient_accumulation_steps": steps}
        assert run([*options, "model.dropout=0"], train__out_dir=folder, **changes) == 0
        losses.append([row["train/loss"] for row in metrics(folder)])
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], abs=1e-5)


def test_micro_batches_are_built_one_at_a_time(options, monkeypatch) -> None:
    """All of a step at once took 539 MB for a million of them."""
    events: list[str] = []

    def note(owner: type, name: str) -> None:
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args: (events.append(name), real(*args))[1])

    note(TrainingBatches, "batch")
    note(loop.Trainer, "_backward")
    steps = {"train__batch_size": 1, "train__gradient_accumulation_steps": 4}
    assert run(options, **steps, train__max_steps=2) == 0
    assert events == ["batch", "_backward"] * 8


LONG = ["data.seq_len=64", "train.grad_clip=0.1"]


@pytest.fixture(scope="module")
def long_run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long")
    assert run([*tiny_options(corpus, folder), *LONG]) == 0
    return folder / "run"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.learning_rate", 0.1), ("train.schedule", "cosine"), ("train.warmup_steps", 0),
        ("train.final_learning_rate", 1.0), ("train.weight_decay", 5.0), ("train.beta1", 0.1),
        ("train.beta2", 0.1), ("train.grad_clip", 0.01), ("train.seed", 1),
        ("model.dropout", 0.5), ("data.reset_state_at_documents", "false"),
    ],
)  # fmt: skip
def test_each_option_changes_the_run(
    options, long_run: Path, tmp_path: Path, key: str, value: object
) -> None:
    assert run([*options, *LONG, f"{key}={value}"]) == 0
    a, b = weights(long_run / "final"), weights(tmp_path / "run/final")
    assert not all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "key", ["train.gradient_checkpointing=true", "train.fused_optimizer=false"]
)
def test_options_of_speed_and_memory_change_nothing_else(
    options, whole: Path, tmp_path: Path, key: str
) -> None:
    assert run([*options, key]) == 0
    a, b = metrics(whole), metrics(tmp_path / "run")
    for one, other in zip(a, b, strict=True):
        assert one["train/loss"] == pytest.approx(other["train/loss"], abs=1e-4)


def test_bf16(options, tmp_path: Path, capsys) -> None:
    assert run(options, train__precision="bf16") == 0
    assert "cpu, bf16" in capsys.readouterr().err
    assert all(w.dtype == torch.float32 for w in weights(tmp_path / "run/final").values())


def test_evaluation_options(options, tmp_path: Path, capsys) -> None:
    changes = {"train__eval_max_tokens": 50, "train__sample_prompt": "the "}
    assert run(options, **changes, train__eval_every=2) == 0
    printed = capsys.readouterr().err
    counts = [int(n) for n in re.findall(r"\((\d+) tokens\)", printed)]
    assert len(counts) == 3 and all(40 < n < 50 for n in counts), counts
    assert printed.count("validation loss") == 4  # three evaluations and the last line
    assert "  | the" in printed
    assert run(options, train__sample_tokens=0, train__out_dir=tmp_path / "b") == 0
    assert "  | " not in capsys.readouterr().err


@pytest.mark.parametrize("carry", ["true", "false"])
def test_the_smallest_evaluation_has_a_target(options, tmp_path: Path, capsys, carry: str) -> None:
    """Two tokens are one target: a document has at least its two ends."""
    assert run(options, train__eval_max_tokens=2, train__carry_state=carry) == 0
    assert "(1 tokens)" in capsys.readouterr().err
    assert 0 < metrics(tmp_path / "run")[-1]["val/bits_per_byte"] < math.inf


def test_steps_without_a_target(options, tmp_path: Path) -> None:
    """Windows of one token, some of them a document's last: the loss was nan, 0 by 0."""
    corpus = tmp_path / "letters.jsonl"
    corpus.write_text("\n".join(json.dumps({"text": chr(33 + i)}) for i in range(90)))
    more = [f"data.source={corpus}", "data.seq_len=1", "data.tokenizer=bytes", "train.batch_size=1"]
    assert cli.run(train.main, ["configs/tiny.yaml", *options, *more, "train.max_steps=12"]) == 0
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["train/loss"] for line in lines]
    assert 0 in losses and max(losses) > 1


def test_init_from(options, whole: Path, tmp_path: Path, capsys) -> None:
    assert run(options, model__init_from=whole, train__learning_rate=1e-9) == 0
    assert f"weights from {whole / 'final'}" in capsys.readouterr().err
    a, b = weights(whole / "final"), weights(tmp_path / "run/final")
    assert all(torch.allclose(a[key], b[key], atol=1e-6) for key in a)


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_a_run_goes_on_without_what_it_began_from(
    options, tmp_path: Path, capsys, positions: str
) -> None:
    """Also where the positions are weights, as many as there were."""
    options = [*options, f"model.positions={positions}", "model.intermediate_size=32"]
    assert run(options, train__out_dir=tmp_path / "first", data__seq_len=60) == 0
    second = [*options, f"model.init_from={tmp_path / 'first'}"]
    assert run(second) == 0
    shutil.rmtree(tmp_path / "first")
    assert run(second) == 0
    assert "is finished" in capsys.readouterr().err
    assert run(second, train__max_steps=8) == 0
    assert "finished 8 steps" in capsys.readouterr().err
    assert run(second, train__out_dir=tmp_path / "new") == 2
    assert f"checkpoint ({tmp_path / 'first'}) does not exist" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train.resume": "never"}, "already holds a run"),
        ({"train.learning_rate": 0.5}, "train.learning_rate (0.003 -> 0.5)"),
        ({"model.hidden_size": 32}, "model.hidden_size (16 -> 32)"),
        ({"train.resume": "/nowhere"}, "train.resume (/nowhere)"),
        ({"train.batch_size": 2, "train.max_steps": 8}, "must stay 4"),
    ],
)
def test_a_folder_with_another_run(
    options, finished: Path, capsys, changes: dict, words: str
) -> None:
    assert cli.run(train.main, [TINY, *options, *as_options(changes)]) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("error: ") and words in error


def test_more_steps_go_on(options, tmp_path: Path) -> None:
    assert run(options, train__schedule="constant") == 0
    assert run(options, train__schedule="constant", train__max_steps=8) == 0
    assert [row["step"] for row in metrics(tmp_path / "run")] == list(range(1, 9))


def test_a_named_checkpoint(options, whole: Path, tmp_path: Path) -> None:
    assert run(options, train__resume=whole / "checkpoints/step_4") == 0
    a, b = weights(whole / "final"), weights(tmp_path / "run/final")
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(options, capsys) -> None:
    assert run(options, train__device="cuda") == 2
    assert "train.device (cuda)" in capsys.readouterr().err


def test_two_runs_in_one_folder(options, tmp_path: Path, capsys) -> None:
    from filelock import FileLock

    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run/.lock"):
        assert run(options) == 2
    assert "is in use by another run" in capsys.readouterr().err


def test_compile_without_a_compiler(options, capsys, monkeypatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert run(options, train__compile="true") == 2
    assert "train.compile (true) needs a C++ compiler" in capsys.readouterr().err


@pytest.mark.slow
def test_compile_computes_the_same(options, tmp_path: Path) -> None:
    assert run([*options, "model.dropout=0"]) == 0
    other = [*options, "model.dropout=0", "train.compile=true", f"train.out_dir={tmp_path / 'b'}"]
    assert run(other) == 0
    for one, two in zip(metrics(tmp_path / "run"), metrics(tmp_path / "b"), strict=True):
        assert one["train/loss"] == pytest.approx(two["train/loss"], abs=1e-4)


@pytest.mark.slow
def test_as_a_process(options) -> None:
    """--help and an error, by exit code and stream."""
    command = [sys.executable, "train.py", TINY, "model.hiden_size=3"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_help_and_print_config(capsys) -> None:
    with pytest.raises(SystemExit):
        train.main(["--help"])
    printed = capsys.readouterr().out
    assert "train.learning_rate: float | null = null" in printed and "model.mixer" in printed
    assert cli.run(train.main, [TINY, "--print-config", "train.seed=9"]) == 0
    assert "seed: 9" in capsys.readouterr().out
