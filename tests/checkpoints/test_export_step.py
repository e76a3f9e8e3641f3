"""The step of one token as a program of its own gives the tokens and logits of the model."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from retnet.checkpoints import Checkpoint, load_checkpoint
from retnet.checkpoints.export_step import ABOUT, NEXT, _check, describe_step, export_step, main
from retnet.checkpoints.quantize import quantize_checkpoint
from retnet.errors import UserError
from retnet.model.mixers import MIXERS
from retnet.model.quantised import FORMATS
from tests.generation.builders import (
    BOS,
    EOS,
    PAD,
    VOCAB,
    byte_tokenizer,
    save_checkpoint,
    tiny_model,
)
from tests.model.conftest import make_model

PROMPT, NEW = [BOS, *b"def "], 30
TOLERANCE = 2e-5  # of float32 logits up to 6
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in MIXERS if name != "retention"]
FINITE = ["retention", *(one for one in SLOW if one.values[0] != "attention")]

# all that a program without this package does: 30 greedy tokens after the prompt
THERE = """
import json, sys, torch
file, prompt, new = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
extra = {"retnet_step.json": ""}
step = torch.export.load(file, extra_files=extra).module()
about = json.loads(extra["retnet_step.json"])
states = {
    one["name"]: torch.full(one["shape"], one["initial"], dtype=getattr(torch, one["dtype"]))
    for one in about["states"]
}
tokens, read = list(prompt), 0
while len(tokens) < len(prompt) + new:
    while read < len(tokens):
        logits, states = step(torch.tensor([tokens[read]]), states)
        read += 1
    tokens.append(int(logits[0].argmax()))
