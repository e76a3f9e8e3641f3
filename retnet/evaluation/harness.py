"""A checkpoint on the tasks of lm-evaluation-harness.

    python -m retnet.evaluation.harness runs/tiny-retention --tasks hellaswag_local --include tasks/

Prints the harness's table, each figure with its standard error. The harness (package lm_eval) does
the work; what is set here is what its default gets wrong for these models: every text begins with
one <bos>, as in training and in compare.py, and the window is the trained one. Tasks are those of
the folder --include (python -m retnet.evaluation.harness_tasks makes them from a benchmark's file)
and the harness's own, which it fetches from the Hugging Face Hub.
"""

import argparse
import difflib
import importlib.util
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from retnet.checkpoints import Checkpoint, load_checkpoint
from retnet.cli import ArgumentParser, file_path, positive_int, run
from retnet.errors import UserError, is_out_of_memory
from retnet.evaluation.comparison import default_context, describe_environment
from retnet.evaluation.output import check_not_read, check_writable, write_json
from retnet.evaluation.scoring import check_windows
from retnet.evaluation.tokens import plain_ids
from retnet.generation import add_loading_options, check_finite, loading_arguments
from retnet.paths import kind_of
from retnet.terminal import deliver, write_out

PACKAGE = "lm_eval"
BATCH_SIZE = 8  # rows of a pass
MOST_NAMES = 5  # of tasks in a message
OWN = "python -m retnet.evaluation.harness_tasks"


def build_parser() -> ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = ArgumentParser(
        "python -m retnet.evaluation.harness", description=__doc__, formatter_class=raw
    )
    add = parser.add_argument
    add("checkpoint", help="a checkpoint folder, or a run folder (its final, best or newest)")
    add("--tasks", nargs="+", required=True, metavar="TASK", help="names of tasks and groups")
    add("--include", type=file_path, metavar="DIR", help="folder with task files of your own")
    add("--limit", type=positive_int, metavar="N", help="only the first N questions of each task")
    context = "tokens of a window; of longer texts the end counts (the trained window)"
    add("--context", type=positive_int, metavar="N", help=context)
    add("--batch-size", type=positive_int, metavar="N", help=f"rows at once ({BATCH_SIZE})")
    add("--json", type=file_path, metavar="FILE", help="also write the results to this file")
    add_loading_options(parser)
    return parser


def check_package() -> None:
    """Raise a ``UserError`` where the harness is not installed."""
    if importlib.util.find_spec(PACKAGE) is None:
        raise UserError(f"there is no package {PACKAGE}: pip install lm_eval")


def task_manager(tasks: Sequence[str], include: Path | None) -> Any:
    """What knows the tasks, of ``include`` and, where those are not all, of the harness.

    A ``UserError`` for a name that nobody knows, with those that are near it.
    """
    from lm_eval.tasks import TaskManager

    with _one_line(f"--include ({include})", f"make its files anew ({OWN})"):
        if include is not None:
            own = TaskManager(include_path=str(include), include_defaults=False)
            if {*tasks} <= {*own.all_tasks}:
                return own  # the harness's own are thousands of files
        manager = TaskManager(include_path=None if include is None else str(include))
    for name in tasks:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=MOST_NAMES)
            hint = f"near it are {', '.join(near)}" if near else f"make one with {OWN}"
            where = f"in {include} and " if include is not None else ""
            raise UserError(f"--tasks ({name}) is no task {where}of the harness: {hint}")
    return manager


def evaluate(
    checkpoint: Checkpoint,
    tasks: Sequence[str],
    manager: Any,
    *,
    context: int | None = None,
    batch_size: int = BATCH_SIZE,
    limit: int | None = None,
) -> dict[str, Any]:
    """The harness's results on its tasks, as ``lm_eval.simple_evaluate`` returns them.

    Every text that is scored has one ``<bos>`` before it, which is no target, and no ``<eos>``.

    Raises:
        UserError: The window does not fit the model, or a task's data cannot be had.
    """
    import datasets
    from lm_eval import simple_evaluate

    window = default_context(checkpoint) if context is None else context
    check_windows(checkpoint.model, window, None, False)
    datasets.disable_progress_bars()  # of files that take a moment
    model = _harness_model(checkpoint, window, batch_size)
    with _one_line(f"--tasks ({' '.join(tasks)})", f"reach the Hub, or make your own with {OWN}"):
        loaded = manager.load([*tasks])
    manager.load = lambda names: loaded  # which would read them again, and raise as it likes
    found: dict[str, Any] = simple_evaluate(
        model=model,
        tasks=[*tasks],
        task_manager=manager,
        limit=limit,
        log_samples=False,
    )
    return found


