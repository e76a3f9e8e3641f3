"""transformers' Trainer, TRL and PEFT train our models as they train their own."""

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments, set_seed

from retnet.model.outputs import MEMORY
from tests.model.conftest import PAD, make_model, random_ids

LENGTHS = (12, 5, 9, 12, 3, 7, 12, 4)


def arguments(folder, **values) -> TrainingArguments:
    return TrainingArguments(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": 2,
            "max_steps": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "report_to": [],
            "use_cpu": True,
            "save_strategy": "no",
            "disable_tqdm": True,
            "max_grad_norm": 0.0,
        }
        | values
    )


def ragged() -> list[dict]:
    """Texts of several lengths: the number of targets differs between micro-batches."""
    return [{"input_ids": random_ids(1, n, seed=n + i)[0]} for i, n in enumerate(LENGTHS)]


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Right padding, labels -100 at it."""
    ids = [row["input_ids"] for row in rows]
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(ids, batch_first=True, padding_value=PAD),
        "attention_mask": pad([torch.ones_like(x) for x in ids], batch_first=True),
        "labels": pad(ids, batch_first=True, padding_value=-100),
    }


def trained(mixer: str, folder, collator=collate, rows=None, **values):
    """The trainer after its run."""
    set_seed(0)
    model = make_model(mixer, torch.float32)
    trainer = Trainer(
        model=model,
        args=arguments(folder, **values),
        train_dataset=rows or ragged(),
        eval_dataset=rows or ragged(),
        data_collator=collator,
    )
    trainer.train()
    return trainer


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.slow
def test_trainer_with_accumulation_is_trainer_with_the_large_batch(
    mixer: str, tmp_path, checkpointing: bool
) -> None:
    """num_items_in_batch: the mean over all targets of a step, not the mean of means."""
    large = trained(mixer, tmp_path, per_device_train_batch_size=4)
    parts = trained(
        mixer,
        tmp_path,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        gradient_checkpointing=checkpointing,
    )
    assert losses(parts) == pytest.approx(losses(large), abs=2e-4)
    for a, b in zip(parts.model.parameters(), large.model.parameters(), strict=True):
        # Adam turns rounding into steps where a gradient is nearly 0: most must agree
        assert ((a - b).abs() < 1e-4).float().mean() > 0.99
    assert losses(large)[-1] < losses(large)[0]


def test_trainer_evaluates_and_saves(mixer: str, tmp_path) -> None:
    trainer = trained(mixer, tmp_path, save_strategy="steps", save_steps=1)
    assert trainer.evaluate()["eval_loss"] > 0
    prediction = trainer.predict(ragged()[:1])
    assert prediction.predictions.shape == (1, LENGTHS[0], trainer.model.config.vocab_size)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert type(trainer.model).from_pretrained(tmp_path / "checkpoint-2").num_parameters() > 0


def test_flattened_batches_are_separate_documents(mixer: str, tmp_path) -> None:
    """transformers' packing collator: one row, position_ids that fall back at each document."""
    model = make_model(mixer)
    rows = [{"input_ids": row["input_ids"].tolist()} for row in ragged()]
    for options in ({}, {"return_flash_attn_kwargs": True, "return_seq_idx": True}):
        collator = DataCollatorWithFlattening(return_tensors="pt", **options)
        batch = collator(rows[:4])
        alone = [model(torch.tensor([row["input_ids"]])).logits for row in rows[:4]]
        out = model(**batch)
        assert (out.logits - torch.cat(alone, dim=1)).abs().max() < 1e-10
        padded = model(**collate(ragged()[:4]))
        assert out.loss.item() == pytest.approx(padded.loss.item(), abs=1e-10)
    packed = trained(mixer, tmp_path, collator=collator, rows=rows)
    assert losses(packed)[0] == pytest.approx(losses(trained(mixer, tmp_path))[0], abs=2e-4)


@pytest.mark.parametrize("merged", [pytest.param(False, marks=pytest.mark.slow), True])
def test_lora(mixer: str, tmp_path, merged: bool) -> None:
    """PEFT: adapters train, nothing else moves; generation and saving go through them."""
    peft = pytest.importorskip("peft")
    model = make_model(mixer, torch.float32)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    ids = random_ids(2, 9)
    plain = model(ids).logits
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]
    config = peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    assert torch.equal(adapted(input_ids=ids).logits, plain)
    trainer = Trainer(
        model=adapted,
        args=arguments(tmp_path, gradient_checkpointing=True),
        train_dataset=ragged(),
        data_collator=collate,
    )
    trainer.train()
    weights = dict(adapted.get_base_model().named_parameters())
    for name, weight in weights.items():
        if "lora" not in name:
            assert torch.equal(weight, before[name.replace(".base_layer", "")])
    adapted.eval()
    expected = adapted(input_ids=ids).logits
    assert (expected - plain).abs().max() > 1e-3
    if merged:
        loaded = adapted.merge_and_unload()
    else:
        adapted.save_pretrained(tmp_path / "adapter")
        loaded = peft.PeftModel.from_pretrained(
            make_model(mixer, torch.float32), tmp_path / "adapter"
        ).eval()
    assert torch.allclose(loaded(input_ids=ids).logits, expected, atol=1e-5)
    text = loaded.generate(input_ids=ids, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert text.shape == (2, 14)


def test_prompt_tuning(mixer: str) -> None:
    """PEFT puts learned embeddings before the text: inputs_embeds, and a longer mask and labels."""
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    adapted = peft.get_peft_model(make_model(mixer, torch.float32), config).eval()
    batch = collate([{"input_ids": random_ids(1, n)[0]} for n in (9, 9)])
    out = adapted(**batch)
    assert out.logits.shape[:2] == (2, 12)
    out.loss.backward()
    assert adapted.prompt_encoder["default"].embedding.weight.grad.abs().max() > 0
    batch.pop("labels")
    text = adapted.generate(**batch, max_new_tokens=5, do_sample=False, eos_token_id=None)
    if MEMORY != "past_key_values":
        return  # PEFT knows it by that name only, and would put its embeddings before each token
    for length in range(9, 14):
        uncached = adapted(input_ids=text[:, :length]).logits[:, -1].argmax(-1)
        assert torch.equal(text[:, length], uncached)


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
def test_trl(mixer: str, tmp_path, packing: bool) -> None:
    trl = pytest.importorskip("trl")
    from retnet.data import load_tokenizer

    tokenizer = load_tokenizer("bytes")
    model = make_model(mixer, torch.float32, vocab_size=len(tokenizer))
    config = trl.SFTConfig(
        **arguments(tmp_path).to_dict()
        | {"max_length": 16, "packing": packing, "padding_free": False, "bf16": False}
    )
    texts = Dataset.from_dict({"text": [f"def f{i}(): return {i}" * (i % 3 + 1) for i in range(9)]})
    trainer = trl.SFTTrainer(
        model=model, args=config, train_dataset=texts, processing_class=tokenizer
    )
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(history) == 2
    assert history[-1]["loss"] > 0


def test_label_smoothing_shifts_the_labels(mixer: str, tmp_path) -> None:
    """The Trainer makes that loss itself; close to no smoothing it is the model's own."""
    plain = losses(trained(mixer, tmp_path))
    smoothed = losses(trained(mixer, tmp_path, label_smoothing_factor=1e-6))
    assert smoothed == pytest.approx(plain, abs=1e-3)
