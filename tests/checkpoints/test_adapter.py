"""Adapters of PEFT are merged into their base: what comes out is what PEFT computes."""

import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from retnet.checkpoints import find_checkpoint, load_checkpoint
from retnet.checkpoints.adapter import MERGED
from retnet.errors import UserError
from retnet.model.fast_decode.step import make_decode_step
from retnet.model.mixers import MIXERS
from tests.checkpoints.folders import Bomb, change_config
from tests.generation.builders import byte_tokenizer, save_checkpoint, tiny_model

peft = pytest.importorskip("peft")

TARGETS = ["q_proj", "o_proj", "up_proj"]
IDS = torch.arange(9)[None]
KINDS: dict[str, Any] = {
    "LORA": peft.LoraConfig(r=2, target_modules=TARGETS),
    "ADALORA": peft.AdaLoraConfig(init_r=3, target_modules=TARGETS, total_step=10),
    "LOHA": peft.LoHaConfig(r=2, target_modules=TARGETS),
    "LOKR": peft.LoKrConfig(r=2, target_modules=TARGETS),
    "IA3": peft.IA3Config(target_modules=TARGETS, feedforward_modules=["up_proj"]),
    "OFT": peft.OFTConfig(target_modules=TARGETS, oft_block_size=4),
    "HRA": peft.HRAConfig(r=2, target_modules=TARGETS),
    "VERA": peft.VeraConfig(r=2, target_modules=["q_proj"]),
    "FOURIERFT": peft.FourierFTConfig(n_frequency=10, target_modules=TARGETS),
    "LN_TUNING": peft.LNTuningConfig(target_modules=["norm"]),
    "TRAINABLE_TOKENS": peft.TrainableTokensConfig(
        target_modules=["embed_tokens"], token_indices=[3, 4]
    ),
    "all linear": peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
    "dora": peft.LoraConfig(r=2, target_modules=TARGETS, use_dora=True),
    "ranks": peft.LoraConfig(
        r=2, target_modules=TARGETS, use_rslora=True, rank_pattern={"q_proj": 3}
    ),
    "pissa": peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights="pissa"),
    "embedding": peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]),
    "output": peft.LoraConfig(r=2, target_modules=["lm_head", "q_proj"]),
    "whole": peft.LoraConfig(r=2, target_modules=TARGETS, modules_to_save=["embed_tokens", "norm"]),
    "tokens": peft.LoraConfig(r=2, target_modules=TARGETS, trainable_token_indices=[3, 4]),
}

QUICK = (("LORA", False), ("pissa", False), ("whole", True), ("output", True))


def save_adapter(folder: Path, base: Path, kind: str = "LORA", **changes: Any) -> torch.Tensor:
    """An adapter that does something, in a folder; returns the logits of PEFT's own model."""
    model = load_checkpoint(base).model
    model.name_or_path = ""
    adapted = peft.get_peft_model(model, KINDS[kind]).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) / 3
    adapted.save_pretrained(folder)
    change_adapter(folder, **changes)
    return adapted(IDS).logits


def change_adapter(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("base") / "final", record={"key": 1})