assert "retnet" not in sys.modules and not logits.requires_grad
print(json.dumps([tokens[len(prompt):], logits[0].tolist()]))
"""


def checkpoint(folder: Path, mixer: str, **options: Any) -> Path:
    """One whose layers all matter, defined for the prompt and 30 tokens."""
    ids = {"vocab_size": VOCAB, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    make_model(mixer, torch.float32, **ids, **options).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def expected(folder: Path) -> tuple[list[int], torch.Tensor]:
    """The greedy tokens of ``generate``, and the logits before the last of them."""
    model: Any = load_checkpoint(folder).model
    ids = torch.tensor([PROMPT])
    how = {"do_sample": False, "eos_token_id": None, "max_new_tokens": NEW}
    made = model.generate(ids, **how, return_dict_in_generate=True, output_logits=True)
    return made.sequences[0, len(PROMPT) :].tolist(), made.logits[-1][0]


def pt2(file: Path) -> tuple[list[int], torch.Tensor]:
    """What a process without this package makes."""
    command = [sys.executable, "-c", THERE, str(file), json.dumps(PROMPT), str(NEW)]
    done = subprocess.run(
        command, cwd=file.parent, env={**os.environ, "PYTHONPATH": ""}, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    tokens, logits = json.loads(done.stdout)
    return tokens, torch.tensor(logits)


def onnx(file: Path) -> tuple[list[int], torch.Tensor]:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    about = json.loads(session.get_modelmeta().custom_metadata_map[ABOUT])
    names = [one["name"] for one in about["states"]]
    assert [x.name for x in session.get_inputs()] == ["token", *names]
    assert [x.name for x in session.get_outputs()] == ["logits", *(NEXT + name for name in names)]
    states = {
        one["name"]: torch.full(
            one["shape"], one["initial"], dtype=getattr(torch, one["dtype"])
        ).numpy()
        for one in about["states"]
    }
    tokens, read = list(PROMPT), 0
    while len(tokens) < len(PROMPT) + NEW:
        while read < len(tokens):
            token = torch.tensor(tokens[read : read + 1]).numpy()
            logits, *after = session.run(None, {"token": token, **states})
            states, read = dict(zip(names, after, strict=True)), read + 1
        tokens.append(int(logits[0].argmax()))
    return tokens[len(PROMPT) :], torch.from_numpy(logits[0])


def same(folder: Path, found: tuple[list[int], torch.Tensor]) -> None:
    tokens, logits = expected(folder)
    assert found[0] == tokens
    torch.testing.assert_close(found[1], logits, atol=TOLERANCE, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("mixer", FINITE)
def test_thirty_tokens_of_a_pt2_in_another_process(mixer: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "final", mixer)
    main([str(folder), str(tmp_path / "step.pt2")])
    same(folder, pt2(tmp_path / "step.pt2"))


@pytest.mark.slow
@pytest.mark.parametrize("mixer", FINITE)
def test_thirty_tokens_in_onnxruntime(mixer: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    folder = checkpoint(tmp_path / "final", mixer)
    main([str(folder), str(tmp_path / "step.onnx")])
    same(folder, onnx(tmp_path / "step.onnx"))


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["attention", "retention"])
def test_attention_over_a_window(mixer: str, tmp_path: Path) -> None:
    """Its ring goes round three times; a hybrid has states of two kinds."""
    layers = {"attention_layers": [1]} if mixer == "retention" else {}
    folder = checkpoint(tmp_path / "final", mixer, attention_window=10, **layers)
    export_step(folder, tmp_path / "step.pt2")
    same(folder, pt2(tmp_path / "step.pt2"))


def test_what_is_in_a_file_and_several_rows(tmp_path: Path, capsys) -> None:
    folder, file = checkpoint(tmp_path / "final", "retention"), tmp_path / "step.program"
    main([str(folder), str(file), "--format", "torch", "--rows", "2"])
    assert f"{file}: {file.stat().st_size:,} bytes, one token in 3 states of 16,400 bytes" in (
        capsys.readouterr().out
    )
    extra: dict[str, Any] = {f"{ABOUT}.json": ""}
    step = torch.export.load(file, extra_files=extra).module()
    about = json.loads(extra[f"{ABOUT}.json"])
    state = {"shape": [2, 2, 16, 32], "dtype": "float32", "initial": 0.0}
    assert about == {
        "model_type": "retnet_lm",
        "rows": 2,
        "vocab_size": VOCAB,
        "longest": None,
        "bos_token_id": BOS,
        "eos_token_ids": [EOS],
        "states": [
            {"name": "position", "shape": [2], "dtype": "int64", "initial": 0},
            {"name": "layers.0.mixer.state", **state},
            {"name": "layers.1.mixer.state", **state},
        ],
    }
    states = {
        one["name"]: torch.full(one["shape"], one["initial"], dtype=getattr(torch, one["dtype"]))
        for one in about["states"]
    }
    first = {name: x.clone() for name, x in states.items()}
    ids = torch.tensor([PROMPT, PROMPT[::-1]])
    for t in range(ids.shape[1]):
        logits, after = step(ids[:, t], states if t else first)
        assert t or all(x.equal(states[name]) for name, x in first.items())  # not written into
        states = after
    assert states["position"].tolist() == [len(PROMPT)] * 2
    whole = load_checkpoint(folder).model(ids).logits[:, -1]
    torch.testing.assert_close(logits, whole, atol=TOLERANCE, rtol=0)


def test_a_half_precision_checkpoint_is_exported_in_float32(tmp_path: Path, monkeypatch) -> None:
    tiny_model("retention", dtype=torch.bfloat16).save_pretrained(tmp_path / "final")
    byte_tokenizer().save_pretrained(tmp_path / "final")
    seen: list[Any] = []
    monkeypatch.setattr(torch.export, "export", lambda module, *_, **__: seen.append(module))
    monkeypatch.setattr("retnet.checkpoints.export_step._as_pt2", lambda *_: b"")
    export_step(tmp_path / "final", tmp_path / "step.pt2")
    assert seen[0].model.dtype == torch.float32


def test_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_checkpoint(tmp_path / "final")
    save_checkpoint(tmp_path / "growing", "attention")
    save_checkpoint(tmp_path / "int8")
    config = json.loads((tmp_path / "int8/config.json").read_text())
    config["quantization_config"] = {"quant_method": "torchao"}
    (tmp_path / "int8/config.json").write_text(json.dumps(config))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "here.pt2").write_text("mine")
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for arguments, words in (
        ([folder, "step.bin"], "FILE (step.bin) ends with neither .onnx nor .pt2: name one"),
        ([folder, "x.pt2", "--format", "tf"], "invalid choice: 'tf'"),
        ([folder, "x.pt2", "--rows", "0"], "--rows: '0' must be a whole number of at least 1"),
        ([folder, tmp_path, "--format", "torch"], "exists as a folder: name a file in it"),
        ([folder, tmp_path / "here.pt2"], "exists: name one that does not, or remove it"),
        ([folder, tmp_path / "none/x.pt2"], "cannot be written (No such file or directory)"),
        ([folder, "x.onnx"], "no onnx and no onnxscript: pip install onnx onnxscript, or take"),
        ([tmp_path / "nothing", tmp_path / "x.pt2"], "does not exist"),
        ([tmp_path / "growing", tmp_path / "x.pt2"], "that grows with the text (keys, values)"),
        ([tmp_path / "int8", tmp_path / "x.pt2"], "quantization_config"),
        ([tmp_path / "adapter", tmp_path / "x.pt2"], "adapter"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            main([*map(str, arguments)])
    assert sorted(tmp_path.iterdir()) == before and (tmp_path / "here.pt2").read_text() == "mine"


@pytest.mark.parametrize("weights", FORMATS)
def test_quantised_ones(weights: str, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "final")
    quantize_checkpoint(folder, tmp_path / weights, weights)
    with pytest.raises(UserError, match=rf"has quantised weights \({weights}\): export the check"):
        export_step(tmp_path / weights, tmp_path / "x.pt2")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["final", weights])


def test_what_does_not_fit_into_onnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is of all that is exported, a Performer's projections too."""
    folder = save_checkpoint(tmp_path / "final", "performer")
    model = load_checkpoint(folder).model
    size = sum(x.nbytes for x in model.state_dict().values())
    assert size > sum(x.nbytes for x in model.parameters())
    module = "retnet.checkpoints.export_step"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    monkeypatch.setattr(f"{module}.MOST_IN_ONNX", size - 1)
    said = f"has {size:,} bytes of float32 weights, and a file of ONNX holds"
    with pytest.raises(UserError, match=said):
        export_step(folder, tmp_path / "x.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    _check(load_checkpoint(folder), "torch")
    monkeypatch.setattr(f"{module}.MOST_IN_ONNX", size)
    _check(load_checkpoint(folder), "onnx")


@pytest.mark.parametrize(
    ("ends", "told"), [(None, [EOS]), (5, [5, EOS]), ([7, EOS, 5], [5, 7, EOS])]
)
def test_all_tokens_that_end_a_text_are_told(ends: Any, told: list[int]) -> None:
    own = Checkpoint(Path("tiny"), tiny_model("retention"), byte_tokenizer(), None)
    own.model.generation_config.eos_token_id = ends
    states = {"position": torch.zeros(1, dtype=torch.int64)}
    assert describe_step(own, states)["eos_token_ids"] == told


@pytest.mark.slow
def test_the_script_of_the_docs(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript"), pytest.importorskip("onnxruntime")
    page = Path("docs/checkpoints.md").read_text()
    section = page[page.index("## One token as a program") :]
    script = section[section.index("```python\n") + 10 :].split("```")[0]
    folder = checkpoint(tmp_path / "final", "retention")
    main([str(folder), str(tmp_path / "step.onnx")])
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens, _ = expected(folder)
    start = tokens[: tokens.index(EOS)] if EOS in tokens else tokens
    assert done.stdout.startswith(
        tokenizer.decode([*PROMPT, *start]).rstrip("\N{REPLACEMENT CHARACTER}")
    )
