"""What the tests of mistakes are pointed at: checkpoints, and files with something wrong."""

import json
import math
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from retnet.checkpoints import write_manifest
from retnet.checkpoints.quantize import quantize_checkpoint
from retnet.commands import compare, generate, train
from retnet.data import DataSpec, prepare_data
from tests.evaluation.foreign import save_foreign
from tests.generation.builders import MIXERS, save_checkpoint

MAINS = {"train": train.main, "generate": generate.main, "compare": compare.main}
RUN = "{tiny} data.source={corpus} data.tokenizer=bytes data.seq_len=8 data.cache_dir={new}/cache "\
      "train.out_dir={new}/run model.hidden_size=16 model.num_heads=2 train.max_steps=1 "\
      "train.warmup_steps=0 train.device=cpu train.optimizer=adamw "\
      "train.learning_rate=0.004"  # fmt: skip

# And of a model whose positions end, for which num_heads means nothing.
AFT = RUN.replace(" model.num_heads=2", " model.mixer=aft")

# The beginning of compare.py's with a model of transformers' own second.
F = "--text {corpus} --no-speed {runs}/retention {foreign}/"

# Arguments of generate.py and compare.py without a mistake.
G, C = "{runs}/retention", "{runs}/retention {runs}/attention --no-speed"


def make_bad_files(folder: Path) -> None:
    (folder / "nothing").mkdir(parents=True)
    texts = {
        "list.yaml": b"- a\n", "broken.yaml": b"train: [", "latin.yaml": b"a: \xe9",
        "twice.yaml": b"train:\n  seed: 1\n  seed: 2\n",
        "size.yaml": b"data:\n  tokenizer: bytes\n  vocab_size: 5000\n",
        "unknown.yaml": b"model:\n  hiden_size: 3\n", "empty.txt": b"", "short.txt": b"abc",
        "binary.txt": bytes(range(256)), "latin.txt": "é".encode("latin-1"), "image.png": b"\x89",
        "broken.jsonl": b'{"text": "a"}\n{"text"', "broken.parquet": b"PAR1",
        "null.yaml": b'data: {source: "a\\0b"}', "nowhere.yaml": b'train: {out_dir: "a\\0b"}',
        "denied.yaml": b"",
        "deep.yaml": b"[" * 3000, "deep.jsonl": b"[" * 100_000,
        "broken.jsonl.gz": b"\x1f\x8b\x08",
        "chat.jsonl": b'{"messages": [{"role": "assistant", "content": "a"}]}\n'
                      b'{"messages": [{"role": "human", "content": "a"}]}',
    }  # fmt: skip
    for name, content in texts.items():
        (folder / name).write_bytes(content)


def make_broken_checkpoints(folder: Path, good: Path) -> None:
    for name in ("weightless", "cut", "config", "other", "tokenless", "foreign", "garbled",
                 "unsettled", "typeless", "nan"):  # fmt: skip
        shutil.copytree(good, folder / name)
    (folder / "weightless/model.safetensors").unlink()
    diverged = load_file(folder / "nan/model.safetensors")
    diverged["model.norm.weight"].fill_(math.nan)
    save_file(diverged, folder / "nan/model.safetensors", metadata={"format": "pt"})
    weights = folder / "cut/model.safetensors"
    write_manifest(folder / "cut")
    weights.write_bytes(weights.read_bytes()[:-7])
    (folder / "config/config.json").write_text("{")
    config = json.loads((good / "config.json").read_text())
    (folder / "other/config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    (folder / "tokenless/tokenizer.json").unlink()
    (folder / "typeless/config.json").write_text(json.dumps(config | {"dtype": "float7"}))
    (folder / "garbled/tokenizer.json").write_bytes(b"\xff")
    (folder / "unsettled/tokenizer_config.json").write_text("{")
    tokenizer = folder / "foreign/tokenizer.json"
    content = json.loads(tokenizer.read_text())
    content["added_tokens"][-1]["id"] = 5000
    content["model"]["vocab"]["far"] = 5001
    tokenizer.write_text(json.dumps(content))


def make_broken_quantised(folder: Path, good: Path) -> None:
    for name in ("scales", "types", "format"):
        shutil.copytree(good, folder / name)
        (folder / name / "manifest.json").unlink()
    weights = load_file(good / "model.safetensors")
    scale = "model.layers.0.mixer.q_proj.scale"
    damaged = weights | {scale: weights[scale] * math.nan}
    save_file(damaged, folder / "scales/model.safetensors", metadata={"format": "pt"})
    widened = weights | {scale: weights[scale].float()}
    save_file(widened, folder / "types/model.safetensors", metadata={"format": "pt"})
    config = json.loads((good / "config.json").read_text())
    config["quantization_config"]["weights"] = "int3"
    (folder / "format/config.json").write_text(json.dumps(config))


def make_foreign(folder: Path) -> None:
    """Models of transformers' own, and what is none to compare."""
    for kind in ("gpt2", "bert"):
        save_foreign(folder / kind, kind)
    names = ("mute", "empty", "seq2seq", "unknown", "coded", "pickled", "kernel", "patched")
    for name in (*names, "less", "headless"):
        shutil.copytree(folder / "gpt2", folder / name)
    for file in (folder / "mute").glob("*token*"):
        file.unlink()
    (folder / "empty/tokenizer.json").unlink()
    (folder / "empty/tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    weights = folder / "pickled/model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    (folder / "patched/adapter_config.json").write_text("{}")
    weights = load_file(folder / "less/model.safetensors")
    del weights["transformer.h.1.mlp.c_fc.weight"]
    for name in ("less", "headless"):
        save_file(weights, folder / name / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "gpt2/config.json").read_text())
    for name, changes in (
        ("seq2seq", {"model_type": "t5", "is_encoder_decoder": True}),
        ("unknown", {"model_type": "nonsense"}),
        ("coded", {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}),
        ("headless", {"architectures": ["GPT2Model"]}),
        ("kernel", {"text_config": {"attn_implementation": "someone/kernel"}}),
    ):
        (folder / name / "config.json").write_text(json.dumps(config | changes))


def make_places(folder: Path) -> dict[str, Path]:
    """Paths by the names that arguments use: "{corpus}"."""
    names = ("bad", "broken", "foreign", "runs")
    places = {name: folder / name for name in names} | {"corpus": folder / "corpus.jsonl"}
    places["long"] = folder / ("x" * 300)  # no system takes such a name
    rows = [{"text": f"row {i} " * 3, "number": i} for i in range(40)]
    places["corpus"].write_text("\n".join(map(json.dumps, rows)))
    spec = DataSpec(source=str(places["corpus"]), tokenizer="bytes", seq_len=8,
                    cache_dir=str(folder / "cache"))  # fmt: skip
    record = prepare_data(spec).record
    for mixer in (*MIXERS, "aft"):
        save_checkpoint(places["runs"] / mixer / "final", mixer, record=record)
    save_checkpoint(places["runs"] / "unrecorded" / "final")
    lost = record | {"validation_sha256": "0" * 64}
    save_checkpoint(places["runs"] / "lost" / "final", record=lost)
    partial = {key: value for key, value in record.items() if key != "split"}
    save_checkpoint(places["runs"] / "partial" / "final", record=partial)
    quantised = places["runs"] / "int8"
    quantize_checkpoint(places["runs"] / "retention", quantised, "int8")
    make_bad_files(places["bad"])
    make_foreign(places["foreign"])
    make_broken_checkpoints(places["broken"], places["runs"] / "retention/final")
    make_broken_quantised(places["broken"], quantised)
    return places | {"tiny": Path("configs/tiny.yaml").absolute(), "folder": folder}
