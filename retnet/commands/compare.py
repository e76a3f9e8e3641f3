"""Compare trained models: ``python compare.py runs/tiny-retention runs/tiny-attention``.

Prints for each model its parameters, perplexity and bits per byte on the same text, its difference
to the first model with a 95 % interval, and how fast and in how much memory it decodes.
"""

import argparse
from collections.abc import Sequence

from retnet.cli import ArgumentParser, file_path, positive_int, program
from retnet.errors import UserError
from retnet.evaluation import (
    CONTEXTS,
    Comparison,
    check_not_read,
    check_report_folder,
    check_writable,
    compare_checkpoints,
    find_out,
    format_comparison,
    load_contenders,
    text_of_file,
    to_json,
    validation_text,
    write_json,
    write_report,
)
from retnet.evaluation.report import COST_CONTEXTS, LIMIT_S, QUICK, QUICK_CONTEXTS, THOROUGH
from retnet.generation import add_loading_options, loading_arguments
from retnet.model.quantised import quantised_format
from retnet.terminal import deliver, write_out


def build_parser() -> ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = ArgumentParser(program("compare.py"), description=__doc__, formatter_class=raw)
    add = parser.add_argument
    several = "2 or more checkpoint or run folders, or causal language models of transformers: "
    several += "folders with safetensors and a tokenizer, or names on the Hugging Face Hub"
    add("checkpoints", nargs="+", metavar="CHECKPOINT", help=several)
    text = "a text, .jsonl, .csv or .parquet file (the first model's validation data)"
    add("--text", type=file_path, metavar="FILE", help=text)
    add("--text-field", metavar="NAME", help="field of the file's rows with the text (text)")
    context = "tokens of a window (the first model's training window)"
    add("--context", type=positive_int, metavar="N", help=context)
    stride = "tokens from one window to the next; less is more context (the context: no overlap)"
    add("--stride", type=positive_int, metavar="N", help=stride)
    carry = "carry a state of constant size through each whole document, without windows"
    add("--carry-state", action="store_true", help=carry)
    add("--no-eos", action="store_true", help="do not score the <eos> at the end of a document")
    add("--batch-size", type=positive_int, metavar="N", help="windows at once (by their size)")
    speed = parser.add_mutually_exclusive_group()
    speed.add_argument("--no-speed", action="store_true", help="do not measure decoding")
    after = f"measure decoding after so many tokens ({' '.join(map(str, CONTEXTS))})"
    speed.add_argument("--contexts", nargs="+", type=decoded_after, metavar="N", help=after)
    add("--json", type=file_path, metavar="FILE", help="also write everything to this file")
    report = "also write a report with pictures into this folder; measures more, for minutes"
    add("--report", type=file_path, metavar="DIR", help=report)
    quick = "a report of what takes a minute: fewer and shorter contexts, batches and rows"
    add("--quick", action="store_true", help=quick)
    add_loading_options(parser)
    return parser


def decoded_after(text: str) -> int:
    """An argparse type: one of --contexts, which takes all that follows it."""
    try:
        return positive_int(text)
    except argparse.ArgumentTypeError as error:
        reason = f"{error}; checkpoints are named before --contexts"
        raise argparse.ArgumentTypeError(reason) from error


def main(argv: Sequence[str]) -> None:
    arguments = build_parser().parse_intermixed_args(argv)
    if len(arguments.checkpoints) < 2:
        raise UserError(
            f"one checkpoint ({arguments.checkpoints[0]}) compares with nothing: name a second one"
        )
    if arguments.json:
        check_writable(arguments.json)
    if arguments.report:
        check_report_folder(arguments.report, arguments.json)
    elif arguments.quick:
        raise UserError("--quick has no effect without --report DIR: leave it out, or add that")
    if arguments.text_field == "":
        raise UserError("--text-field ('') is empty: name a field, or leave it out")
    if arguments.text_field is not None and arguments.text is None:
        raise UserError(f"--text-field ({arguments.text_field}) has no effect without --text")
    text = text_of_file(arguments.text, arguments.text_field or "text") if arguments.text else None
    checkpoints = load_contenders(arguments.checkpoints, **loading_arguments(arguments))
    for checkpoint in checkpoints if arguments.report else ():
        if weights := quantised_format(checkpoint.model):
            raise UserError(
                f"--report ({arguments.report}) also measures training, and the weights of "
                f"{checkpoint.path} are quantised ({weights}): leave --report out"
            )
    text = validation_text(checkpoints) if text is None else text
    if arguments.report and text.are_conversations:
        raise UserError(
            f"--report ({arguments.report}) is made of texts, and {text.description} is "
            "conversations: leave it out, or name a text with --text"
        )
    if arguments.json:
        check_not_read(arguments.json, text.files)
    comparison = compare_checkpoints(
        checkpoints,
        text,
        context=arguments.context,
        stride=arguments.stride,
        batch_size=arguments.batch_size,
        carry_state=arguments.carry_state,
        eos=not arguments.no_eos,
        speed_contexts=() if arguments.no_speed else arguments.contexts or contexts_of(arguments),
        speed_limit_s=LIMIT_S if arguments.report else None,
    )
    command = ["compare.py", *argv]
    content = to_json(comparison, command)
    outputs = [lambda: print_table(comparison)]
    outputs += [lambda: write_json(arguments.json, content)] if arguments.json else []
    if arguments.report:
        reach = QUICK if arguments.quick else THOROUGH
        # measured after the table is there
        outputs.append(
            lambda: write_report(
                arguments.report, find_out(checkpoints, comparison, reach), command
            )
        )
    deliver(*outputs)


def contexts_of(arguments: argparse.Namespace) -> Sequence[int]:
    """Where decoding is measured if nothing else is asked for."""
    if not arguments.report:
        return CONTEXTS
    return QUICK_CONTEXTS if arguments.quick else COST_CONTEXTS


def print_table(comparison: Comparison) -> None:
    write_out(format_comparison(comparison))