@pytest.fixture(scope="module")
def made(base: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "adapter"
    save_adapter(folder, base)
    return folder


@pytest.fixture
def adapter(made: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(made, tmp_path / "adapter"))


@pytest.mark.parametrize(
    ("kind", "tied"),
    [
        pytest.param(kind, tied, marks=() if (kind, tied) in QUICK else pytest.mark.slow)
        for kind in KINDS
        for tied in (False, True)
    ],
)
def test_merged_it_computes_what_peft_computes(kind: str, tied: bool, tmp_path: Path) -> None:
    base, adapter = save_checkpoint(tmp_path / "base"), tmp_path / "adapter"
    if tied:
        model = tiny_model("retention", dtype=torch.float32)
        model.config.tie_word_embeddings = True
        model.tie_weights()
        model.save_pretrained(base)
    expected = save_adapter(adapter, base, kind)
    plain = load_checkpoint(base).model(IDS).logits
    assert (expected - plain).abs().max() > 0.1
    found = load_checkpoint(adapter, base=base)
    assert (found.path, found.base) == (adapter, base)
    torch.testing.assert_close(found.model(IDS).logits, expected, atol=2e-4, rtol=1e-4)
    assert all(p.requires_grad for p in found.model.parameters())
    step, reason = make_decode_step(found.model)
    assert step is not None, reason
    found.model.save_pretrained(tmp_path / "merged")
    byte_tokenizer().save_pretrained(tmp_path / "merged")
    again = load_checkpoint(tmp_path / "merged").model
    assert torch.equal(again(IDS).logits, found.model(IDS).logits)


def test_every_kind_that_is_merged_is_tried() -> None:
    assert set(MERGED) <= set(KINDS)


@pytest.mark.slow
@pytest.mark.parametrize("mixer", MIXERS)
def test_other_mixers(mixer: str, tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base", mixer)
    expected = save_adapter(tmp_path / "adapter", base, "all linear")
    found = load_checkpoint(tmp_path / "adapter", base=base)
    torch.testing.assert_close(found.model(IDS).logits, expected, atol=2e-4, rtol=1e-4)


def test_the_type_is_the_bases(base: Path, adapter: Path) -> None:
    """In float64 the sum is made in float64; saved whole layers come back to the base's type."""
    exact = load_checkpoint(adapter, base=base, dtype=torch.float64).model
    name = "layers.0.mixer.q_proj"
    stored = load_file(adapter / "adapter_model.safetensors")
    a, b = (
        stored[f"base_model.model.model.{name}.lora_{part}.weight"].double() for part in ("A", "B")
    )
    weight = load_file(base / "model.safetensors")[f"model.{name}.weight"].double()
    scale = KINDS["LORA"].lora_alpha / 2
    torch.testing.assert_close(
        exact.model.get_submodule(name).weight.detach(), weight + scale * b @ a, atol=1e-14, rtol=0
    )
    narrow = load_checkpoint(adapter, base=base, dtype=torch.bfloat16).model
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}


def test_the_base_that_it_names(base: Path, tmp_path: Path, monkeypatch, caplog) -> None:
    """A whole path, a path from the working directory, and one from its own folder, in this order.

    The line says which; a base that is named by hand is taken before.
    """
    caplog.set_level(logging.INFO, "retnet")
    monkeypatch.chdir(tmp_path)
    adapter = tmp_path / "deep/adapter"
    expected = save_adapter(adapter, base, base_model_name_or_path=str(base))
    near, other = tmp_path / "deep/adapter/near", tmp_path / "near"
    shutil.copytree(base, near)
    said = []
    for name, place, why in (
        (str(base), base, ""),
        ("near", near, ", from its own folder"),
        ("near", Path("near"), ", from the working directory"),
    ):
        change_adapter(adapter, base_model_name_or_path=name)
        found = load_checkpoint(adapter)
        assert found.base == place
        torch.testing.assert_close(found.model(IDS).logits, expected, atol=2e-4, rtol=1e-4)
        said.append(f"adapter {adapter}: merged into {place} (its base_model_name_or_path{why})")
        if place == near:
            shutil.copytree(base, other)
    assert load_checkpoint(adapter, base=base.parent).base == base
    said.append(f"adapter {adapter}: merged into {base} (named by --base)")
    lines = [record.getMessage() for record in caplog.records if record.name[:6] == "retnet"]
    assert lines == said


def test_nothing_is_downloaded_or_unpickled(adapter: Path, base: Path, monkeypatch) -> None:
    import socket

    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network"))
    change_adapter(adapter, base_model_name_or_path="openai-community/gpt2")
    words = r"base \(openai-community/gpt2\) that is no folder here, and nothing is downloaded"
    with pytest.raises(UserError, match=words):
        load_checkpoint(adapter)
    load_checkpoint(adapter, base=base)
    torch.save({"x": Bomb()}, adapter / "adapter_model.bin")
    load_checkpoint(adapter, base=base)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has pickled weights \(adapter_model\.bin\), which"):
        load_checkpoint(adapter, base=base)
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(UserError, match=r"is incomplete, adapter_model\.safetensors is missing"):
        load_checkpoint(adapter, base=base)


def test_tokenizer_and_record_are_its_own_or_the_bases(adapter: Path, base: Path, caplog) -> None:
    assert load_checkpoint(adapter, base=base).data_record["key"] == 1
    merges = (("a", "b"),)
    byte_tokenizer(merges).save_pretrained(adapter)
    with pytest.raises(UserError, match=rf"{adapter}/tokenizer\.json.*id \(259\) is beyond"):
        load_checkpoint(adapter, base=base)
    own = byte_tokenizer()
    own.backend_tokenizer.add_special_tokens(["a"])
    own.chat_template = "{{ messages }}"
    own.save_pretrained(adapter)
    (adapter / "data.json").write_text('{"key": 2}')
    found = load_checkpoint(adapter, base=base)
    assert found.tokenizer.chat_template == "{{ messages }}"
    assert found.data_record == {"key": 2}


def test_a_base_of_another_kind(adapter: Path, base: Path, tmp_path: Path) -> None:
    name = r"base_model\.model\.model\.layers\.0\.ffn\.up_proj\.lora_A\.weight is"
    model = load_checkpoint(base).model
    larger = type(model)(type(model.config)(**{**model.config.to_dict(), "hidden_size": 32}))
    deeper = type(model)(type(model.config)(**{**model.config.to_dict(), "num_hidden_layers": 3}))
    fix = r"name the model that it was trained on by --base CHECKPOINT$"
    for other, words in (
        (larger, rf"is another model: {name} \(2, 16\) there and \(2, 32\) here; {fix}"),
        (deeper, rf"is another model: .*layers\.2\..* is absent there and \(2, 16\) here; {fix}"),
    ):
        other.save_pretrained(tmp_path / "other")
        byte_tokenizer().save_pretrained(tmp_path / "other")
        with pytest.raises(UserError, match=words):
            load_checkpoint(adapter, base=tmp_path / "other")
    aft = save_checkpoint(tmp_path / "aft", "aft")
    save_adapter(tmp_path / "of-rwkv", save_checkpoint(tmp_path / "rwkv", "rwkv"), "all linear")
    change_adapter(tmp_path / "of-rwkv", target_modules=["receptance"])
    with pytest.raises(UserError, match=r"Target modules .*receptance.* not found in the"):
        load_checkpoint(tmp_path / "of-rwkv", base=aft)


def test_a_base_that_there_is_not(adapter: Path, base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--base: checkpoint \(.*/no\) does not exist"):
        load_checkpoint(adapter, base=str(tmp_path / "no"))
    with pytest.raises(UserError, match=r"^--base: checkpoint \(.*/adapter\) is an adapter"):
        load_checkpoint(adapter, base=adapter)
    for nothing in (None, "", 3, ["x"]):
        change_adapter(adapter, base_model_name_or_path=nothing)
        with pytest.raises(UserError, match=r"does not say what it is for: name the model that"):
            load_checkpoint(adapter)
    change_adapter(adapter, base_model_name_or_path="x" * 300)
    with pytest.raises(UserError, match=r"^base_model_name_or_path of .* cannot be reached"):
        load_checkpoint(adapter)
    change_adapter(adapter, base_model_name_or_path=".")
    with pytest.raises(UserError, match=r"^checkpoint \(.*\) (is an adapter|holds no conf)"):
        load_checkpoint(adapter)
    with pytest.raises(UserError, match=rf"^--base \({adapter}\) has no effect, checkpoint"):
        load_checkpoint(base, base=adapter)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"peft_type": "PROMPT_TUNING"},
            r"peft_type \('PROMPT_TUNING'\) is none that becomes",
        ),
        ({"peft_type": None}, r"peft_type \(None\) is none that becomes part"),
        ({"peft_type": ["LORA"]}, r"peft_type \(\['LORA'\]\) is none that becomes part"),
        ({"megatron_config": {"a": 1}, "megatron_core": "os"}, "megatron_config needs code from"),
        ({"r": 3}, r"lora_A\.weight is \(2, 16\) there and \(3, 16\) here; name the model"),
        ({"r": 10**9}, r"adapter_config\.json: a rank \(1000000000\) is beyond its \d+ weights"),
        ({"rank_pattern": {"q_proj": 10**9}}, r"a rank \(1000000000\) is beyond its \d+ weights"),
        ({"r": -1}, r"adapter_config\.json, for base .*`r` should be a positive integer"),
        ({"r": "many"}, r"adapter_config\.json, for base .*TypeError"),
        ({"lora_alpha": [1]}, r"adapter_config\.json, for base .*TypeError"),
        ({"target_modules": ["q_proj"]}, r"\(2, 16\) there and absent here|is another model"),
        ({"target_modules": "("}, r"adapter_config\.json, for base "),
        (
            {"new_idea": 7, "peft_version": "9.9"},
            r"'new_idea' \(7\) is no option of LoraC.*9\.9",
        ),
    ],
)
def test_configurations_that_are_refused(adapter: Path, base: Path, changes, words: str) -> None:
    change_adapter(adapter, **changes)
    with pytest.raises(UserError, match=words):
        load_checkpoint(adapter, base=base)


