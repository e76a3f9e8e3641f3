"""Task files for lm-evaluation-harness from a benchmark's own file: nothing is downloaded.

    python -m retnet.evaluation.harness_tasks hellaswag hellaswag_val_full.txt --out DIR
    python -m retnet.evaluation.harness_tasks piqa valid.jsonl --labels valid-labels.lst --out DIR
    python -m retnet.evaluation.harness_tasks blimp blimp.jsonl.xz --out DIR
    python -m retnet.evaluation.harness_tasks wsc wsc273.txt --out DIR
    python -m retnet.evaluation.harness_tasks text my.txt --out DIR

A task is NAME.yaml and NAME.jsonl; BLiMP is a group with a task for each paradigm. They are for
``python -m retnet.evaluation.harness CHECKPOINT --tasks NAME --include DIR`` or lm_eval's own
command. Questions and scoring are those of the harness's tasks of the same names. The files name
each other by full paths: make them again when they have moved.
"""

import argparse
import bz2
import gzip
import json
import lzma
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from retnet import files
from retnet.cli import ArgumentParser, file_path, run
from retnet.errors import UserError, os_errors
from retnet.evaluation.text import text_of_file
from retnet.paths import kind_of
from retnet.terminal import write_out

OPENERS: dict[str, Any] = {".bz2": bz2.open, ".xz": lzma.open, ".gz": gzip.open}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
HELLASWAG_LINES = 6  # of a question: context, number of the right ending, four endings
WSC_LINES = 5  # of a schema: sentence, [MASK], two candidates, the right one, an empty line
MASK = "[MASK]"
# Words that begin a candidate in capitals, and are small within a sentence.
SMALL = {"A", "An", "The", "She", "He", "It", "They", "My", "His", "Her", "Their"}
ACCURACY = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
# and the answer of the highest likelihood per character: long ones are less likely
BOTH = [*ACCURACY, {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True}]
PERPLEXITIES = [
    {"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")
]
CHOICES: dict[str, Any] = {
    "output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "label",
}  # fmt: skip
# Of each benchmark what its tasks have in common, by the fields of the rows below.
TASKS: dict[str, dict[str, Any]] = {
    "hellaswag": CHOICES | {"doc_to_text": "query", "metric_list": BOTH},
    "piqa": CHOICES | {"doc_to_text": "query", "metric_list": BOTH},
    "blimp": CHOICES | {"doc_to_text": "", "num_fewshot": 0, "metric_list": ACCURACY},
    "wsc": {
        "output_type": "multiple_choice", "doc_to_text": "label", "doc_to_choice": "contexts",
        "doc_to_target": "rest", "target_delimiter": "", "metric_list": ACCURACY,
    },
    "text": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text",
        "metric_list": PERPLEXITIES,
    },
}  # fmt: skip
Rows = list[dict[str, Any]]


def hellaswag(file: Path) -> Rows:
    """The questions of a text file of six lines each."""
    rows = []
    for number, (query, label, *choices) in _blocks(file, HELLASWAG_LINES):
        if label not in ("0", "1", "2", "3") or not all((query, *choices)):
            raise UserError(
                f"{file}: line {number} begins no question of {HELLASWAG_LINES} lines (context, "
                "number of the right ending from 0 to 3, four endings): name a file that has those"
            )
        rows.append({"query": query, "choices": choices, "label": int(label)})
    return rows


def piqa(file: Path, labels: Path) -> Rows:
    """The questions of PIQA's valid.jsonl, with the right solutions of valid-labels.lst."""
    right = [line.strip() for line in _lines(labels)]
    questions = list(_objects(file, ("goal", "sol1", "sol2")))
    if len(right) != len(questions) or not {*right} <= {"0", "1"}:
        raise UserError(
            f"--labels ({labels}) must have a line 0 or 1 for each of the {len(questions):,} "
            f"questions of {file}: name the one that belongs to it"
        )
    return [
        {
            "query": f"Question: {one['goal']}\nAnswer:",
            "choices": [one["sol1"], one["sol2"]],
            "label": int(label),
        }
        for one, label in zip(questions, right, strict=True)
    ]


def blimp(file: Path) -> dict[str, Rows]:
    """The minimal pairs of each paradigm of BLiMP, the good sentence first."""
    paradigms: dict[str, Rows] = {}
    for pair in _objects(file, ("UID", "sentence_good", "sentence_bad")):
        choices = [pair["sentence_good"], pair["sentence_bad"]]
        paradigms.setdefault(pair["UID"], []).append({"choices": choices, "label": 0})
    return paradigms


def wsc(file: Path) -> Rows:
    """Winograd schemas: the same rest of a sentence after each of two candidates.

    Which of them makes the rest likelier is the answer (partial evaluation: arXiv 1806.02847).
    """
    rows = []
    for number, (sentence, mask, candidates, right, *_) in _blocks(file, WSC_LINES):
        names = [name.strip() for name in candidates.split(",")]
        whole = re.sub(r"\s+", " ", sentence)
        before, found, after = whole.partition(MASK)
        if not found or mask != MASK or len(names) != 2 or right not in names:
            raise UserError(
                f"{file}: line {number} begins no schema of four lines and an empty one (a "
                f"sentence with {MASK}, {MASK}, two candidates with a comma between, the right "
                "one): name a file that has those"
            )
        rows.append(
            {
                "contexts": [before + _within(name, before) for name in names],
                "rest": re.sub(r"^ (?=[.,;:!?'])", "", after.rstrip()),
                "label": names.index(right),
            }
        )
    return rows


