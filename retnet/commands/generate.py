"""Continue a text with a trained model: ``python generate.py runs/tiny-retention --prompt "def "``.

Standard output gets the prompt followed by its continuation, as it is made, and a final newline if
the text has none. With --num-samples above 1 every sample comes under a line "----- sample 1 of 3
-----"; they are made together, so the first streams and the others follow when it is done. One line
about tokens, speed and memory goes to standard error at the end.

With --chat each line of standard input, typed or piped, is a message, and the answers follow one
another: Ctrl-C ends an answer, Ctrl-D the conversation.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from retnet.checkpoints import Checkpoint, load_checkpoint
from retnet.cli import (
    EXIT_INTERRUPTED,
    ArgumentParser,
    file_path,
    number,
    positive_int,
    program,
    whole_number,
)
from retnet.errors import UserError
from retnet.generation import (
    Chat,
    Sampling,
    Usage,
    add_loading_options,
    check_finite,
    converse,
    decode_utf8,
    loading_arguments,
    print_samples,
    read_messages,
    read_prompt,
    stream_text,
)
from retnet.terminal import text_output

MAX_NEW_TOKENS, LONGEST_ANSWER = 200, 1000


def build_parser() -> ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = ArgumentParser(program("generate.py"), description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("checkpoint", help="a checkpoint folder, or a run folder (its final, best or newest)")
    add("stdin", nargs="?", type=dash, metavar="-", help="read the prompt from standard input")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", help="the text to continue; without one it starts from <bos>")
    prompt.add_argument(
        "--prompt-file", type=file_path, help="a UTF-8 file to continue; - is stdin"
    )
    add("--chat", action="store_true", help="talk with a model that was trained on conversations")
    add("--system", metavar="TEXT", help="with --chat: what it is told before the first message")
    most = f"the most to make ({MAX_NEW_TOKENS}, of an answer {LONGEST_ANSWER}; or what the model "
    most += "has room for)"
    add("--max-new-tokens", type=positive_int, help=most)
    temperature = f"above 0, lower is more cautious ({Sampling.temperature})"
    add("--temperature", type=number, help=temperature)
    add("--top-k", type=whole_number, help="keep the k most likely tokens (all)")
    add("--top-p", type=number, help=f"keep the likely ones up to this sum ({Sampling.top_p})")
    add("--repetition-penalty", type=number, help="above 1: repeat less (1)")
    add("--greedy", action="store_true", help="always take the most likely token")
    add("--seed", type=whole_number, help="sample i draws with seed + i - 1 (0)")
    add("--num-samples", type=positive_int, default=1, help="continuations, made as one batch (1)")
    add("--stop", action="append", default=[], help="end before this text; may be repeated")
    kept = "compile the step first: for thousands of tokens (on a CPU kept for later starts in "
    kept += "$XDG_CACHE_HOME or ~/.cache, retnet/steps, where the state is of constant size)"
    add("--compile", action="store_true", help=kept)
    add_loading_options(parser)
    return parser


def dash(text: str) -> str:
    """An argparse type: what may follow the checkpoint."""
    if text != "-":
        raise argparse.ArgumentTypeError(
            f"{text!r} is one argument too many: there is one checkpoint, and the text to continue "
            "is given as --prompt 'TEXT', in quotes as a whole, or as - on standard input"
        )
    return text


def sampling_of(arguments: argparse.Namespace) -> Sampling:
    """How to choose tokens; options that would have no effect are errors."""
    names = ("temperature", "top_k", "top_p", "seed", "repetition_penalty")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if arguments.greedy:
        useless = [f"--{name.replace('_', '-')}" for name in names[:-1] if name in given]
        useless += ["--num-samples"] if arguments.num_samples > 1 else []
        if useless:
            raise UserError(f"{useless[0]} has no effect with --greedy: leave one of them out")
    return Sampling(greedy=arguments.greedy, **given)


def prompt_of(arguments: argparse.Namespace) -> str:
    if arguments.stdin and (arguments.prompt is not None or arguments.prompt_file):
        raise UserError("- (the prompt on stdin) and --prompt or --prompt-file: give one of them")
    if arguments.stdin or arguments.prompt_file == Path("-"):
        return read_prompt(None)
    if arguments.prompt_file:
        return read_prompt(arguments.prompt_file)
    return _typed(arguments.prompt or "", "--prompt")


def _typed(text: str, option: str) -> str:
    """An argument's text, which has escapes for bytes that are no UTF-8."""
    return decode_utf8(text.encode("utf-8", "surrogateescape"), option)


def check_chat_options(arguments: argparse.Namespace) -> None:
    """Raise a ``UserError`` for what has no effect in a conversation, or outside of one."""
    if not arguments.chat:
        if arguments.system is not None:
            raise UserError("--system has no effect without --chat: add that, or leave it out")
        return
    given = {
        "-": arguments.stdin,
        "--prompt": arguments.prompt is not None,
        "--prompt-file": arguments.prompt_file,
        "--num-samples": arguments.num_samples > 1,
    }
    for option in (option for option, is_given in given.items() if is_given):
        raise UserError(
            f"{option} has no effect with --chat, where each line of standard input is a message "
            "with one answer: leave it out"
        )


def talk(arguments: argparse.Namespace, checkpoint: Checkpoint, sampling: Sampling) -> int:
    """Hold a conversation."""
    if not checkpoint.tokenizer.chat_template:
        raise UserError(
            f"checkpoint ({checkpoint.path}) has no chat template (chat_template.jinja): train one "
            "on conversations (data.format=messages, see docs/chat.md), or leave --chat out"
        )
    chat = Chat(
        checkpoint.model,
        checkpoint.tokenizer,
        system=None if arguments.system is None else _typed(arguments.system, "--system"),
        sampling=sampling,
        max_new_tokens=arguments.max_new_tokens or LONGEST_ANSWER,
        stop=arguments.stop,
        compile=arguments.compile,
    )
    code = 0
    with text_output():
        try:
            converse(chat, read_messages())
        except KeyboardInterrupt:
            print(flush=True)
            code = EXIT_INTERRUPTED
        if chat.usage.answers:
            print(chat.usage.summary(), file=sys.stderr)
    return code


def main(argv: Sequence[str]) -> int:
    arguments = build_parser().parse_intermixed_args(argv)
    check_chat_options(arguments)
    sampling, usage = sampling_of(arguments), Usage()
    prompt = "" if arguments.chat else prompt_of(arguments)
    checkpoint = load_checkpoint(arguments.checkpoint, **loading_arguments(arguments))
    check_finite(checkpoint)
    if arguments.chat:
        return talk(arguments, checkpoint, sampling)
    pieces = stream_text(
        checkpoint.model,
        checkpoint.tokenizer,
        prompt,
        max_new_tokens=arguments.max_new_tokens or MAX_NEW_TOKENS,
        by_hand=arguments.max_new_tokens is not None,
        sampling=sampling,
        num_samples=arguments.num_samples,
        stop=arguments.stop,
        usage=usage,
        compile=arguments.compile,
    )
    code = 0
    with text_output():
        try:
            print_samples(prompt, pieces, arguments.num_samples)
        except KeyboardInterrupt:
            print(flush=True)
            code = EXIT_INTERRUPTED
        print(usage.summary(), file=sys.stderr)
    return code
