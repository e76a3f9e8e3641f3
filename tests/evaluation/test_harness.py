"""lm-evaluation-harness on a checkpoint: its figures are ours where both measure the same."""

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from retnet import cli
from retnet.checkpoints import load_checkpoint
from retnet.errors import UserError
from retnet.evaluation import harness, harness_tasks
from retnet.evaluation.scoring import score_documents
from retnet.generation import Sampling, sample_text
from tests.evaluation.test_harness_tasks import PAIRS, WSC
from tests.generation.builders import BOS, save_checkpoint

needs_it = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs the package lm_eval"
)
WINDOW = 16  # of the checkpoints
# The last window of a longer text is filled up from before, which compare.py's is not.
TEXTS = ["<eos> is text", "b" * WINDOW, "two windows: 32".ljust(2 * WINDOW, "."), "é\n"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("runs") / "tiny" / "final").parent


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "own.src").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    (folder / "own.src").rename(folder / "own_rows.jsonl")
    (folder / "pairs").write_text("\n".join(map(json.dumps, PAIRS)))
    (folder / "wsc").write_text(WSC)
    for arguments in (
        ("text", folder / "own_rows.jsonl"), ("blimp", folder / "pairs"), ("wsc", folder / "wsc"),
    ):  # fmt: skip
        arguments = (*arguments, "--out", folder / "made")
        assert cli.run(harness_tasks.main, [*map(str, arguments)]) == 0
    return folder / "made"


def run(*arguments: object) -> int:
    return cli.run(harness.main, [*map(str, arguments)])


@torch.no_grad()
def nats(model: Any, context: list[int], target: list[int]) -> float:
    """The likelihood of some tokens after others, from the logits of one pass."""
    ids = torch.tensor([context + target])
    logits = model(ids).logits[0, len(context) - 1 : -1].double().log_softmax(-1)
    return float(logits.gather(1, ids[0, len(context) :, None]).sum())


@needs_it
@pytest.mark.slow
def test_figures_are_those_of_compare_and_of_a_plain_pass(
    tiny: Path, tasks: Path, tmp_path: Path, capsys
) -> None:
    names = ("text_local", "blimp_local,wsc_local")
    file = tmp_path / "found.json"
    assert run(tiny, "--tasks", *names, "--include", tasks, "--json", file) == 0
    found = json.loads(file.read_text())["results"]
    table = capsys.readouterr().out
    assert "|wsc_local" in table and "blimp_local_island" in table and "±" in table

    checkpoint = load_checkpoint(tiny)
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    own = score_documents(model, tokenizer, TEXTS, context=WINDOW, eos=False)
    bits = own.nll.sum() / math.log(2) / sum(len(text.encode()) for text in TEXTS)
    assert found["text_local"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-6)

    right = [
        nats(model, [BOS], [*b" ", *pair["sentence_good"].encode()])
        > nats(model, [BOS], [*b" ", *pair["sentence_bad"].encode()])
        for pair in PAIRS
        if pair["UID"] == "island"
    ]
    assert found["blimp_local_island"]["acc,none"] == sum(right) / len(right)
    assert found["wsc_local"]["acc_stderr,none"] > 0 or found["wsc_local"]["acc,none"] in (0, 1)


@needs_it
@pytest.mark.slow
def test_one_bos_before_a_context_and_none_doubled(tiny: Path, tasks: Path) -> None:
    made = harness._harness_model(load_checkpoint(tiny), WINDOW, 2)
    assert made.tok_encode("ab") == [BOS, *b"ab"]
    assert made.tok_encode("<bos>") == [BOS, *b"<bos>"]  # ordinary text
    assert made.tok_encode("ab", add_special_tokens=False) == [*b"ab"]
    assert made.tok_encode("abc", left_truncate_len=2) == [*b"bc"]
    assert made._encode_pair("ab ", "cd") == ([BOS, *b"ab"], [*b" cd"])
    assert made.max_length == WINDOW and made.prefix_token_id == BOS


@needs_it
@pytest.mark.slow
def test_the_options_have_their_effect(tiny: Path, tasks: Path, tmp_path: Path) -> None:
    def found(*options: object) -> Any:
        arguments = ("--tasks", "wsc_local", "text_local", "--include", tasks)
        assert run(tiny, *arguments, "--json", tmp_path / "f.json", *options) == 0
        return json.loads((tmp_path / "f.json").read_text())

    whole, first = found(), found("--limit", 1)
    assert whole["n-samples"]["wsc_local"]["effective"] == 3
    assert first["n-samples"]["wsc_local"]["effective"] == 1
    short = found("--context", 14)
    bits = "bits_per_byte,none"
    assert whole["results"]["text_local"][bits] != short["results"]["text_local"][bits]
    ones = found("--batch-size", 1)["results"]["text_local"][bits]
    assert ones == pytest.approx(whole["results"]["text_local"][bits], rel=1e-6)


