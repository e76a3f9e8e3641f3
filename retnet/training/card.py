"""The model card of a finished run: what is told of a model where it is published.

It is the README.md of the run's final/, and meant to be edited. Names come from people, so nothing
in them may mean something to YAML, Markdown or HTML; of paths the last part alone is told.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from retnet.data import PreparedData, TokenFile
from retnet.data.spec import BPE, BYTES, PYTHON_STDLIB
from retnet.model.causal_lm import DecoderForCausalLM
from retnet.terminal import harmless, in_one_line
from retnet.training.spec import Config

SIGNS = re.compile(r"([\\`*_{}\[\]<>#|~$&@])")  # what Markdown, HTML or the Hub may read
LOCAL_TEXT = "text"  # stands for a data set's name on the Hub where there is none
NEW_TOKENS = 50  # of the examples
DIGITS = 4
FIGURES = {"val/perplexity": "perplexity", "val/bits_per_byte": "bits per byte"}

CARD = """---
{header}
# license: name the one that you give it, as the Hub lists them (mit, apache-2.0, ...)
---

# {name}

A language model that continues text. This card was written at the end of the training run; edit it.

| | |
|---|---|
{table}

{figures}

## How to generate

{examples}

## Limits

{limits}
"""

CONVENTIONS = """\
Perplexity is exp of the mean negative log-likelihood of a token (nats), over {tokens} of the text
held back, in windows of {seq_len:,} tokens that do not overlap; {state}.
It depends on the tokenizer. Bits per byte does not: all nats, in bits, divided by the bytes of that
text. Both count the end of each document as a token, and no target across documents."""

PLAIN = """\
With transformers alone. `trust_remote_code=True` runs the code in this folder (of the RetNet
developers, MIT License), so read it first:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