def _harness_model(checkpoint: Checkpoint, window: int, batch_size: int) -> Any:
    """The model as the harness calls it."""
    from lm_eval.models.huggingface import HFLM

    tokenizer = checkpoint.tokenizer

    class Model(HFLM):
        """One ``<bos>`` before each text, and so none in one that is scored as a whole.

        There the harness adds its own, by default to that of the tokenizer.
        """

        whole: Any = None  # while texts are scored as a whole, the bar of their windows

        def tok_encode(
            self,
            string: str,
            add_special_tokens: bool | None = None,
            left_truncate_len: int | None = None,
            **_: Any,
        ) -> list[int]:
            ids = plain_ids(tokenizer, string)
            if self.whole is not None:
                self.whole.total += math.ceil(len(ids) / window)
            elif add_special_tokens is not False:
                ids = [tokenizer.bos_token_id, *ids]
            return ids[-left_truncate_len:] if left_truncate_len else ids

        def tok_batch_encode(
            self,
            strings: list[str],
            padding_side: str = "left",
            left_truncate_len: int | None = None,
            **_: Any,
        ) -> tuple[Any, Any]:
            ids = [self.tok_encode(text, left_truncate_len=left_truncate_len) for text in strings]
            rows = tokenizer.pad({"input_ids": ids}, padding_side=padding_side, return_tensors="pt")
            return rows["input_ids"], rows["attention_mask"]

        def loglikelihood_rolling(self, *args: Any, **options: Any) -> list[float]:
            with tqdm(desc="scoring windows", total=0, disable=None) as self.whole:
                try:
                    return super().loglikelihood_rolling(*args, **options)
                finally:
                    self.whole = None

        def _loglikelihood_tokens(
            self, requests: Any, disable_tqdm: bool = False, **options: Any
        ) -> Any:
            if self.whole is not None:  # a batch of windows, for which the harness has a bar each
                disable_tqdm = True
                self.whole.update(len(requests))
            longest = max((len(answer) for _, _, answer in requests), default=0)
            if longest > window:
                raise UserError(
                    f"--context ({window:,}) is shorter than an answer of {longest:,} tokens: take "
                    f"at least {longest:,}"
                )
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, **options)

    return Model(
        pretrained=checkpoint.model,
        tokenizer=tokenizer,
        backend="causal",
        max_length=window,
        batch_size=batch_size,
        prefix_token_id=tokenizer.bos_token_id,
    )


@contextmanager
def _one_line(what: str, fix: str) -> Iterator[None]:
    """What the harness raises as a ``UserError`` of one line."""
    try:
        yield
    except Exception as error:  # each library below it has its own
        if is_out_of_memory(error) or isinstance(error, UserError):
            raise
        reason = " ".join(f"{error}: {error.__cause__ or ''}".split())[:300].rstrip(": ")
        reason = reason or type(error).__name__
        raise UserError(f"{what} cannot be used ({reason}): {fix}") from error


def to_json(found: dict[str, Any], checkpoint: Checkpoint, command: list[str]) -> dict[str, Any]:
    """What --json writes: the figures, and what they depend on."""
    names = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better")
    return {
        "command": command,
        "checkpoint": str(checkpoint.path),
        "lm_eval": version(PACKAGE),
        "environment": describe_environment(checkpoint.model.device),
        **{name: found[name] for name in names if name in found},
    }


def main(argv: Sequence[str]) -> None:
    arguments = build_parser().parse_intermixed_args(argv)
    check_package()
    logging.getLogger(PACKAGE).setLevel(logging.ERROR)
    tasks = [name for given in arguments.tasks for name in given.split(",")]
    if arguments.json:
        check_writable(arguments.json)
    if arguments.include:
        if kind_of(arguments.include, "--include") != "folder":
            raise UserError(f"--include ({arguments.include}) is no folder: name one")
        if arguments.json:
            check_not_read(arguments.json, arguments.include.rglob("*"), "task")
    loading = loading_arguments(arguments)
    manager = task_manager(tasks, arguments.include)
    checkpoint = load_checkpoint(arguments.checkpoint, **loading)
    check_finite(checkpoint)
    found = evaluate(
        checkpoint,
        tasks,
        manager,
        context=arguments.context,
        batch_size=arguments.batch_size or BATCH_SIZE,
        limit=arguments.limit,
    )
    outputs = [lambda: print_table(found)]
    if arguments.json:
        content = to_json(found, checkpoint, ["retnet.evaluation.harness", *argv])
        outputs.append(lambda: write_json(arguments.json, content))
    deliver(*outputs)


def print_table(found: dict[str, Any]) -> None:
    """The harness's own tables: tasks, and groups where there are any."""
    from lm_eval.utils import make_table

    write_out(make_table(found).rstrip())
    if found.get("groups"):
        write_out(make_table(found, "groups").rstrip())


if __name__ == "__main__":
    sys.exit(run(main))
