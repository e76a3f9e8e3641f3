"""Task files: all questions of a benchmark's own file, or an error that names the line."""

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest
import yaml

from retnet import cli
from retnet.evaluation import harness_tasks

HELLASWAG = "Roof: A man sits. he\n3\nruns.\nrips.\nholds.\nstarts.\n"
PIQA = [
    {"goal": "How?", "sol1": "So.", "sol2": "Not so."},
    {"goal": "Why?", "sol1": "Thus.", "sol2": "Because."},
]
PAIRS = [
    {"UID": "island", "sentence_good": "Who left?", "sentence_bad": "Left who?", "more": 1},
    {"UID": "anaphor", "sentence_good": "He cut himself.", "sentence_bad": "He cut herself."},
    {"UID": "island", "sentence_good": "Who ran?", "sentence_bad": "Ran who?"},
]
WSC = """The trophy doesn't fit in the case because  [MASK]  is too large.\x20
[MASK]
The trophy ,The case\x20
The trophy\x20

There is a gap. You see it through [MASK] .
[MASK]
The gap , The wall
The wall

The drain is full of hair. [MASK] must go.
[MASK]
The drain , The hair
The hair
"""
BROKEN = {  # each in one way
    "label": ["Roof", "4", "a", "b", "c", "d"],
    "ending": ["Roof", "1", "a", "b", "c", ""],
    "unmasked": ["It is.", "[MASK]", "It , Them", "It", ""],
    "mask": ["[MASK] is.", "MASK", "It , Them", "It", ""],
    "one": ["[MASK] is.", "[MASK]", "It", "It", ""],
    "neither": ["[MASK] is.", "[MASK]", "It , Them", "He", ""],
    "few": ["0"],
    "two": ["0", "2"],
}


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Path]:
    texts = {
        "hellaswag.txt": HELLASWAG * 2, "wsc.txt": WSC, "labels.lst": "0\n1\n",
        "piqa.jsonl": "\n".join(map(json.dumps, PIQA)),
        "blimp.jsonl": "\n".join(map(json.dumps, PAIRS)), "text.txt": "One é\ntext.\n",
    }  # fmt: skip
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return {name.split(".")[0]: tmp_path / name for name in texts}


def make(*arguments: object) -> int:
    return cli.run(harness_tasks.main, [*map(str, arguments)])


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_hellaswag(sources: dict[str, Path], tmp_path: Path, capsys) -> None:
    out = tmp_path / "tasks"
    assert make("hellaswag", sources["hellaswag"], "--out", out) == 0
    said = "hellaswag_local: 2 questions, for --tasks hellaswag_local --include"
    assert capsys.readouterr().out.startswith(said)
    choices = ["runs.", "rips.", "holds.", "starts."]
    question = {"query": "Roof: A man sits. he", "choices": choices, "label": 3}
    assert rows(out / "hellaswag_local.jsonl") == [question] * 2
    task = yaml.safe_load((out / "hellaswag_local.yaml").read_text())
    assert task["dataset_kwargs"]["data_files"] == {"test": str(out / "hellaswag_local.jsonl")}
    assert [metric["metric"] for metric in task["metric_list"]] == ["acc", "acc_norm"]


def test_piqa(sources: dict[str, Path], tmp_path: Path) -> None:
    arguments = ["piqa", sources["piqa"], "--labels", sources["labels"], "--out", tmp_path / "new"]
    assert make(*arguments, "--name", "mine") == 0
    assert rows(tmp_path / "new/mine.jsonl")[1] == {
        "query": "Question: Why?\nAnswer:", "choices": ["Thus.", "Because."], "label": 1,
    }  # fmt: skip


def test_blimp_is_a_group_of_its_paradigms(sources: dict[str, Path], tmp_path: Path) -> None:
    assert make("blimp", sources["blimp"], "--out", tmp_path) == 0
    group = yaml.safe_load((tmp_path / "blimp_local.yaml").read_text())
    assert group["task"] == ["blimp_local_island", "blimp_local_anaphor"]
    pairs = rows(tmp_path / "blimp_local_island.jsonl")
    assert pairs == [
        {"choices": ["Who left?", "Left who?"], "label": 0},
        {"choices": ["Who ran?", "Ran who?"], "label": 0},
    ]