@needs_it
@pytest.mark.slow
def test_a_task_of_texts_that_are_made(tiny: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(tiny)
    questions = ["ab", "c", "abc"]
    options = Sampling(greedy=True)
    answers = [
        sample_text(
            checkpoint.model, checkpoint.tokenizer, text, max_new_tokens=4, sampling=options
        )
        for text in questions
    ]
    rows = [{"q": q, "a": a} for q, a in zip(questions, answers, strict=True)]
    rows[2]["a"] = "nothing of the kind"
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    kwargs = {"until": ["\n\n"], "max_gen_toks": 4, "do_sample": False}
    task = {
        "task": "made", "dataset_path": "json", "test_split": "test", "doc_to_text": "q",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "output_type": "generate_until", "doc_to_target": "a", "generation_kwargs": kwargs,
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (tmp_path / "made.yaml").write_text(yaml.safe_dump(task))
    file = tmp_path / "found.json"
    assert run(tiny, "--tasks", "made", "--include", tmp_path, "--json", file) == 0
    found = json.loads(file.read_text())["results"]["made"]
    assert found["exact_match,none"] == pytest.approx(2 / 3)


@needs_it
@pytest.mark.slow
def test_an_answer_that_no_window_holds(tiny: Path, tasks: Path, capsys) -> None:
    arguments = ("--tasks", "wsc_local", "--include", tasks, "--context", 9)
    assert run(tiny, *arguments) == cli.EXIT_USER_ERROR
    expected = "error: --context (9) is shorter than an answer of 14 tokens: take at least 14"
    assert expected in capsys.readouterr().err


@needs_it
@pytest.mark.slow
def test_a_task_that_nobody_knows(tiny: Path, tasks: Path, tmp_path: Path, capsys) -> None:
    assert run(tiny, "--tasks", "wsc_locl", "--include", tasks) == cli.EXIT_USER_ERROR
    message = capsys.readouterr().err
    assert "error: --tasks (wsc_locl) is no task in" in message and "wsc_local" in message
    moved = (tasks / "wsc_local.yaml").read_text().replace(str(tasks), "/nowhere")
    (tmp_path / "bad.yaml").write_text(moved)
    assert run(tiny, "--tasks", "wsc_local", "--include", tmp_path) == cli.EXIT_USER_ERROR
    assert "error: --tasks (wsc_local) cannot be used" in capsys.readouterr().err
    (tmp_path / "cut.jsonl").write_text('{"label"')
    cut = (tasks / "wsc_local.yaml").read_text().replace(f"{tasks}/wsc_local", f"{tmp_path}/cut")
    (tmp_path / "bad.yaml").write_text(cut)
    assert run(tiny, "--tasks", "wsc_local", "--include", tmp_path) == cli.EXIT_USER_ERROR
    assert "JSON" in capsys.readouterr().err.splitlines()[-1]  # and not only that it fails


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("{tiny} --tasks a --limit 0", "argument --limit: '0' must be a whole number of at least"),
        ("{tiny} --tasks a --context 0", "argument --context: '0' must be"),
        ("{tiny} --tasks a --batch-size x", "argument --batch-size: 'x' must be"),
        ("{tiny}", "the following arguments are required: --tasks"),
        ("{tiny} --tasks a --include {new}/none", "--include ({new}/none) is no folder"),
        ("{tiny} --tasks a --json {tiny}", "--json ({tiny}) is a folder"),
    ],
)  # fmt: skip
def test_mistakes(
    tiny: Path, tmp_path: Path, capsys, monkeypatch, arguments: str, words: str
) -> None:
    places = {"tiny": tiny, "new": tmp_path}
    monkeypatch.setattr(harness, "check_package", lambda: None)
    assert run(*arguments.format(**places).split()) == cli.EXIT_USER_ERROR
    assert capsys.readouterr().err.startswith(f"error: {words.format(**places)}")


def test_the_package_that_is_missing(tiny: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(harness, "PACKAGE", "lm_eval_that_is_not_there")
    assert run(tiny, "--tasks", "a") == cli.EXIT_USER_ERROR
    assert "there is no package lm_eval" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("two\nlines"), r"it cannot be used \(two lines\): mend it"),
        (KeyError(), r"it cannot be used \(KeyError\): mend it"),
        (UserError("said already"), "said already"),
    ],
)
def test_what_the_harness_raises_is_one_line(error: Exception, words: str) -> None:
    with pytest.raises(UserError, match=f"^{words}$"), harness._one_line("it", "mend it"):
        raise error
    with pytest.raises(MemoryError), harness._one_line("it", "mend it"):
        raise MemoryError
