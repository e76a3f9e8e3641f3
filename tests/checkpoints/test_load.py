"""A loaded checkpoint is the saved one; a clear error for everything that can be wrong with it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils.logging import get_verbosity

from retnet.checkpoints import load_checkpoint
from retnet.errors import UserError
from tests.checkpoints.folders import Bomb, change_config
from tests.generation.builders import MIXERS, byte_tokenizer, save_checkpoint, tiny_model


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_loaded_checkpoint_is_the_saved_model(mixer: str, tmp_path: Path) -> None:
    loaded = load_checkpoint(save_checkpoint(tmp_path / "run" / "final", mixer).parent)
    assert loaded.path == tmp_path / "run" / "final"
    assert not loaded.model.training
    assert loaded.mixer == mixer
    assert loaded.data_record is None
    ids = torch.arange(9)[None]
    expected = tiny_model(mixer, dtype=torch.float32)
    for name, weight in expected.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], weight), name
    # the weights lie otherwise in memory, so sums are rounded otherwise
    assert torch.allclose(loaded.model(ids).logits, expected(ids).logits, atol=1e-5)
    assert loaded.tokenizer.get_vocab() == byte_tokenizer().get_vocab()


def test_dtype_and_record(saved: Path) -> None:
    assert load_checkpoint(saved).model.dtype == torch.float32
    loaded = load_checkpoint(saved, dtype=torch.float64)
    assert loaded.model.dtype == torch.float64
    assert loaded.data_record == {"key": 1}


def test_loading_shows_no_progress_bar(saved: Path, capfd) -> None:
    load_checkpoint(saved)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "retnet"}, "flash-linear-attention's format: it needs a converter"),
        ({"model_type": "gpt2"}, r"model_type \(gpt2\) is none of retnet_lm, transformer_lm"),
        ({"model_type": "own", "auto_map": {}}, "--trust-remote-code"),
        ({"num_heads": 3}, r"hidden_size \(16\) must be divisible by num_heads \(3\)"),
        ({"intermediate_size": 8}, "of another shape than config.json says"),
        ({"num_hidden_layers": 3}, "missing from the weights"),
        ({"num_hidden_layers": 1}, "in the weights but not in the model"),
        ({"vocab_size": 258}, "of another shape"),
        ({"dtype": "float7"}, r"config\.json: dtype \(float7\) is none of torch's"),
        ({"hidden_size": "wide"}, r"config\.json: "),
        ({"vocab_size": 10**12}, "config.json describes a model of 16,000,0.* parameters at least"),
        ({"num_hidden_layers": 10**9}, "config.json describes a model of .* parameters at least"),
        ({"quantization_config": 3}, r"config\.json: "),
        ({"id2label": 3}, r"config\.json: "),
    ],
)
def test_a_configuration_that_does_not_fit(
    copy: Path, changes: dict, message: str, capfd, caplog
) -> None:
    change_config(copy, **changes)
    verbosity = get_verbosity()
    with pytest.raises(UserError, match=message):
        load_checkpoint(copy)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records  # no table of transformers' before the error
    assert get_verbosity() == verbosity


def test_trust_remote_code_runs_the_checkpoints_own_code(copy: Path, tmp_path, monkeypatch) -> None:
    """Only with the flag, and then the model class of the folder is the one that is used."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    change_config(
        copy,
        model_type="own_lm",
        auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
    )
    (copy / "own.py").write_text(
        "from retnet import RetNetConfig, RetNetForCausalLM\n"
        "class OwnConfig(RetNetConfig):\n    model_type = 'own_lm'\n"
        "class OwnForCausalLM(RetNetForCausalLM):\n    config_class = OwnConfig\n"
    )
    with pytest.raises(UserError, match="read that code, then add --trust-remote-code"):
        load_checkpoint(copy)
    loaded = load_checkpoint(copy, trust_remote_code=True)
    assert type(loaded.model).__name__ == "OwnForCausalLM"


def test_weights_that_are_not_whole(copy: Path) -> None:
    weights = copy / "model.safetensors"
    tensors = load_file(weights)
    kept = {name: tensor for name, tensor in tensors.items() if "embed" not in name}
    save_file(kept, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.embed_tokens\.weight is missing from the weights"):
        load_checkpoint(copy)
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match="damaged weights"):
        load_checkpoint(copy)


@pytest.mark.parametrize("name", ["adapter_model.bin", "other.safetensors.index.json"])
def test_a_configuration_cannot_name_other_weights(copy: Path, name: str) -> None:
    """transformers would read them instead, pickled or by an index that nobody has checked."""
    torch.save(Bomb(), copy / "adapter_model.bin")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "adapter_model.bin"}}
    (copy / "other.safetensors.index.json").write_text(json.dumps(index))
    change_config(copy, transformers_weights=name)
    with pytest.raises(UserError, match=rf"transformers_weights \({name}\)"):
        load_checkpoint(copy)


def test_a_configuration_that_is_no_json(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    with pytest.raises(UserError, match="not readable JSON"):
        load_checkpoint(copy)
    (copy / "config.json").write_text("[]")
    with pytest.raises(UserError, match="does not hold an object"):
        load_checkpoint(copy)
    (copy / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="not readable JSON"):
        load_checkpoint(copy)


def test_tokenizers_that_do_not_fit(copy: Path) -> None:
    byte_tokenizer((("a", "b"),)).save_pretrained(copy)
    with pytest.raises(UserError, match=r"largest id \(259\) is beyond the model's vocab_size"):
        load_checkpoint(copy)
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = None
    tokenizer.save_pretrained(copy)
    with pytest.raises(UserError, match="has no bos_token"):
        load_checkpoint(copy)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json is missing"):
        load_checkpoint(copy)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b'{"version"'),
        ("tokenizer.json", b"\xff\x00"),
        ("tokenizer.json", b"{}"),
        ("tokenizer_config.json", b'{"tokenizer_class"'),
        ("tokenizer_config.json", b"\xff"),
        (
            "tokenizer_config.json",
            b'{"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", null]}}',
        ),
    ],
)
def test_a_damaged_or_foreign_tokenizer(copy: Path, name: str, content: bytes) -> None:
    (copy / name).write_bytes(content)
    (copy / "own.py").write_text("raise SystemExit('this code was run')")
    fix = "add --trust-remote-code" if b"auto_map" in content else "copy its tokenizer files again"
    with pytest.raises(UserError, match=rf"tokenizer that cannot be loaded \(.*{fix}$"):
        load_checkpoint(copy)