def test_files_that_are_damaged(adapter: Path, base: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    content, stored = weights.read_bytes(), load_file(weights)
    weights.write_bytes(content[:-7])
    with pytest.raises(UserError, match=r"^adapter \(.*\) is damaged \(.*\): copy it again"):
        load_checkpoint(adapter, base=base)
    save_file({name: x / 0 for name, x in stored.items()}, weights)
    with pytest.raises(UserError, match=r"^adapter \(.*\) has values that are not finite"):
        load_checkpoint(adapter, base=base)
    save_file(stored | {"more": torch.ones(1)}, weights)
    with pytest.raises(UserError, match=r"more is \(1,\) there and absent here"):
        load_checkpoint(adapter, base=base)
    (adapter / "adapter_config.json").write_text("{")
    for options in ({}, {"base": base}):
        with pytest.raises(UserError, match=r"adapter_config\.json is not readable JSON"):
            load_checkpoint(adapter, **options)


def test_without_the_package(adapter: Path, base: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    words = r'needs the package peft \(.*\): pip install "peft>=0\.21,<1"$'
    with pytest.raises(UserError, match=words):
        load_checkpoint(adapter, base=base)
    assert "peft>=0.21,<1\n" in Path("requirements-dev.txt").read_text()


def test_only_an_adapter_is_one(adapter: Path, base: Path, tmp_path: Path) -> None:
    """Also where its base's configuration lies beside it; never where a whole model is needed."""
    for _ in range(2):
        with pytest.raises(UserError, match=r"is an adapter \(adapter_config\.json\), which needs"):
            find_checkpoint(adapter)
        assert load_checkpoint(adapter, base=base).base == base
        shutil.copy(base / "config.json", adapter)
    shutil.copy(base / "model.safetensors", adapter)
    assert find_checkpoint(adapter) == adapter
    change_config(adapter)
