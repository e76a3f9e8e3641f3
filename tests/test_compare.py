"""The entry point: options reach the comparison, and mistakes end with exit code 2."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from retnet.cli import run
from retnet.commands import compare
from retnet.data import DataSpec, prepare_data
from retnet.evaluation.report import QUICK, THOROUGH, Reach
from tests.generation.builders import MIXERS, save_checkpoint


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    corpus = folder / "corpus.jsonl"
    rows = [{"text": f"row {i} " * (i % 7 + 3), "other": "x" * (i + 1)} for i in range(40)]
    corpus.write_text("\n".join(map(json.dumps, rows)))
    spec = DataSpec(
        source=str(corpus),
        validation_fraction=0.4,
        tokenizer="bytes",
        seq_len=16,
        cache_dir=str(folder / "cache"),
    )
    record = prepare_data(spec).record
    for mixer in MIXERS:
        save_checkpoint(folder / mixer / "final", mixer, record=record)
    save_checkpoint(folder / "second" / "final", seed=1)
    return folder


@pytest.fixture
def main(runs: Path, capsys):
    """Call the entry point on runs by name; returns exit code, stdout, stderr."""

    def call(*argv: str, models: tuple[str, ...] = MIXERS) -> tuple[int, str, str]:
        code = run(compare.main, [*(str(runs / name) for name in models), *argv])
        return code, *capsys.readouterr()

    return call


def test_the_default_is_validation_data_and_speed(main, runs: Path, tmp_path: Path) -> None:
    code, out, err = main("--contexts", "8", "24", "--json", str(tmp_path / "out.json"))
    assert code == 0, err
    assert f"validation data of {runs / 'corpus.jsonl'}" in out.replace("\n" + " " * 9, "")
    assert "context 16, stride 16" in out
    assert "bytes of state or cache" in out
    assert max(map(len, out.splitlines())) <= 100
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["command"][0] == "compare.py"
    assert [entry["context"] for entry in content["models"][1]["decoding"]] == [8, 24]
    assert "scored" in err


def test_a_disk_that_fills_up_meanwhile_leaves_the_table(main, tmp_path: Path, monkeypatch) -> None:
    real, calls = Path.write_bytes, []

    def full(path: Path, content: bytes) -> int:
        if path.name.endswith("-out.json"):
            calls.append(real(path, b"half"))
            raise OSError(28, "No space left on device")
        return real(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    file = tmp_path / "out.json"
    file.write_text("the one before")
    code, out, err = main("--no-speed", "--json", str(file))
    assert (code, len(calls)) == (2, 1)
    assert "bits/byte" in out
    assert err.splitlines()[-1] == (
        f"error: --json ({file}) cannot be written (No space left on device): name another file"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
    assert file.read_text() == "the one before"


def test_a_closed_output_costs_no_file(main, tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "out.json"
    monkeypatch.setattr("sys.stdout", None)
    code, _, err = main("--no-speed", "--json", str(file))
    assert code == 2
    assert err.splitlines()[-1].startswith("error: standard output is closed: leave it open")
    assert len(json.loads(file.read_text())["models"]) == 2


def test_a_file_that_is_read_is_not_replaced(main, runs: Path, tmp_path: Path) -> None:
    """Neither the text nor, where that is made from its record, the corpus; nor a checkpoint."""
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "some text"}')
    corpus, weights = runs / "corpus.jsonl", runs / "retention/final/model.safetensors"
    for file, options, words in (
        (text, ["--text", str(text)], "is a file that the text is read from"),
        (text, ["--text", str(tmp_path)], "is a file that the text is read from"),
        (corpus, [], "is a file that the text is read from"),
        (weights, [], "lies among the files of a checkpoint or run"),
    ):
        before = file.read_bytes()
        code, out, err = main("--no-speed", *options, "--json", str(file))
        assert (code, out) == (2, ""), err
        assert err.splitlines()[-1].startswith(f"error: --json ({file}) {words}")
        assert file.read_bytes() == before


def test_a_loss_beyond_what_exp_can_hold(runs: Path, tmp_path: Path, capsys) -> None:
    """More than 709 nats per token."""
    for name in ("retention", "second"):
        shutil.copytree(runs / name / "final", tmp_path / name)
        weights = load_file(tmp_path / name / "model.safetensors")
        weights["lm_head.weight"] *= 1e5
        save_file(weights, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    argv = [str(tmp_path / "retention"), str(tmp_path / "second"), "--no-speed"]
    argv += ["--text", str(runs / "corpus.jsonl"), "--json", str(tmp_path / "out.json")]
    assert run(compare.main, argv) == 0
    assert " inf " in capsys.readouterr().out
    model = json.loads((tmp_path / "out.json").read_text())["models"][0]
    assert model["nats_per_token"] > 709 and model["perplexity"] is None


def test_speed_is_measured_after_128_and_4096_tokens_unless_told_otherwise(
    main, monkeypatch
) -> None:
    asked = []
    monkeypatch.setattr(
        "retnet.evaluation.comparison.decode_speed",
        lambda models, contexts, **_: asked.append(tuple(contexts)) or [[] for _ in models],
    )
    assert main()[0] == 0
    assert main("--no-speed")[0] == 0
    assert asked == [(128, 4096)]


@pytest.mark.parametrize(
    "options",
    [
        ["--context", "8"],
        ["--stride", "4"],
        ["--carry-state"],
        ["--no-eos"],
        ["--text-field", "other"],
        ["--dtype", "bfloat16"],
    ],
    ids=lambda options: options[0],
)
def test_options_change_the_result(main, runs: Path, options: list[str]) -> None:
    plain = ["--text", str(runs / "corpus.jsonl"), "--no-speed"]
    models = ("retention", "second")
    base, other = main(*plain, models=models), main(*plain, *options, models=models)
    assert base[0] == other[0] == 0

    def figures(out: str) -> list[str]:
        return [line for line in out.splitlines() if line.startswith(("1 ", "2 "))]

    assert figures(base[1]) != figures(other[1])


def test_whether_eos_is_scored_is_said(main, tmp_path: Path) -> None:
    """In the table and for programs; without it a document has a target less."""
    found = {}
    for options in ((), ("--no-eos",)):
        file = tmp_path / "out.json"
        code, out, _ = main("--no-speed", *options, "--json", str(file))
        assert code == 0 and max(map(len, out.splitlines())) <= 100
        content = json.loads(file.read_text())
        found[content["eos_scored"]] = content
        said = "without <eos> at" if options else "<bos>, <eos> at the end of a document included"
        assert said in out
    for scored, unscored in zip(found[True]["models"], found[False]["models"], strict=True):
        with_eos, without = scored["documents"], unscored["documents"]
        assert [n - 1 for n in with_eos["targets"]] == without["targets"] == without["bytes"]
        assert all(a > b for a, b in zip(with_eos["nll"], without["nll"], strict=True))
        assert scored["bits_per_byte"] > unscored["bits_per_byte"]


def test_batch_size_changes_the_batches_only(main, monkeypatch) -> None:
    from retnet.evaluation import comparison

    sizes, score = [], comparison.score_documents

    def recorded(*args, **kwargs):
        sizes.append(kwargs["batch_size"])
        return score(*args, **kwargs)

    monkeypatch.setattr(comparison, "score_documents", recorded)
    base, small = main("--no-speed"), main("--no-speed", "--batch-size", "1")
    assert sizes == [None, None, 1, 1]
    assert base[1] == small[1]


def test_text_replaces_the_validation_data(main, tmp_path: Path) -> None:
    file = tmp_path / "own.txt"
    file.write_text("own text " * 9)
    code, out, _ = main("--text", str(file), "--no-speed", models=("retention", "second"))
    assert code == 0
    assert "1 document, 81 bytes" in out


@pytest.mark.parametrize(
    ("models", "options", "message"),
    [
        (("retention",), [], "compares with nothing: name a second one"),
        ((), [], "CHECKPOINT"),
        (("retention", "second"), [], "--text FILE"),
        (("second", "retention"), [], "--text FILE"),
        (MIXERS, ["--carry-state"], "--carry-state needs a recurrent model"),
        (MIXERS, ["--context", "9999"], "--context (9999) is longer than the text"),
        (
            MIXERS,
            ["--context", "8", "--stride", "9"],
            "--stride (9) must be from 1 to --context (8)",
        ),
        (MIXERS, ["--context", "0"], "--context"),
        (MIXERS, ["--contexts", "8", "--no-speed"], "not allowed with"),
        (MIXERS, ["--text", "/nowhere/x.txt"], "--text (/nowhere/x.txt) does not exist"),
        (MIXERS, ["--text-field", "other"], "--text-field (other) has no effect without --text"),
        (MIXERS, ["--json", "/nowhere/out.json"], "--json (/nowhere/out.json)"),
        (MIXERS, ["--json", "/proc/out.json"], "--json (/proc/out.json) cannot be written"),
        (MIXERS, ["--json", "/dev/null"], "--json (/dev/null) is a device or pipe"),
        (("retention", "atention"), [], "attention/final"),
        (("retention", "attention"), ["--quick"], "--quick has no effect without --report DIR"),
    ],
)
def test_mistakes(main, models: tuple[str, ...], options: list[str], message: str) -> None:
    code, out, err = main("--no-speed", *options, models=models)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: ")
    assert message in err


def test_models_that_were_trained_in_different_precisions(runs: Path, tmp_path: Path, main) -> None:
    """It is said; of a checkpoint of before it was recorded, nothing is known."""
    for name in ("fp32", "bf16"):
        save_checkpoint(tmp_path / name / "final", precision=name)
    text = tmp_path / "text.txt"
    text.write_text("some words " * 20)

    def said(*models: Path) -> str:
        code, out, _ = main("--text", str(text), "--no-speed", models=tuple(map(str, models)))
        assert code == 0
        return out

    two = said(tmp_path / "fp32", tmp_path / "bf16")
    assert "note     trained in different precisions: 1 fp32 in fp32, 2 bf16 in bf16" in two
    assert "note" not in said(tmp_path / "fp32", runs / "second")


def test_a_report_with_what_was_asked_for(main, tmp_path: Path, monkeypatch) -> None:
    """Its costs by the contexts that were given, and none where no speed is wanted."""
    reached, real = [], compare.find_out
    monkeypatch.setattr("retnet.evaluation.report.contents.pictures", lambda findings: [])
    monkeypatch.setattr(compare, "COST_CONTEXTS", (2, 4, 8))
    monkeypatch.setattr(compare, "QUICK_CONTEXTS", (3,))

    def look(checkpoints, comparison, reach):
        contexts = [entry.context for entry in comparison.models[0].speed]
        reached.append((contexts, reach))
        models = [replace(model, speed=[]) for model in comparison.models]
        return real(checkpoints, replace(comparison, models=models), reach)

    monkeypatch.setattr(compare, "find_out", look)
    for options in (["--no-speed"], ["--contexts", "4", "9"], ["--quick"], []):
        code, out, err = main(*options, "--report", str(tmp_path / "report"))
        assert code == 0 and out.startswith("text "), err
        assert err.splitlines()[-1] == f"report in {tmp_path / 'report/report.html'}"
        command = json.loads((tmp_path / "report/report.json").read_text())["comparison"]["command"]
        assert command[-1] == str(tmp_path / "report")
    assert reached == [([], THOROUGH), ([4, 9], THOROUGH), ([3], QUICK), ([2, 4, 8], THOROUGH)]


def test_a_report_stops_where_a_table_is_refused(main, tmp_path: Path, monkeypatch) -> None:
    """A context that a model has no memory for."""
    monkeypatch.setattr("retnet.generation.checks.memory_of", lambda device: 500_000)
    monkeypatch.setattr("retnet.evaluation.report.contents.pictures", lambda findings: [])
    monkeypatch.setattr(compare, "QUICK", Reach(batches=(1,), lengths=(8,), peaks=False, windows=1))
    code, _, err = main("--contexts", "4", "5000")
    assert code == 2 and "--contexts (5,000) needs" in err
    code, out, _ = main("--contexts", "4", "5000", "--quick", "--report", str(tmp_path / "report"))
    assert code == 0 and "stopped" in out