name = "."  # this folder, or its name on the Hub
model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
prompt = tokenizer("The ", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, do_sample=True, max_new_tokens={new})[0]))
```

"""

OURS = """\
With the repository that trained it:

```bash
python generate.py FOLDER --prompt "The " --max-new-tokens {new}
```"""


@dataclass(frozen=True)
class Trained:
    """How far a run has come."""

    step: int
    global_batch: int  # rows of a step
    epochs: float
    evaluation: dict[str, Any] | None  # the metrics of the last one, with its step

    def figures(self) -> Iterator[tuple[str, str, float]]:
        """What was measured on the text held back: metric, what it is called, value."""
        for metric, name in FIGURES.items():
            value = (self.evaluation or {}).get(metric)
            if isinstance(value, float) and math.isfinite(value):
                yield metric.partition("/")[2], name, value


def model_card(
    config: Config, model: DecoderForCausalLM, data: PreparedData, trained: Trained, *, code: bool
) -> str:
    """The card as text; ``code``: the model's code lies beside it."""
    longest = model.config.longest
    new = NEW_TOKENS if longest is None else min(NEW_TOKENS, longest // 2)
    rows = _rows(config, model, data, trained)
    return CARD.format(
        header=_metadata(config, data, trained).to_yaml(),
        name=plain(_name(config)),
        table="\n".join(f"| {name} | {value} |" for name, value in rows),
        figures=_conventions(config, data) if [*trained.figures()] else "It was not evaluated.",
        examples=(PLAIN * code + OURS).format(new=new),
        limits="\n".join(f"- {line}" for line in _limits(config, longest)),
    )


def plain(text: str) -> str:
    """A name as Markdown that shows it as it is, in one line."""
    return SIGNS.sub(r"\\\1", _in_one_line(text))


def _in_one_line(text: str) -> str:
    """A name without control characters and halves of characters."""
    return harmless(in_one_line(text)).encode(errors="replace").decode()


def _name(config: Config) -> str:
    return config.train.run_folder.resolve().name or "model"


def _metadata(config: Config, data: PreparedData, trained: Trained) -> ModelCardData:
    """What the Hub reads; the license is whoever publishes the model to choose."""
    source = data.record["source"]
    held_back = data.record["validation_source"] or source
    names = [part["location"] for part in (source, held_back) if _is_on_hub(part)]
    set_name = held_back["location"] if _is_on_hub(held_back) else LOCAL_TEXT
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=set_name,
            dataset_name=_in_one_line(_title(held_back)),
            dataset_config=held_back.get("hub_config") if _is_on_hub(held_back) else None,
            dataset_split="validation",
            metric_type=metric,
            metric_name=f"{name} (windows of {config.data.seq_len} tokens)",
            metric_value=round(value, DIGITS),
        )
        for metric, name, value in trained.figures()
    ]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["retnet"],
        datasets=list(dict.fromkeys(names)) or None,
        model_name=_in_one_line(_name(config)),
        eval_results=results or None,
    )


def _rows(
    config: Config, model: DecoderForCausalLM, data: PreparedData, trained: Trained
) -> Iterator[tuple[str, str]]:
    network, spec, record = model.config, config.train, data.record
    yield (
        "model",
        f"{type(model).__name__} with mixer {plain(config.model.mixer)}: "
        f"{model.num_parameters():,} parameters, {network.num_hidden_layers} blocks of width "
        f"{network.hidden_size}",
    )
    yield "trained on", f"{plain(_title(record['source']))}: {_amount(data.train)}"
    held_back = record["validation_source"]
    of_what = plain(_title(held_back)) if held_back else "a part of the same text"
    yield "held back", f"{of_what}: {_amount(data.validation)}"
    tokenizer = {BYTES: "bytes", BPE: "byte-level BPE, trained on the training text"}.get(
        record["tokenizer"], plain(_last_part(record["tokenizer"]))
    )
    yield "tokenizer", f"{tokenizer}; {len(data.tokenizer):,} entries"
    per_step = trained.global_batch * config.data.seq_len
    begun = ", on the weights of another checkpoint" if config.model.init_from else ""
    yield (
        "training",
        f"{trained.step:,} steps of {per_step:,} tokens{begun}: {trained.step * per_step:,} "
        f"tokens, {trained.epochs:.2f} times the text; {spec.optimizer}, peak learning rate "
        f"{spec.peak:g}, {spec.precision}",
    )
    for _, name, value in trained.figures():
        after = (trained.evaluation or {})["step"]
        yield f"validation {name} after step {after:,}", f"{value:.{DIGITS}g}"


def _conventions(config: Config, data: PreparedData) -> str:
    """What the figures are."""
    most, whole = config.train.eval_max_tokens, data.validation.num_tokens
    part = most is not None and most < whole
    state = "each begins with an empty state"
    if config.train.carry_state:
        state = "each begins with the state that the one before in its document ended with"
    elif not config.data.reset_state_at_documents:
        state += ", and documents in a window are not kept apart"
    return CONVENTIONS.format(
        tokens=f"the first {most:,} tokens" if part else f"all {whole:,} tokens",
        seq_len=config.data.seq_len,
        state=state,
    )


def _limits(config: Config, longest: int | None) -> Iterator[str]:
    yield (
        "It continues text as its training text goes on. It follows no instructions, what it says "
        "may be false or offensive, and it may repeat passages that it was trained on."
    )
    yield "The figures hold for text like the one held back, and were not measured on any other."
    carried = " with a carried state" if config.train.carry_state else ""
    yield (
        f"It was trained on windows of {config.data.seq_len:,} tokens{carried}: what it makes of "
        "longer texts was not measured."
    )
    if longest is not None:
        yield f"It is defined for texts of up to {longest:,} tokens, the prompt included."


def _amount(side: TokenFile) -> str:
    return f"{side.num_documents:,} documents, {side.num_tokens:,} tokens"


def _is_on_hub(source: dict[str, Any]) -> bool:
    """Whether a data set has its name there; a local folder may be laid out like one."""
    return source["kind"] == "hub" and source["revision"] is not None


def _title(source: dict[str, Any]) -> str:
    """What a source is called, without the way to it on this machine."""
    if source["kind"] == PYTHON_STDLIB:
        return f"the standard library of Python {source['python']}"
    name = source["location"]
    if not _is_on_hub(source):
        return f"local files ({_last_part(name)})"
    parts = [f"configuration {source['hub_config']}"] if source["hub_config"] else []
    return ", ".join([name, *parts, f"split {source['split']}", f"revision {source['revision']}"])


def _last_part(path: str) -> str:
    """The name at the end of a path, and of a name on the Hub all of it."""
    absolute = Path(path).expanduser()
    on_hub = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) and not absolute.exists()
    return path if on_hub else absolute.name
