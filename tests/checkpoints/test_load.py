"""A loaded checkpoint is the saved one; a clear error for everything that can be wrong with it."""

import json
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils.logging import get_verbosity

from retnet import RetNetForCausalLM
from retnet.checkpoints import load_checkpoint, write_manifest
from retnet.errors import UserError
from tests.checkpoints.folders import Bomb, change_config
from tests.generation.builders import MIXERS, byte_tokenizer, save_checkpoint, tiny_model
from tests.permissions import bound_by_permissions


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
    assert loaded.data_record["key"] == 1


def test_loading_shows_no_progress_bar(saved: Path, capfd) -> None:
    load_checkpoint(saved)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "retnet"},
            "is flash-linear-attention's format: make it ours by python",
        ),
        ({"model_type": "gpt2"}, r"model_type \(gpt2\) is none of retnet_lm, transformer_lm"),
        ({"model_type": "own", "auto_map": {}}, "--trust-remote-code"),
        ({"num_heads": 3}, r"hidden_size \(16\) must be divisible by num_heads \(3\)"),
        ({"intermediate_size": 8}, "of another shape than config.json says"),
        ({"num_hidden_layers": 3}, "missing from the weights"),
        ({"num_hidden_layers": 1}, "in the weights but not in the model"),
        ({"vocab_size": 300}, "of another shape"),
        (
            {"dtype": "float7"},
            r"config\.json: dtype \('float7'\) is none of float32, bfloat16, flo",
        ),
        ({"dtype": "float8_e4m3fn"}, r"dtype \('float8_e4m3fn'\) is none of float32, bfloat16"),
        ({"dtype": ["int8"]}, r"dtype \(\['int8'\]\) is none of float32, bfloat16"),
        ({"num_attention_heads": 3}, r"num_heads \(2\) and num_attention_heads \(3\) are one key"),
        ({"hidden_size": "wide"}, r"config\.json: "),
        ({"vocab_size": 10**12}, "config.json describes a model of 16,000,0.* parameters at least"),
        ({"num_hidden_layers": 10**9}, "config.json describes a model of .* parameters at least"),
        (
            {"quantization_config": 3},
            r"config\.json: quantization_config is of weights in a format",
        ),
        ({"rotary_base": 10**400}, r"rotary_base \(10{39}\.\.\. \(401 characters\)\) is beyond 64"),
        ({"eos_token_id": [1, 10**20]}, r"eos_token_id \(\[1, 10{20}\]\) is beyond 64 bits"),
        (
            {"attn_implementation": "someone/kernel"},
            r"attn_implementation \('someone/kernel'\) names",
        ),
        ({"_attn_implementation_internal": "a/b"}, "names code from elsewhere: remove it"),
        ({"experts_implementation": {"": "a/b"}}, "names code from elsewhere: remove it"),
        ({"kernel_config": {"RMSNorm": "a/b:RMSNorm"}}, "names code from elsewhere: remove it"),
        (
            {"value_size": 10**12},
            "its weights have [0-9,]* bytes .* describes a model of .* parame",
        ),
        ({"tie_word_embeddings": True}, r"tie_word_embeddings \(true\) makes lm_head\.weight and"),
        ({"model_type": ["retnet_lm"]}, "is none of retnet_lm"),
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


@pytest.mark.parametrize("kind", ["own_lm", "retnet"])
def test_trust_remote_code_runs_the_checkpoints_own_code(
    copy: Path, tmp_path, monkeypatch, kind: str
) -> None:
    """Only with the flag, and then the model class of the folder is the one that is used.

    Of a kind that a converter is for too.
    """
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    change_config(
        copy,
        model_type=kind,
        auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
    )
    (copy / "own.py").write_text(
        "from retnet import RetNetConfig, RetNetForCausalLM\n"
        f"class OwnConfig(RetNetConfig):\n    model_type = '{kind}'\n"
        "class OwnForCausalLM(RetNetForCausalLM):\n    config_class = OwnConfig\n"
    )
    words = "read that code, then add" if kind == "own_lm" else "make it ours by python"
    with pytest.raises(UserError, match=words):
        load_checkpoint(copy)
    loaded = load_checkpoint(copy, trust_remote_code=True)
    assert type(loaded.model).__name__ == "OwnForCausalLM"


