"""What train.py writes, in other people's tools, in processes that can't import this package."""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from retnet.checkpoints import load_checkpoint

pytestmark = pytest.mark.slow
TEXTS = ["a state adds its", "every head decays", "key and value"]  # of fewer than 24 bytes
OURS = Path.cwd()

PLAIN = """
import sys
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline
name, ids = sys.argv[1], torch.arange(40).view(2, 20)
model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True).eval()
out = {"logits": model(ids).logits.detach()}
assert AutoModel.from_pretrained(name, trust_remote_code=True)(ids).last_hidden_state.dim() == 3
assert AutoConfig.from_pretrained(name, trust_remote_code=True).model_type == "retnet_lm"
tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
greedy = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
tokenizer.padding_side = "left"
rows = tokenizer(["a state", "every head decays"], return_tensors="pt", padding=True)
out["text"] = model.generate(**rows, **greedy)
write = pipeline("text-generation", model=name, trust_remote_code=True)
(made,) = write("every head decays", return_tensors=True, **greedy)
own = rows.input_ids.shape[1] + 8
assert made["generated_token_ids"] == out["text"][1][-own:].tolist()
model.save_pretrained("again")
again = AutoModelForCausalLM.from_pretrained("again", trust_remote_code=True).eval()
assert again(ids).logits.equal(out["logits"])
try:
    AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code=True" in str(error)
else:
    raise AssertionError("its code ran without being asked for")
save_file(out, "out.safetensors")
"""

TUNE = """
import sys
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer
rows = Dataset.from_dict({"text": ["a state adds its key " * 3] * 8})
options = SFTConfig("tuned", max_steps=2, per_device_train_batch_size=2, report_to=[],
                    use_cpu=True, bf16=False, max_length=24, save_strategy="no",
                    logging_steps=1, learning_rate=1e-2, **TRUST)
trainer = SFTTrainer(sys.argv[1], args=options, train_dataset=rows)
before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
trainer.train()
assert any(not value.equal(before[name]) for name, value in trainer.model.state_dict().items())
assert type(trainer.model).__module__.startswith(MODULE), type(trainer.model)
trainer.save_model("tuned")
AutoModelForCausalLM.from_pretrained("tuned", **TRUST)
"""


@pytest.fixture
def elsewhere(tmp_path: Path) -> Callable[..., str]:
    """Runs a program where there is no network and nobody to ask; returns what it printed."""
    (tmp_path / "without").mkdir()
    (tmp_path / "without/sitecustomize.py").write_text("import sys\nsys.modules['retnet'] = None\n")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "mods")}

    def start(*arguments: object, path: Path = tmp_path / "without", cwd: Path = tmp_path) -> str:
        done = subprocess.run(
            [sys.executable, *map(str, arguments)], cwd=cwd, text=True, capture_output=True,
            env=environment | {"PYTHONPATH": str(path)}, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return start


def program(text: str, tmp_path: Path, **values: object) -> Path:
    for name, value in values.items():
        text = text.replace(name, f"({value!r})" if isinstance(value, str) else f"{value}")
    (tmp_path / "program.py").write_text(text)
    return tmp_path / "program.py"


def test_the_package_is_not_there(elsewhere) -> None:
    text = "import importlib\ntry: importlib.import_module('retnet')\n"
    text += "except ModuleNotFoundError: print('none')"
    assert elsewhere("-c", text) == "none\n"


def test_plain_transformers_and_pipeline(finished: Path, tmp_path: Path, elsewhere) -> None:
    """Bit for bit our logits."""
    elsewhere(program(PLAIN, tmp_path), finished / "final")
    model = load_checkpoint(finished).model
    with torch.no_grad():
        expected = model(torch.arange(40).view(2, 20)).logits
    assert load_file(tmp_path / "out.safetensors")["logits"].equal(expected)


def test_the_example_of_the_card(finished: Path, elsewhere) -> None:
    text = (finished / "final/README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert "The " in elsewhere("-c", example, cwd=finished / "final")


TASK = """
task: own_text
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""


@pytest.mark.skipif(not importlib.util.find_spec("lm_eval"), reason="lm_eval is not installed")
def test_the_command_line_of_lm_eval(finished: Path, tmp_path: Path, elsewhere) -> None:
    """Its bits per byte are ours: <bos> once before each text, no <eos>."""
    rows = [json.dumps({"text": text}) for text in TEXTS]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    (tmp_path / "task.yaml").write_text(TASK.replace("FILE", str(tmp_path / "rows.jsonl")))
    arguments = f"pretrained={finished / 'final'},trust_remote_code=True,add_bos_token=False"
    elsewhere(
        "-m", "lm_eval", "--model", "hf", "--model_args", arguments, "--tasks", "own_text",
        "--include_path", tmp_path, "--device", "cpu", "--output_path", tmp_path / "results",
    )  # fmt: skip
    (file,) = (tmp_path / "results").rglob("results*.json")
    found = json.loads(file.read_text())["results"]["own_text"]["bits_per_byte,none"]
    checkpoint, nats = load_checkpoint(finished), 0.0
    for text in TEXTS:
        ids = checkpoint.tokenizer(text, return_tensors="pt").input_ids
        assert ids[0, 0] == checkpoint.tokenizer.bos_token_id and ids.shape[1] == len(text) + 1
        with torch.no_grad():
            nats += checkpoint.model(ids, labels=ids).loss.item() * len(text)
    assert found == pytest.approx(nats / math.log(2) / len("".join(TEXTS)), rel=1e-5)


@pytest.mark.skipif(not importlib.util.find_spec("trl"), reason="trl is not installed")
@pytest.mark.parametrize("installed", [False, True])
def test_sft_of_a_path(finished: Path, tmp_path: Path, elsewhere, installed: bool) -> None:
    """TRL loads the path itself: by the code beside the weights, or by the installed package."""
    trust = {} if installed else {"trust_remote_code": True}
    text = TUNE.replace("**TRUST)\ntrainer", "model_init_kwargs=TRUST)\ntrainer")
    text = ("import retnet\n" if installed else "") + text
    module = "retnet.model" if installed else "transformers_modules"
    file = program(text, tmp_path, TRUST=trust, MODULE=module)
    elsewhere(file, finished / "final", path=OURS if installed else tmp_path / "without")
    saved = {path.name for path in (tmp_path / "tuned").iterdir()}
    assert ("models.py" in saved) is not installed
    config = json.loads((tmp_path / "tuned/config.json").read_text())
    assert ("auto_map" in config) is not installed