def _within(candidate: str, before: str) -> str:
    """A candidate as it is written after the beginning of its sentence."""
    first, blank, rest = candidate.partition(" ")
    begins = not before.strip() or before.rstrip()[-1] in '.!?"'
    return candidate if begins or first not in SMALL else f"{first.lower()}{blank}{rest}"


def _lines(file: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, perhaps compressed, without their ends."""
    if kind_of(file, "the file") != "file":
        raise UserError(f"{file} is no file: name the benchmark's own")
    opener = OPENERS.get(file.suffix, open)
    try:
        with opener(file, "rt", encoding="utf-8") as stream:
            yield from (line.rstrip("\r\n") for line in stream)
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError) as error:
        raise UserError(f"{file} cannot be read ({error}): copy it again") from error


def _blocks(file: Path, size: int) -> Iterator[tuple[int, list[str]]]:
    """Stripped lines, ``size`` at a time, with the number of the first; empty ones at the end."""
    lines = [line.strip() for line in _lines(file)]
    for start in range(0, len(lines), size):
        block = lines[start : start + size]
        yield start + 1, block + [""] * (size - len(block))


def _objects(file: Path, fields: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The objects of a .jsonl file, each with text in some fields."""
    for number, line in enumerate(_lines(file), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{file}: line {number} is no JSON ({error}): copy it again") from error
        for name in fields:
            if not isinstance(row, dict) or not isinstance(row.get(name), str):
                raise UserError(
                    f"{file}: line {number} has no text in the field {name}: name a file of rows "
                    f"with {', '.join(fields)}"
                )
        yield row


def task_files(benchmark: str, name: str, file: Path, labels: Path | None) -> dict[str, Rows]:
    """The rows of each task by its name; a ``UserError`` where the file is another one."""
    if benchmark == "blimp":
        found = {f"{name}_{paradigm}": rows for paradigm, rows in blimp(file).items()}
    elif benchmark == "piqa":
        if labels is None:
            raise UserError("piqa needs --labels FILE, its valid-labels.lst: add that")
        found = {name: piqa(file, labels)}
    elif benchmark == "text":
        found = {name: [{"text": text} for text in text_of_file(file).documents]}
    else:
        found = {name: {"hellaswag": hellaswag, "wsc": wsc}[benchmark](file)}
    if not any(found.values()):
        raise UserError(f"{file} is empty: name a file with questions")
    return found


def write_tasks(benchmark: str, name: str, tasks: dict[str, Rows], out: Path) -> None:
    """Write rows and descriptions into a folder, which is made if it is not there."""
    with os_errors(f"--out ({out}) cannot be written", "name another folder"):
        out.mkdir(parents=True, exist_ok=True)
        for task, rows in tasks.items():
            data = out.absolute() / f"{task}.jsonl"
            lines = (json.dumps(row, ensure_ascii=False) for row in rows)
            files.write_text(data, "\n".join(lines) + "\n")
            description = {
                "task": task,
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": str(data)}},
                "test_split": "test",
                **TASKS[benchmark],
                "metadata": {"version": 1.0},
            }
            files.write_text(out / f"{task}.yaml", yaml.safe_dump(description, sort_keys=False))
        if benchmark == "blimp":
            mean = {"metric": "acc", "aggregation": "mean", "weight_by_size": False}
            group = {"group": name, "task": [*tasks], "aggregate_metric_list": [mean]}
            text = yaml.safe_dump(group | {"metadata": {"version": 1.0}}, sort_keys=False)
            files.write_text(out / f"{name}.yaml", text)


def build_parser() -> ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = ArgumentParser(
        "python -m retnet.evaluation.harness_tasks", description=__doc__, formatter_class=raw
    )
    add = parser.add_argument
    add("benchmark", choices=TASKS, help="what the file holds; text: documents, for perplexities")
    add("file", type=file_path, help="the benchmark's file, plain or .gz, .bz2, .xz")
    add("--labels", type=file_path, metavar="FILE", help="piqa's right solutions, a line each")
    add("--out", type=file_path, metavar="DIR", required=True, help="folder for the task files")
    add("--name", help="of the task, or the group (hellaswag_local, piqa_local, ...)")
    return parser


def main(argv: Sequence[str]) -> None:
    arguments = build_parser().parse_args(argv)
    benchmark, out = arguments.benchmark, arguments.out
    name = f"{benchmark}_local" if arguments.name is None else arguments.name
    if not NAME.fullmatch(name):
        raise UserError(f"--name ({name}) must be letters, digits, - and _")
    if arguments.labels and benchmark != "piqa":
        raise UserError(f"--labels ({arguments.labels}) has no effect with {benchmark}")
    if kind_of(out, "--out") not in (None, "folder"):
        raise UserError(f"--out ({out}) is no folder: name one")
    tasks = task_files(benchmark, name, arguments.file, arguments.labels)
    write_tasks(benchmark, name, tasks, out)
    number = sum(map(len, tasks.values()))
    what = "documents" if benchmark == "text" else "questions"
    write_out(f"{name}: {number:,} {what}, for --tasks {name} --include {out}")


if __name__ == "__main__":
    sys.exit(run(main))
