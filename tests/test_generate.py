"""The entry point: every option reaches the text, mistakes are one line and exit code 2."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from retnet.cli import run
from retnet.commands import generate
from tests.generation.builders import MIXERS, byte_tokenizer, save_checkpoint
from tests.model.conftest import ROW_BYTES

ROOT = Path(__file__).parents[1]
SOAK_TOKENS = int(os.environ.get("SOAK_TOKENS", "1000000"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for mixer in (*MIXERS, "aft"):
        save_checkpoint(folder / mixer / "final", mixer)
    return folder


@pytest.fixture
def main(runs: Path, capsys):
    """Call the entry point on the RetNet; returns exit code, stdout, stderr."""

    def call(*argv: str, checkpoint: str = "retention") -> tuple[int, str, str]:
        code = run(generate.main, [str(runs / checkpoint), *argv])
        return code, *capsys.readouterr()

    return call


@pytest.mark.parametrize("mixer", MIXERS)
def test_prompt_text_and_summary(main, mixer: str) -> None:
    code, out, err = main("--prompt", "héllo", "--max-new-tokens", "9", checkpoint=mixer)
    assert code == 0
    assert out.startswith("héllo")
    assert len(out) > len("héllo\n")
    assert re.fullmatch(
        r"prompt: 7 tokens, [\d,]+ tokens/s \| new: 9 tokens, [\d.]+ ms/token \| "
        r"state: [\d,]+ bytes \| fast step\n",
        err,
    )


def test_a_length_that_nobody_typed_ends_with_the_models_positions(main) -> None:
    """It has 16, of which the prompt takes 6."""
    code, out, err = main("--prompt", "hello", "--seed", "1", checkpoint="aft")
    assert code == 0 and out.startswith("hello")
    said, summary = err.splitlines()
    assert said == "the text ends at 16 tokens, for which this aft model is defined: 10 new ones"
    assert "new: 10 tokens" in summary
    typed = main("--prompt", "hello", "--seed", "1", "--max-new-tokens", "10", checkpoint="aft")
    assert typed[:2] == (0, out) and len(typed[2].splitlines()) == 1


@pytest.mark.parametrize(
    "options",
    [
        ["--temperature", "3"],
        ["--top-k", "1"],
        ["--top-p", "0.1"],
        ["--repetition-penalty", "9"],
        ["--seed", "1"],
        ["--greedy"],
        ["--max-new-tokens", "5"],
        ["--num-samples", "2"],
    ],
    ids=lambda options: options[0],
)
def test_every_option_changes_the_text(main, options: list[str]) -> None:
    plain = ["--prompt", "ab", "--max-new-tokens", "40"]
    assert main(*plain)[1] == main(*plain)[1] != main(*plain, *options)[1]


def test_dtype_is_that_of_the_cache_too(main) -> None:
    def state_bytes(dtype: str) -> int:
        err = main("--max-new-tokens", "5", "--dtype", dtype, checkpoint="attention")[2]
        return int(re.search(r"state: ([\d,]+) bytes", err)[1].replace(",", "")) - ROW_BYTES

    assert state_bytes("auto") == state_bytes("float32") == 2 * state_bytes("bfloat16")


def test_stop_cuts_the_text(main) -> None:
    plain = ["--prompt", "ab", "--max-new-tokens", "40", "--greedy"]
    text = main(*plain)[1].removesuffix("\n").removeprefix("ab")
    first, second = text[6], text[9]
    cut = main(*plain, "--stop", second, "--stop", first)[1]
    assert cut == "ab" + text[: min(text.index(first), text.index(second))] + "\n"


def test_samples_are_those_of_their_own_seeds(main) -> None:
    plain = ["--prompt", "ab", "--max-new-tokens", "20"]
    singles = [main(*plain, "--seed", seed)[1] for seed in ("3", "4")]
    batch = main(*plain, "--seed", "3", "--num-samples", "2")
    assert batch[1] == (
        f"----- sample 1 of 2 -----\n{singles[0]}----- sample 2 of 2 -----\n{singles[1]}"
    )
    assert "new: 40 tokens" in batch[2]
    assert "(2 samples at once)" in batch[2]


def test_the_prompt_from_a_file_and_from_stdin(main, tmp_path: Path, monkeypatch) -> None:
    text = "é\r\nx"
    (tmp_path / "prompt.txt").write_bytes(text.encode())
    expected = main("--prompt", text)
    assert main("--prompt-file", str(tmp_path / "prompt.txt"))[1] == expected[1]
    for options in (["-"], ["--prompt-file", "-"], ["--seed", "0", "-"]):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        assert main(*options)[1] == expected[1]


def test_an_empty_prompt_starts_from_bos(main) -> None:
    code, out, err = main("--max-new-tokens", "5")
    assert (code, err[:16]) == (0, "prompt: 1 tokens")
    assert main("--max-new-tokens", "5", "--prompt", "")[1] == out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-new-tokens", "-1"], "--max-new-tokens"),
        (["--max-new-tokens", "0"], "--max-new-tokens"),
        (["--num-samples", "0"], "--num-samples"),
        (["--temperature", "0"], "temperature (0.0) must be above 0: use --greedy"),
        (["--top-p", "1.5"], "top_p (1.5)"),
        (["--top-k", "0"], "top_k (0)"),
        (["--greedy", "--temperature", "1"], "--temperature has no effect with --greedy"),
        (["--greedy", "--num-samples", "2"], "--num-samples has no effect with --greedy"),
        (["--prompt-file", "/nowhere/x"], "--prompt-file (/nowhere/x) cannot be read"),
        (["--prompt", "a", "-"], "give one of them"),
        (["--prompt", "a", "--prompt-file", "b"], "not allowed with"),
        (["--prompt", os.fsdecode(b"ab\xff")], "--prompt is not UTF-8 at byte 2"),
        (["--stop", ""], "--stop ('') is empty"),
        (["--device", "nonsense"], "--device (nonsense)"),
        (["--unknown"], "--unknown"),
    ],
)
def test_mistakes(main, options: list[str], message: str) -> None:
    code, out, err = main(*options)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


def test_a_wrong_checkpoint_lists_those_near(main) -> None:
    code, out, err = main(checkpoint="retentoin")
    assert (code, out) == (2, "")
    assert "retention/final" in err


def test_a_checkpoint_without_a_name(main, tmp_path: Path, monkeypatch) -> None:
    save_checkpoint(tmp_path)
    monkeypatch.chdir(tmp_path)  # which an empty path would mean
    for name in ("", str(tmp_path)):
        assert run(generate.main, [name, "--max-new-tokens", "1"]) == (0 if name else 2)


def test_ctrl_c_keeps_the_text_and_ends_quietly(main, monkeypatch) -> None:
    def interrupted(*args, **kwargs):
        yield ["abc"]
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "stream_text", interrupted)
    code, out, err = main("--prompt", "x")
    assert (code, out) == (130, "xabc\n")
    assert "Traceback" not in err


@pytest.mark.slow
def test_a_million_tokens_through_the_program(tmp_path: Path, monkeypatch, capsys) -> None:
    """Resident memory after the first 10,000 tokens and at the end differ by less than 1 %.

    Apart from the ids, 8 bytes a token, whose place is reserved at the beginning and filled.
    """
    save_checkpoint(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None  # so that no sample ends
    tokenizer.save_pretrained(tmp_path)
    readings = []

    class Output(io.StringIO):
        pieces = 0

        def write(self, text: str) -> int:
            self.pieces += bool(text)
            if text and self.pieces % 10_000 == 0:
                readings.append(psutil.Process().memory_info().rss)
            return len(text)

    monkeypatch.setattr("sys.stdout", Output())
    assert run(generate.main, [str(tmp_path), "--max-new-tokens", str(SOAK_TOKENS)]) == 0
    with capsys.disabled():
        print(
            f"{SOAK_TOKENS:,} tokens, {readings[0] / 1e6:.1f} MB, then {readings[-1] / 1e6:.1f} MB"
        )
    assert len(readings) > SOAK_TOKENS // 30_000
    assert max(readings) < 1.01 * readings[0]


@pytest.mark.slow
def test_the_program_ends_quietly_when_its_reader_goes_away(runs: Path) -> None:
    """The one test in a process of its own: what happens at the interpreter's end counts too."""
    program = subprocess.Popen(
        [sys.executable, str(ROOT / "generate.py"), str(runs / "retention"), "--prompt", "x" * 99],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    program.stdout.close()
    assert program.stderr.read() == b""
    program.stderr.close()
    assert program.wait() == 0