def test_schemas_have_both_candidates_in_the_sentence(sources: dict, tmp_path: Path) -> None:
    assert make("wsc", sources["wsc"], "--out", tmp_path) == 0
    begin = "The trophy doesn't fit in the case because "
    through = "There is a gap. You see it through "
    assert rows(tmp_path / "wsc_local.jsonl") == [
        {"contexts": [f"{begin}the trophy", f"{begin}the case"], "rest": " is too large.",
         "label": 0},
        {"contexts": [f"{through}the gap", f"{through}the wall"], "rest": ".", "label": 1},
        {"contexts": [f"The drain is full of hair. {x}" for x in ("The drain", "The hair")],
         "rest": " must go.", "label": 1},
    ]  # fmt: skip


def test_a_text_of_your_own(sources: dict[str, Path], tmp_path: Path) -> None:
    assert make("text", sources["text"], "--out", tmp_path, "--name", "own") == 0
    assert rows(tmp_path / "own.jsonl") == [{"text": "One é\ntext.\n"}]


@pytest.mark.parametrize(("suffix", "opener"), [("gz", gzip), ("bz2", bz2), ("xz", lzma)])
def test_compressed_files(tmp_path: Path, suffix: str, opener: Any) -> None:
    with opener.open(tmp_path / f"h.txt.{suffix}", "wt") as stream:
        stream.write(HELLASWAG)
    assert make("hellaswag", tmp_path / f"h.txt.{suffix}", "--out", tmp_path) == 0
    assert len(rows(tmp_path / "hellaswag_local.jsonl")) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("hellaswag {wsc}", "{wsc}: line 1 begins no question of 6 lines"),
        ("wsc {hellaswag}", "{hellaswag}: line 1 begins no schema of four lines"),
        ("piqa {piqa}", "piqa needs --labels FILE"),
        ("hellaswag {folder}/label", "{folder}/label: line 1 begins no question of 6 lines"),
        ("hellaswag {folder}/ending", "{folder}/ending: line 1 begins no question of 6 lines"),
        ("wsc {folder}/unmasked", "{folder}/unmasked: line 1 begins no schema of four lines"),
        ("wsc {folder}/mask", "{folder}/mask: line 1 begins no schema of four lines"),
        ("wsc {folder}/one", "{folder}/one: line 1 begins no schema of four lines"),
        ("wsc {folder}/neither", "{folder}/neither: line 1 begins no schema of four lines"),
        ("piqa {piqa} --labels {wsc}", "--labels ({wsc}) must have a line 0 or 1 for each of"),
        ("piqa {piqa} --labels {folder}/few", "--labels ({folder}/few) must have a line 0 or 1"),
        ("piqa {piqa} --labels {folder}/two", "--labels ({folder}/two) must have a line 0 or 1"),
        ("piqa {blimp} --labels {labels}", "{blimp}: line 1 has no text in the field goal"),
        ("blimp {piqa}", "{piqa}: line 1 has no text in the field UID"),
        ("blimp {text}", "{text}: line 1 is no JSON"),
        ("blimp {labels}", "{labels}: line 1 has no text in the field UID"),
        ("wsc {wsc} --labels {labels}", "--labels ({labels}) has no effect with wsc"),
        ("hellaswag {folder}/none", "{folder}/none is no file"),
        ("hellaswag {folder}", "{folder} is no file"),
        ("hellaswag {folder}/empty", "{folder}/empty is empty"),
        ("hellaswag {folder}/cut.xz", "{folder}/cut.xz cannot be read"),
        ("hellaswag {folder}/latin", "{folder}/latin cannot be read"),
        ("text {folder}/none", "--text ({folder}/none) does not exist"),
        ("hellaswag {hellaswag} --name a/b", "--name (a/b) must be letters, digits"),
        ("hellaswag {hellaswag} --out {wsc}", "--out ({wsc}) is no folder"),
        ("arc {wsc}", "argument benchmark: invalid choice: 'arc'"),
    ],
)  # fmt: skip
def test_mistakes(sources: dict, tmp_path: Path, capsys, arguments: str, words: str) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "cut.xz").write_bytes(lzma.compress(b"text" * 99)[:40])
    (tmp_path / "latin").write_bytes(b"\xe9\n")
    for name, lines in BROKEN.items():
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    places = sources | {"folder": tmp_path}
    out = [] if "--out" in arguments else ["--out", tmp_path / "tasks"]
    assert make(*arguments.format(**places).split(), *out) == cli.EXIT_USER_ERROR
    assert capsys.readouterr().err.startswith(f"error: {words.format(**places)}")
    assert not (tmp_path / "tasks").exists()
