"""Training on conversations: resumed to the bit, from a model of texts, and what is made of it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from retnet import cli
from retnet.checkpoints import load_checkpoint
from retnet.commands import compare, train
from retnet.data.messages import Conversation
from retnet.data.split import document_hash
from retnet.evaluation import metrics, score_documents, validation_text
from tests.conversations import END, START, rows, turns, write_rows
from tests.training.conftest import as_options, tiny_options


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows, and a finished run of them."""
    folder = tmp_path_factory.mktemp("chats")
    write_rows(folder / "rows.jsonl")
    assert run(folder, "run") == 0
    return folder


def run(folder: Path, name: str, **options: object) -> int:
    own = {"data.source": folder / "rows.jsonl", "data.format": "messages"}
    own |= {"train.out_dir": folder / name} | {k.replace("__", "."): v for k, v in options.items()}
    words = [*tiny_options(folder / "rows.jsonl", folder), *as_options(own)]
    words = list({word.partition("=")[0]: word for word in words}.values())
    return cli.run(train.main, ["configs/tiny.yaml", *words])


def losses(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if "perf" not in k} for x in lines]


def test_a_checkpoint_knows_how_to_talk(chats: Path) -> None:
    final = chats / "run/final"
    model = AutoModelForCausalLM.from_pretrained(final)
    tokenizer = AutoTokenizer.from_pretrained(final)
    assert model.generation_config.eos_token_id == [257, END]
    text = tokenizer.apply_chat_template(turns("a", "b"), tokenize=False)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert ids.count(START) == ids.count(END) == 2
    record = json.loads((final / "data.json").read_text())
    assert record["source"]["format"] == "messages" and "chat_template_sha256" in record


def test_figures_are_of_the_answers(chats: Path) -> None:
    """All answers of the validation conversations, each token with its document before it."""
    final = chats / "run/final"
    model = AutoModelForCausalLM.from_pretrained(final).eval()
    tokenizer = AutoTokenizer.from_pretrained(final)
    record = json.loads((final / "data.json").read_text())
    threshold = int(record["split"]["threshold"], 16)
    every = [Conversation.of(row["messages"], "") for row in rows()]
    held_back = [own for own in every if document_hash(own.encode()) < threshold]
    nll, targets, size = 0.0, 0, 0
    for own in held_back:
        out = tokenizer.apply_chat_template(
            own.messages, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, said = torch.tensor([out["input_ids"]]), torch.tensor(out["assistant_masks"])[1:] == 1
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        each = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        nll, targets = nll + each[said].sum().item(), targets + int(said.sum())
        size += sum(len(answer.encode()) for answer in own.answers)
    checkpoint = load_checkpoint(final)
    documents = validation_text([checkpoint]).documents
    scores = score_documents(checkpoint.model, checkpoint.tokenizer, documents, context=10_000)
    assert scores.targets.sum() == targets == validation_targets(final)
    assert scores.nats_per_token == pytest.approx(nll / targets, rel=1e-5)
    assert scores.bits_per_byte == pytest.approx(metrics.bits_per_byte(nll, size), rel=1e-5)
    carried = score_documents(
        checkpoint.model, checkpoint.tokenizer, documents, context=7, carry_state=True
    )
    assert carried.nll.sum() == pytest.approx(nll, rel=1e-5)
    assert (carried.targets == scores.targets).all()


def validation_targets(final: Path) -> int:
    """As the run counted them: what its manifest's bounds hold."""
    (file,) = (final.parent.parent / "cache").glob("rows*/validation/answer_bounds.npy")
    return int(np.diff(np.load(file))[::2].sum())


@pytest.mark.slow
@pytest.mark.parametrize("carry", [False, True])
def test_a_run_that_goes_on_is_the_run_that_was_never_interrupted(
    chats: Path, tmp_path: Path, carry: bool
) -> None:
    options = {"train__carry_state": carry, "train__schedule": "constant", "train__max_steps": 4}
    options |= {"train__sample_tokens": 0, "train__eval_every": 4}
    write_rows(tmp_path / "rows.jsonl")
    assert run(tmp_path, "whole", **options) == 0
    assert run(tmp_path, "parts", **options | {"train__max_steps": 2}) == 0
    assert run(tmp_path, "parts", **options) == 0
    one, other = (load_file(tmp_path / x / "final/model.safetensors") for x in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert losses(tmp_path / "whole")[-1] == losses(tmp_path / "parts")[-1]


@pytest.mark.slow
def test_another_template_does_not_go_on(chats: Path, tmp_path: Path, capsys) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chats / "run/final")
    tokenizer.save_pretrained(tmp_path / "t")
    write_rows(tmp_path / "rows.jsonl")
    options = {"data__tokenizer": tmp_path / "t", "train__max_steps": 2}
    assert run(tmp_path, "run", **options) == 0
    template = tmp_path / "t/chat_template.jinja"
    template.write_text(template.read_text().replace("{{- bos_token -}}", ""))
    assert run(tmp_path, "run", **options | {"train__max_steps": 4}) == 2
    assert "is not the tokenizer that checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_model_of_texts_is_taken_on(whole: Path, tmp_path: Path, tied: bool) -> None:
    """Its tokenizer gets the markers, its embedding the rows for them; the others stay."""
    base, options = whole / "final", {"model__tie_word_embeddings": tied, "train__max_steps": 1}
    options |= {"train__sample_tokens": 0, "train__warmup_steps": 0}
    if not tied:
        source = json.loads((base / "data.json").read_text())["source"]["location"]
        texts = {"data__source": source, "data__format": "text"}
        assert run(tmp_path, "base", **options, **texts) == 0
        base = tmp_path / "base/final"
    write_rows(tmp_path / "rows.jsonl")
    options |= {"model__init_from": base, "train__learning_rate": 1e-9}
    assert run(tmp_path, "own", **options, data__tokenizer=base) == 0
    old, new = (load_file(x / "model.safetensors") for x in (base, tmp_path / "own/final"))
    names = {"model.embed_tokens.weight"} | ({"lm_head.weight"} & old.keys())
    assert len(names) == 2 - tied
    for name in old:
        known = len(old[name])
        assert len(new[name]) == known + 2 * (name in names)
        assert torch.allclose(new[name][:known], old[name], atol=1e-6)
        added = new[name][known:]
        assert name not in names or (added.isfinite().all() and not torch.equal(*added))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "own/final")
    assert tokenizer("<|im_end|>", add_special_tokens=False).input_ids == [END]
    assert run(tmp_path, "bad", **options, data__tokenizer="bpe", data__vocab_size=300) == 2