def test_a_model_that_a_hand_untied(copy: Path) -> None:
    """Its weights are whole: copying them again would help nothing."""
    tensors = load_file(copy / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    words = r"config\.json: tie_word_embeddings \(false\) makes lm_head\.weight and .* set it to"
    with pytest.raises(UserError, match=words):
        load_checkpoint(copy)
    change_config(copy, tie_word_embeddings=True)
    load_checkpoint(copy)


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
    byte_tokenizer().save_pretrained(copy)
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    added = {"259": {"content": "<far>", "special": True}}
    more = json.dumps(settings | {"added_tokens_decoder": added})
    (copy / "tokenizer_config.json").write_text(more)
    with pytest.raises(UserError, match=r"with what tokenizer_config\.json adds: its largest id"):
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


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_labels", 10**9),
        ("id2label", {"0": "a"}),
        ("use_return_dict", True),  # transformers' config has it, and it can't be set
        ("per_layer_config", {"0": {"hidden_size": 8}}),
        ("pruned_heads", {"0": [0]}),
        ("mixer_class", "attention"),
        ("head_dim", 3),
        ("validate", 3),
        ("num_beams", 10**9),
        ("fusion_config", {"patch_embeddings": True}),
    ],
)
def test_keys_that_are_none_of_a_models_do_nothing(
    copy: Path, key: str, value: object, capfd, caplog
) -> None:
    """A table of a billion labels took 8 GB; other keys became attributes of the configuration."""
    change_config(copy, **{key: value})
    tracemalloc.start()
    try:
        loaded = load_checkpoint(copy)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10_000_000
    expected = f"{copy}/config.json: {key} is no field of RetNetConfig and has no effect"
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.split("; did you mean")[0] == expected
    assert capfd.readouterr().err in ("", f"{line}\n")  # where an entry point ran before
    assert loaded.model.config.head_dim == 8


def test_many_and_strange_keys_are_few_lines(copy: Path, caplog) -> None:
    """A name with a line break could have begun a line of its own."""
    change_config(copy, **{"\nerror: forged\x1b[2J": 1, "x" * 10**6: 1})
    change_config(copy, **{f"zz_{number}": number for number in range(1000)})
    load_checkpoint(copy)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 9 and not any("\n" in line or len(line) > 400 for line in lines)
    assert r"config.json: '\nerror: forged\x1b[2J' is no field of RetNetConfig" in lines[0]
    assert lines[-1].startswith(f"{copy}/config.json: so have 994 more keys, which are no fields")


def test_more_layers_than_weights(copy: Path, monkeypatch) -> None:
    """Of narrow layers so many fit into the bytes of a file that building them takes gigabytes."""
    sizes = {"hidden_size": 2, "num_heads": 1, "intermediate_size": 1, "value_size": 1}
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    change_config(copy, **sizes, **ids, vocab_size=1, num_hidden_layers=1000)
    monkeypatch.setattr("retnet.checkpoints.load.model_class", lambda mixer: pytest.fail("built"))
    with pytest.raises(UserError, match=r"in 26 tensors and .* a model of 1,000 layers at least"):
        load_checkpoint(copy)


def test_features_that_no_memory_holds(tmp_path: Path) -> None:
    """They were drawn before they were compared with the file's."""
    folder = save_checkpoint(tmp_path, "performer")
    change_config(folder, num_features=10**12)
    with pytest.raises(UserError, match=r"mixer\.projection is of another shape than config\.json"):
        load_checkpoint(folder)


def test_other_files_than_weights_and_configuration_are_not_read(copy: Path) -> None:
    (copy / "generation_config.json").write_text('{"max_new_tokens": "many", "temperature": [')
    load_checkpoint(copy)


@pytest.mark.parametrize("trusted", [False, True])
def test_an_adapter_beside_the_weights_is_not_applied(
    copy: Path, saved: Path, caplog, trusted: bool
) -> None:
    """peft is installed here; transformers applied it, and the manifest said nothing."""
    peft = pytest.importorskip("peft")
    model = load_checkpoint(saved).model
    options = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(model, options).save_pretrained(copy)
    ids = torch.arange(9)[None]
    applied = RetNetForCausalLM.from_pretrained(copy)(ids).logits
    plain = load_checkpoint(saved).model(ids).logits
    assert not torch.allclose(applied, plain, atol=1e-3)
    loaded = load_checkpoint(copy, trust_remote_code=trusted)
    assert torch.equal(loaded.model(ids).logits, plain)
    lines = [record.getMessage() for record in caplog.records if record.name[:6] == "retnet"]
    assert lines == [
        f"{copy}/adapter_config.json: the adapter beside the weights is not applied: merge it into "
        "them, or remove it"
    ]


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"]
)
def test_a_file_that_may_not_be_read_is_not_damaged(copy: Path, name: str, manifest: bool) -> None:
    if manifest:
        write_manifest(copy)
    (copy / name).chmod(0)
    with bound_by_permissions(), pytest.raises(UserError) as caught:
        load_checkpoint(copy)
    file = copy / name
    assert str(caught.value) == f"{file} cannot be read (Permission denied): change its permissions"


def test_weights_that_are_no_floating_point_numbers(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    for dtype in (torch.int64, torch.complex64, torch.float8_e4m3fn):
        changed = weights | {"lm_head.weight": weights["lm_head.weight"].to(dtype)}
        save_file(changed, copy / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=rf"lm_head\.weight is of type {dtype}, in which noth"):
            load_checkpoint(copy)


def test_a_keys_other_name(copy: Path) -> None:
    file = copy / "config.json"
    content = json.loads(file.read_text())
    content["num_attention_heads"] = content.pop("num_heads")
    file.write_text(json.dumps(content))
    assert load_checkpoint(copy).model.config.num_heads == 2
    change_config(copy, num_attention_heads=3)
    with pytest.raises(UserError, match=r"must be divisible by num_heads \(3\)"):
        load_checkpoint(copy)
