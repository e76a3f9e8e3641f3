"""The comparison's figures, names and table."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retnet.checkpoints import Checkpoint
from retnet.data.messages import Conversation
from retnet.errors import UserError
from retnet.evaluation import (
    EvaluationText,
    check_writable,
    compare_checkpoints,
    format_comparison,
    paired_bootstrap,
    score_documents,
    to_json,
    write_json,
)
from retnet.evaluation.comparison import short_names
from tests.conversations import END, chat_tokenizer, turns
from tests.generation.builders import MIXERS, byte_tokenizer, tiny_model

TEXT = EvaluationText("some text", [f"document {i} " * (i % 5 + 1) for i in range(25)])
TOKENIZER = byte_tokenizer()


def checkpoints() -> list[Checkpoint]:
    return [
        Checkpoint(Path(f"nowhere/tiny-{mixer}/final"), tiny_model(mixer), TOKENIZER, None)
        for mixer in MIXERS
    ]


@pytest.fixture(scope="module")
def comparison():
    return compare_checkpoints(checkpoints(), TEXT, speed_contexts=(8, 1024))


def test_scores_are_those_of_each_model_in_its_training_window(comparison) -> None:
    assert (comparison.context, comparison.stride) == (16, 16)
    for own, checkpoint in zip(comparison.models, checkpoints(), strict=True):
        expected = score_documents(checkpoint.model, TOKENIZER, TEXT.documents, context=16)
        np.testing.assert_array_equal(own.scores.nll, expected.nll)
        assert own.parameters == sum(p.numel() for p in checkpoint.model.parameters())


def test_differences_are_to_the_first_in_both_units(comparison) -> None:
    first, second = comparison.models
    assert first.nats_difference is first.bits_difference is None
    a, b = first.scores, second.scores
    assert second.nats_difference == paired_bootstrap(a.nll, b.nll, a.targets)
    assert second.bits_difference.value == pytest.approx(b.bits_per_byte - a.bits_per_byte)
    in_bits = paired_bootstrap(a.nll, b.nll, a.bytes).low / math.log(2)
    assert second.bits_difference.low == pytest.approx(in_bits)


def test_other_tokenizers_are_compared_in_bits_per_byte(tmp_path: Path) -> None:
    first, second = checkpoints()
    merged = byte_tokenizer((("d", "o"),))
    other = replace(second, tokenizer=merged, model=tiny_model("attention", vocab_size=260))
    comparison = compare_checkpoints([first, other], TEXT)
    assert comparison.models[1].nats_difference is None
    assert comparison.models[1].bits_difference is not None
    assert comparison.models[0].scores.targets.sum() > comparison.models[1].scores.targets.sum()
    table = format_comparison(comparison)
    assert "the tokenizers differ: compare bits/byte" in table
    assert "other tokens" in table


def test_conversations_by_other_templates_are_compared_in_bits_per_byte() -> None:
    chats = [Conversation.of(turns("hello", f"answer {i}"), "a test") for i in range(3)]
    model, tokenizer, other = tiny_model("retention", vocab_size=END + 1), *two_tokenizers()
    same = [Checkpoint(Path(name), model, tokenizer, None) for name in "ab"]
    found = compare_checkpoints(
        [*same, Checkpoint(Path("c"), model, other, None)],
        EvaluationText("chats", chats),
        context=8,
    )
    assert found.context == 8
    assert [own.nats_difference is None for own in found.models] == [True, False, True]
    assert [own.bits_difference is None for own in found.models] == [True, False, False]


def two_tokenizers() -> tuple[Any, Any]:
    """With markers, and with a colon after each role besides."""
    plain, colons = chat_tokenizer(), chat_tokenizer()
    colons.chat_template = colons.chat_template.replace(
        "message['role'] + '", "message['role'] + ':"
    )
    return plain, colons


def test_options_reach_the_scores() -> None:
    models = checkpoints()
    plain = compare_checkpoints(models, TEXT)
    for options in ({"context": 8}, {"stride": 4}):
        other = compare_checkpoints(models, TEXT, **options)
        assert other.models[0].scores.nll.sum() != plain.models[0].scores.nll.sum()
    only_retention = [models[0], models[0]]
    carried = compare_checkpoints(only_retention, TEXT, carry_state=True)
    assert carried.stride is None
    assert carried.models[0].scores.nll.sum() != plain.models[0].scores.nll.sum()
    assert "state carried through each document" in format_comparison(carried)
    assert plain.models[0].speed == []


def test_windows_are_checked_for_all_models_before_any_work(monkeypatch) -> None:
    monkeypatch.setattr("retnet.evaluation.comparison.score_documents", None)
    with pytest.raises(UserError, match="--carry-state needs a recurrent model"):
        compare_checkpoints(checkpoints(), TEXT, carry_state=True)


def test_a_context_longer_than_the_text() -> None:
    with pytest.raises(UserError, match=r"--context \(1000\) is longer than the text"):
        compare_checkpoints(checkpoints(), TEXT, context=1000)
    short = EvaluationText("short", ["ab", "cd"])
    assert compare_checkpoints(checkpoints(), short).context == 16  # a default is no promise
    assert compare_checkpoints(checkpoints(), short, context=3).context == 3


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["runs/a/final", "runs/b/final"], ["a", "b"]),
        (["runs/a/final", "runs/a/best"], ["a", "a/best"]),
        (["runs/a/checkpoints/step_1", "runs/a/checkpoints/step_2"], ["step_1", "step_2"]),
        (["x/runs/a/final", "y/runs/a/final"], ["x/runs/a", "y/runs/a"]),
        (["runs/a/final", "runs/a/final"], ["final", "final"]),
    ],
)
def test_names_are_the_ends_that_differ(paths: list[str], names: list[str]) -> None:
    assert short_names([Path(path) for path in paths]) == names


def test_the_table_says_everything_in_100_columns(comparison) -> None:
    long = [
        replace(own, name=f"{'long-' * 30}{i}", parameters=6_738_415_616, trained_in=precision)
        for i, (own, precision) in enumerate(zip(comparison.models, ("fp32", "bf16"), strict=True))
    ]
    large = np.array([9_999_999] * 9)
    scores = replace(long[0].scores, nll=4.0 * large, targets=large, bytes=4 * large)
    long[0] = replace(long[0], scores=scores)
    text = replace(TEXT, description="/a/long/folder" * 12)
    table = format_comparison(replace(comparison, models=long, text=text))
    assert max(map(len, table.splitlines())) <= 100
    assert "trained in different precisions" in table

    table = format_comparison(comparison)
    second = comparison.models[1]
    for figure in (
        "some text",
        "25 documents",
        "context 16, stride 16",
        f"{comparison.environment['threads']} thread",
        "1 tiny-retention",
        "2 tiny-attention",
        f"{second.parameters:,}",
        f"{second.scores.targets.sum():,}",
        f"{second.scores.bits_per_byte:.4f}",
        f"{second.nats_difference.value:+.4f} [{second.nats_difference.low:+.4f}, ",
        f"{second.bits_difference.value:+.4f} [",
        "95% interval",
        "worse" if second.bits_difference.value > 0 else "better",
        "1,024",
        f"{second.speed[1].ms_per_token:.2f}",
        f"{second.speed[1].cache_bytes:,}",
    ):
        assert figure in table


@pytest.mark.parametrize(
    ("documents", "said"), [(1, "no interval"), (3, "rough, of only 3 documents")]
)
def test_few_documents_are_pointed_out(documents: int, said: str) -> None:
    text = EvaluationText("few", TEXT.documents[:documents])
    assert said in format_comparison(compare_checkpoints(checkpoints(), text))


def test_equal_models_have_no_verdict() -> None:
    twice = [checkpoints()[0]] * 1 + [replace(checkpoints()[0], path=Path("other"))]
    assert "unclear" in format_comparison(compare_checkpoints(twice, TEXT))


def test_json_holds_everything_and_is_written_at_once(comparison, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    write_json(file, to_json(comparison, ["compare.py", "a", "b"]))
    content = json.loads(file.read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
    assert content["command"] == ["compare.py", "a", "b"]
    assert {"python", "torch", "transformers", "threads", "processor"} <= set(
        content["environment"]
    )
    second, result = content["models"][1], comparison.models[1]
    assert second["perplexity"] == result.scores.perplexity
    assert second["nats_per_token_difference"]["low"] == result.nats_difference.low
    assert second["decoding"][1]["cache_bytes"] == result.speed[1].cache_bytes
    assert second["documents"]["nll"] == result.scores.nll.tolist()
    assert content["models"][0]["nats_per_token_difference"] is None


def test_numbers_that_json_does_not_know_become_null(tmp_path: Path) -> None:
    write_json(tmp_path / "out.json", {"a": [math.nan, 1.5], "b": math.inf})
    assert json.loads((tmp_path / "out.json").read_text()) == {"a": [None, 1.5], "b": None}


def test_where_json_cannot_go(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--json .* is a folder"):
        check_writable(tmp_path)
    with pytest.raises(UserError, match=r"none does not exist: make that folder"):
        check_writable(tmp_path / "none" / "out.json")


def test_a_name_of_several_lines_is_one_line() -> None:
    """It made rows of the table."""
    assert short_names([Path("a\n9 best/final"), Path("b/final")]) == ["a\\n9 best", "b"]
