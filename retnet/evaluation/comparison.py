"""Several checkpoints on the same text, and their speed side by side."""

import logging
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers

from retnet.checkpoints import Checkpoint
from retnet.checkpoints.format import trained_in
from retnet.data.chat import ChatFormat
from retnet.errors import UserError
from retnet.evaluation.bootstrap import Difference, paired_bootstrap, to_bits
from retnet.evaluation.foreign import ForeignModel, check_fits
from retnet.evaluation.loading import hub_name
from retnet.evaluation.scoring import DocumentScores, check_windows, score_documents
from retnet.evaluation.speed import DecodeSpeed, decode_speed
from retnet.evaluation.text import EvaluationText
from retnet.evaluation.tokens import beginning, check_end, identity
from retnet.generation import check_state_fits
from retnet.model.causal_lm import DecoderForCausalLM
from retnet.model.quantised import quantised_format
from retnet.terminal import in_one_line

logger = logging.getLogger(__name__)

MOST_CONTEXT = 2048  # of a window that nobody asked for: others' models name up to millions


@dataclass(frozen=True)
class ModelResult:
    """What was found out about one model."""

    name: str  # short; the models' names differ where their folders do
    path: Path
    mixer: str
    dtype: str
    trained_in: str | None  # fp32 or bf16; None where its checkpoint does not say
    parameters: int  # tied ones once
    scores: DocumentScores
    same_tokenizer: bool  # whether its tokens are those of the first model
    nats_difference: Difference | None  # per token, minus the first model's; None if tokens differ
    bits_difference: Difference | None  # per byte, minus the first model's; None for that one
    speed: list[DecodeSpeed]  # after each context; empty when it was not measured
    begins: str | None = "<bos>"  # token before a document's first; None where there is none
    begins_with_eos: bool = False  # whether that is the one that ends a document too
    base: Path | None = None  # of an adapter the checkpoint that it was merged into


@dataclass(frozen=True)
class Comparison:
    """Everything that the table and the JSON file say."""

    text: EvaluationText
    context: int  # tokens of a window
    stride: int | None  # tokens from one window to the next; None when the state was carried
    models: list[ModelResult]  # the first is the one the others are compared with
    environment: dict[str, Any]
    eos: bool = True  # whether the end of a document is a target

    @property
    def same_tokenizers(self) -> bool:
        return all(model.same_tokenizer for model in self.models)


def compare_checkpoints(
    checkpoints: Sequence[Checkpoint],
    text: EvaluationText,
    *,
    context: int | None = None,
    stride: int | None = None,
    batch_size: int | None = None,
    carry_state: bool = False,
    eos: bool = True,
    speed_contexts: Sequence[int] = (),
    speed_limit_s: float | None = None,
) -> Comparison:
    """Score all checkpoints on a text and measure how fast they decode.

    Args:
        checkpoints: At least two; the others are compared with the first.
        context: Tokens of a window; the first model's training window when None, at most
            ``MOST_CONTEXT``.
        stride, batch_size, carry_state, eos: See ``score_documents``.
        speed_contexts: Lengths after which decoding is measured; none when empty.
        speed_limit_s: Seconds of reading one; a model that would take longer, or for which the
            machine has no memory, is stopped there. None: it reads all of them.

    Raises:
        UserError: See ``score_documents``; or no document is as long as the context asked for;
            or the machine cannot hold a length to measure after; or a loss is not finite.
    """
    if text.are_conversations and not eos:
        raise UserError(
            "--no-eos has no effect on conversations, in which answers are scored with the marker "
            "that ends each: leave it out"
        )
    window = default_context(checkpoints[0]) if context is None else context
    names = short_names([checkpoint.path for checkpoint in checkpoints])
    longest = max(speed_contexts, default=0)
    for checkpoint in checkpoints:
        check_windows(checkpoint.model, window, stride, carry_state)
        if text.are_conversations:
            _check_chat(checkpoint)
        elif eos:
            check_end(checkpoint.tokenizer, str(checkpoint.path))
        if longest and speed_limit_s is None:
            check_fits(checkpoint.model, longest, 1, f"--contexts ({longest:,}) needs")
        elif carry_state:
            check_state_fits(checkpoint.model, 1, checkpoint.model.device)
    scores = []
    for name, checkpoint in zip(names, checkpoints, strict=True):
        own = score_documents(
            checkpoint.model,
            checkpoint.tokenizer,
            text.documents,
            context=window,
            stride=stride,
            batch_size=batch_size,
            carry_state=carry_state,
            eos=eos,
            progress=f"scoring {name}",
        )
        if not np.isfinite(own.nll).all():
            raise UserError(
                f"checkpoint ({checkpoint.path}) gives a loss that is not finite: its weights are "
                "damaged or of a run that diverged, so take another one"
            )
        longest_text = own.targets.max() if not text.are_conversations else context or 0
        if context is not None and context > longest_text and not carry_state:
            raise UserError(
                f"--context ({context}) is longer than the text, whose longest document gives "
                f"{name} {own.targets.max():,} tokens: take at most that"
            )
        logger.info("%s: %s tokens scored", name, f"{own.targets.sum():,}")
        scores.append(own)
    speeds: list[list[DecodeSpeed]] = [[] for _ in checkpoints]
    if speed_contexts:
        models = [checkpoint.model for checkpoint in checkpoints]
        speeds = decode_speed(
            models, speed_contexts, limit_s=speed_limit_s, progress="measuring speed"
        )
        logger.info("decoding measured after %s tokens", " and ".join(map(str, speed_contexts)))
    return Comparison(
        text=text,
        context=window,
        stride=None if carry_state else stride or window,
        models=[
            _result(
                name, checkpoint, own, speed, checkpoints[0], scores[0], chat=text.are_conversations
            )
            for name, checkpoint, own, speed in zip(names, checkpoints, scores, speeds, strict=True)
        ],
        environment=describe_environment(checkpoints[0].model.device),
        eos=eos,
    )