def test_comparing_says_what_it_scores(chats: Path, tmp_path: Path, capsys, whole: Path) -> None:
    def compared(*words: str) -> tuple[int, str, str]:
        return cli.run(compare.main, [*words, "--no-speed"]), *capsys.readouterr()

    both = [str(chats / "run"), str(chats / "run/best")]
    code, out, _ = compared(*both, "--json", str(tmp_path / "out.json"))
    assert code == 0 and "validation conversations of" in " ".join(out.split())
    assert "What the assistant says, and the marker that ends each answer" in " ".join(out.split())
    content = json.loads((tmp_path / "out.json").read_text())
    last = losses(chats / "run")[-1]
    assert content["text"]["targets"] == "answers"
    first = content["models"][0]
    assert first["bits_per_byte"] == pytest.approx(last["val/bits_per_byte"], rel=0.1)
    for words, answer in (
        ([*both, "--no-eos"], "--no-eos has no effect on conversations"),
        (
            [*both, "--report", str(tmp_path / "r")],
            "is made of texts, and validation conversations",
        ),
        ([both[0], str(whole)], "was validated on other data"),
    ):
        code, out, err = compared(*words)
        assert (code, out) == (2, "") and answer in err and not (tmp_path / "r").exists()
    code, out, _ = compared(*both, "--text", str(chats / "rows.jsonl"), "--text-field", "n")
    assert code == 2  # numbers are no text
    (tmp_path / "a.txt").write_text("some text to score")
    code, out, _ = compared(*both, "--text", str(tmp_path / "a.txt"))
    assert code == 0 and "All tokens after <bos>" in out


def test_evaluating_on_too_little_is_refused(chats: Path, capsys) -> None:
    assert run(chats, "short", train__eval_max_tokens=5) == 2
    assert "train.eval_max_tokens (5) ends before the first answer" in capsys.readouterr().err
    assert not (chats / "short").exists()


def test_the_sample_is_an_answer(chats: Path, capsys) -> None:
    options = {"train__max_steps": 1, "train__warmup_steps": 0, "train__sample_prompt": "who?"}
    assert run(chats, "sample", **options) == 0
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("  |")]
    assert lines[0] == "  | who?" and len(lines) > 1


@pytest.mark.slow
def test_others_train_on_the_markers_too(chats: Path, tmp_path: Path) -> None:
    """trl's trainer, with the loss on what the assistant says: it was on nothing but letters."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    config = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[],
        assistant_only_loss=True, use_cpu=True, save_strategy="no",
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        AutoModelForCausalLM.from_pretrained(chats / "run/final"),
        args=config,
        train_dataset=Dataset.from_list([{"messages": row["messages"]} for row in rows(6)]),
        processing_class=AutoTokenizer.from_pretrained(chats / "run/final"),
    )
    for row, own in zip(rows(6), trainer.train_dataset, strict=True):
        messages = row["messages"]
        assert own["input_ids"].count(START) == own["input_ids"].count(END) == len(messages)
        expected = trainer.processing_class.apply_chat_template(messages, return_dict=False)
        assert own["input_ids"] == expected
        said = sum(label != -100 for label in own["labels"])
        assert said == sum(
            len(x["content"].encode()) + 1 for x in messages if x["role"] == "assistant"
        )
    trainer.train()
