"""Checkpoints: exact in a fresh process, by class and by Auto class, and without this package."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from retnet import RetNetConfig, RetNetForCausalLM, TransformerConfig, TransformerForCausalLM
from tests.model.conftest import make_model, random_ids

SCRIPT = """
import sys, torch
import retnet
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
    saved = torch.load(folder + "/expected.pt")
    with torch.no_grad():
        assert torch.equal(model.eval()(saved["ids"]).logits, saved["logits"]), folder
print("equal")
"""


@pytest.mark.slow
def test_exact_in_a_fresh_process(tmp_path) -> None:
    folders = []
    for mixer in ("retention", "attention"):
        for tied in (True, False):
            model = make_model(mixer, torch.float32, tie_word_embeddings=tied)
            folder = tmp_path / f"{mixer}-{tied}"
            model.save_pretrained(folder)
            ids = random_ids(2, 30)
            with torch.no_grad():
                logits = model(ids).logits
            torch.save({"ids": ids, "logits": logits}, folder / "expected.pt")
            folders.append(str(folder))
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, *folders], capture_output=True, text=True, check=False
    )
    assert result.stdout == "equal\n", result.stderr


@pytest.mark.parametrize("tied", [False, True])
def test_automodel_is_the_network_without_its_output_layer(
    mixer: str, tied: bool, tmp_path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = make_model(mixer, torch.float32, tie_word_embeddings=tied)
    whole.save_pretrained(tmp_path)
    network = AutoModel.from_pretrained(tmp_path, dtype="auto").eval()
    assert type(network) is whole.model_class
    ids = random_ids(2, 9)
    expected = whole.model(ids).last_hidden_state
    assert torch.equal(network(ids).last_hidden_state, expected)
    assert not caplog.records, "as if the output layer's weights were a mistake"


@pytest.mark.parametrize(
    ("config", "kind"),
    [(RetNetConfig, RetNetForCausalLM), (TransformerConfig, TransformerForCausalLM)],
)
def test_auto_classes(config, kind, tmp_path) -> None:
    small = config(hidden_size=16, num_heads=2, vocab_size=20, num_hidden_layers=1)
    assert isinstance(AutoModelForCausalLM.from_config(small), kind)
    small.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is config


def test_tied_weights_are_one(tmp_path) -> None:
    model = make_model("retention", torch.float32, tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = RetNetForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_loading_does_not_disturb_loaded_weights(tmp_path) -> None:
    model = make_model("retention", torch.float32)
    model.save_pretrained(tmp_path)
    loaded = RetNetForCausalLM.from_pretrained(tmp_path)
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