def _check_chat(checkpoint: Checkpoint) -> None:
    """Raise a ``UserError`` where a checkpoint has no template for the conversations."""
    try:
        ChatFormat(checkpoint.tokenizer).check()
    except UserError as error:
        raise UserError(
            f"checkpoint ({checkpoint.path}): {error}, and the text to compare on is "
            "conversations: leave the model out, or name a text with --text"
        ) from error


def default_context(checkpoint: Checkpoint) -> int:
    """The tokens of a window that nobody asked for: those that a model was trained on.

    At most ``MOST_CONTEXT`` for others' models, and so many where they do not say.
    """
    trained: int | None = checkpoint.model.config.max_position_embeddings
    if not isinstance(checkpoint.model, ForeignModel) and trained is not None:
        return trained
    return min(trained or MOST_CONTEXT, MOST_CONTEXT)


def _result(
    name: str,
    checkpoint: Checkpoint,
    scores: DocumentScores,
    speed: list[DecodeSpeed],
    first: Checkpoint,
    first_scores: DocumentScores,
    *,
    chat: bool,
) -> ModelResult:
    same_tokenizer = identity(checkpoint.tokenizer) == identity(first.tokenizer)
    if chat:  # whose tokens are by the template too
        template = checkpoint.tokenizer.chat_template
        same_tokenizer = same_tokenizer and template == first.tokenizer.chat_template
    nats = bits = None
    if scores is not first_scores:
        bits = to_bits(paired_bootstrap(first_scores.nll, scores.nll, scores.bytes))
        if same_tokenizer:
            nats = paired_bootstrap(first_scores.nll, scores.nll, scores.targets)
    return ModelResult(
        name=name,
        path=checkpoint.path,
        mixer=checkpoint.mixer,
        dtype=_types(checkpoint.model),
        trained_in=trained_in(checkpoint.path),
        parameters=checkpoint.model.num_parameters(),
        scores=scores,
        same_tokenizer=same_tokenizer,
        nats_difference=nats,
        bits_difference=bits,
        speed=speed,
        begins=beginning(checkpoint.tokenizer),
        begins_with_eos=checkpoint.tokenizer.bos_token_id == checkpoint.tokenizer.eos_token_id,
        base=checkpoint.base,
    )


def _types(model: DecoderForCausalLM) -> str:
    """What a model computes in, and how its weights are stored if not so."""
    weights = quantised_format(model)
    return str(model.dtype).removeprefix("torch.") + (f" with {weights} weights" if weights else "")


def short_names(paths: Sequence[Path]) -> list[str]:
    """The ends of the paths that tell them apart, "tiny-retention"; of the Hub's cache the name."""
    hub = {path: name for path in paths if (name := hub_name(path))}
    if hub:
        own = iter(short_names([path for path in paths if path not in hub]))
        return [hub[path] if path in hub else next(own) for path in paths]
    if not paths:
        return []
    full = [path.absolute().parts for path in paths]
    runs = [own[:-1] if own[-1] == "final" else own for own in full]  # the run says enough
    parts = runs if len(set(runs)) == len(runs) else full
    shared = min(len(own) for own in parts) - 1
    start = next((i for i in range(shared) if len({own[i] for own in parts}) > 1), shared)
    return [in_one_line("/".join(own[start:])) for own in parts]


def describe_environment(device: torch.device) -> dict[str, Any]:
    """What the figures depend on beside the models."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "processor": _processor(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    """The processor's name; the standard library knows it on few systems."""
    table = Path("/proc/cpuinfo")
    lines = table.read_text(encoding="utf-8").splitlines() if table.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
