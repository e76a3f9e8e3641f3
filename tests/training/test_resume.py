"""What a run may go on from, and that the way it says to go on is the way that works."""

import json
import shutil
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from retnet.checkpoints import write_manifest
from retnet.training import loop
from tests.training.conftest import as_options
from tests.training.test_train import metrics, run

BPE = ["data.tokenizer=bpe", "data.vocab_size=270"]


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line of standard error, which must be the one error line."""
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    return line


def stopped_at(options: list[str], step: int, **changes: object) -> int:
    """Run until SIGTERM comes while ``step`` steps are complete."""
    real = loop.Trainer._seed

    def seed(self: loop.Trainer, at: int, micro_step: int) -> None:
        if at == step:
            signal.raise_signal(signal.SIGTERM)
        real(self, at, micro_step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Trainer, "_seed", seed)
        return run(options, **changes)


@pytest.fixture
def text(corpus: Path, tmp_path: Path) -> Path:
    """A copy of the corpus, to be changed."""
    return Path(shutil.copytree(corpus, tmp_path / "text"))


def rewrite(text: Path) -> None:
    for file in sorted(text.iterdir())[::2]:
        file.write_text("quite other words " * 8)


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [("bytes", "data.source ({text}) does not give the text"),
     ("bpe", "data.tokenizer (bpe) is not the tokenizer")],
)  # fmt: skip
def test_a_text_that_changed_between_stop_and_start(
    options, text: Path, tmp_path: Path, capsys, tokenizer: str, words: str
) -> None:
    """The same command must not go on with other rows, nor with a retrained tokenizer."""
    options += [f"data.source={text}", *(BPE if tokenizer == "bpe" else [])]
    assert stopped_at(options, 3) == 143
    before = (tmp_path / "run/metrics.jsonl").read_text()
    kept = Path(shutil.copytree(text, tmp_path / "kept"))
    rewrite(text)
    assert run(options) == 2
    assert words.format(text=text) in error_line(capsys)
    assert (tmp_path / "run/metrics.jsonl").read_text() == before
    shutil.rmtree(text)
    kept.rename(text)
    assert run(options) == 0  # the text is restored
    assert len(metrics(tmp_path / "run")) == 6


def test_a_named_checkpoint_with_another_text(options, text: Path, tmp_path: Path, capsys) -> None:
    """Named on purpose, it goes on and says so; states carried from the old text do not."""
    options += [f"data.source={text}"]
    assert run(options) == 0
    rewrite(text)
    named = {"train__resume": tmp_path / "run/checkpoints/step_4"}
    assert run(options, **named, train__out_dir=tmp_path / "b") == 0
    assert "going on with the new text" in capsys.readouterr().err
    carry = {**named, "train__carry_state": "true", "train__out_dir": tmp_path / "c"}
    assert run(options, **carry) == 2
    assert "its states belong to that text" in error_line(capsys)


def test_a_named_checkpoint_with_another_tokenizer(
    options, text: Path, tmp_path: Path, capsys
) -> None:
    """Of the same size, so that the shapes agree; what the message advises works."""
    options += [f"data.source={text}", *BPE]
    assert run(options) == 0
    rewrite(text)
    checkpoint = tmp_path / "run/checkpoints/step_4"
    advised = {"train.resume": checkpoint, "train.out_dir": tmp_path / "b"}
    assert run([*options, *as_options(advised)]) == 2
    line = error_line(capsys)
    assert "data.tokenizer (bpe) is not the tokenizer" in line
    assert f"set data.tokenizer={checkpoint} train.resume={checkpoint}" in line
    assert run([*options, *as_options(advised | {"data.tokenizer": checkpoint})]) == 0


def test_initial_weights_with_another_tokenizer(
    options, text: Path, tmp_path: Path, capsys
) -> None:
    options += [f"data.source={text}", *BPE]
    assert run(options) == 0
    rewrite(text)
    other = {"model.init_from": tmp_path / "run", "train.out_dir": tmp_path / "b"}
    assert run([*options, *as_options(other)]) == 2
    final = tmp_path / "run/final"
    line = error_line(capsys)
    assert "another tokenizer of the same size" in line and f"data.tokenizer={final}" in line
    assert run([*options, *as_options(other | {"data.tokenizer": final})]) == 0


def step_in(folder: Path) -> int:
    return json.loads((folder / "training_state.json").read_text())["step"]


def test_going_back_and_stopped_auto_goes_on(options, finished: Path, capsys) -> None:
    """Back with a lower learning rate, as after a divergence: the end of the old course is gone."""
    folder, lower = finished, {"train__learning_rate": 1e-4}
    assert step_in(folder / "best") == step_in(folder / "final") == 6
    assert stopped_at(options, 5, train__resume=folder / "checkpoints/step_4", **lower) == 143
    assert "the same command with train.resume=auto goes on" in capsys.readouterr().err
    assert {"set-aside-best", "set-aside-final"} <= {path.name for path in folder.iterdir()}
    assert not (folder / "final").exists() and not (folder / "best").exists()
    assert run(options, **lower) == 0
    printed = capsys.readouterr().err
    assert "going on from" in printed and "(step 5)" in printed
    assert [row["step"] for row in metrics(folder)] == [1, 2, 3, 4, 5, 6]
    assert metrics(folder)[-1]["optim/lr"] < 1e-4
    assert step_in(folder / "best") == step_in(folder / "final") == 6


def test_into_another_folder_and_stopped_auto_goes_on(
    options, finished: Path, tmp_path: Path, capsys
) -> None:
    changes = {"train__out_dir": tmp_path / "b", "train__learning_rate": 5}  # nothing gets better
    named = {**changes, "train__resume": tmp_path / "run/checkpoints/step_4"}
    assert stopped_at(options, 5, **named) == 143
    assert "the same command with train.resume=auto goes on" in capsys.readouterr().err
    assert run(options, **named) == 2
    assert "go on with the run there by train.resume=auto" in error_line(capsys)
    assert run(options, **changes) == 0
    assert "(step 5)" in capsys.readouterr().err
    # the best of the run it came from is not here, so the best of this one is its own
    assert step_in(tmp_path / "b/best") == step_in(tmp_path / "b/final") == 6
    shutil.rmtree(tmp_path / "b/checkpoints")
    assert run(options, **named) == 2  # also a folder of which only the end was kept
    assert "already holds a run" in error_line(capsys)


def test_the_end_of_the_run_itself(options, finished: Path, capsys) -> None:
    """It was said to be of another run."""
    assert run(options, train__resume=finished / "final", train__max_steps=8) == 2
    line = error_line(capsys)
    assert f"train.resume ({finished / 'final'}) is none of its checkpoints/: go on with" in line


def test_moments_of_other_shapes(options, finished: Path, capsys) -> None:
    """The model is the same: there is nothing to take over from a config.yaml."""
    shutil.rmtree(finished / "final")
    shutil.rmtree(finished / "checkpoints/step_4")
    file = finished / "checkpoints/step_6/optimizer.safetensors"
    save_file({name: value[None].clone() for name, value in load_file(file).items()}, file)
    (file.parent / "manifest.json").unlink()
    write_manifest(file.parent)
    assert run(options) == 2
    line = error_line(capsys)
    assert line.startswith(f"error: {file} is another model: ") and "copy the" in line


def test_a_best_alone_is_a_run_too(options, finished: Path, tmp_path: Path, capsys) -> None:
    """It died before its first save; another run's checkpoint went on beside its best/."""
    shutil.copytree(tmp_path / "run/best", tmp_path / "b/best")
    other = {"train__out_dir": tmp_path / "b"}
    for resume in (tmp_path / "run/checkpoints/step_4", "never"):
        assert run(options, **other, train__resume=resume) == 2
        assert "already holds a run" in error_line(capsys)
    assert run(options, **other) == 0
    assert len(metrics(tmp_path / "b")) == 6


def test_never_and_stopped(options, capsys) -> None:
    assert stopped_at(options, 3, train__resume="never") == 143
    assert "the same command with train.resume=auto goes on" in capsys.readouterr().err


def test_stopped_in_the_first_step(options, tmp_path: Path, capsys) -> None:
    """It does not name a checkpoint that is not there."""
    assert stopped_at(options, 0) == 143
    printed = capsys.readouterr().err
    assert "there is nothing to save yet" in printed and "step_0" not in printed
    assert run(options) == 0
    assert len(metrics(tmp_path / "run")) == 6


def test_into_another_folder_and_stopped_at_once(
    options, finished: Path, tmp_path: Path, capsys
) -> None:
    """The checkpoint it names is in the folder, and auto does not begin at step 0."""
    other = {"train__out_dir": tmp_path / "b"}
    assert stopped_at(options, 4, **other, train__resume=tmp_path / "run/checkpoints/step_4") == 143
    saved = tmp_path / "b/checkpoints/step_4"
    assert f"stopped after step 4, saved in {saved}" in capsys.readouterr().err
    assert saved.is_dir()
    assert run(options, **other) == 0
    assert f"going on from {saved}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (None, "model.hidden_size=32"),
        (None, "model.num_hidden_layers=2"),
        (None, "model.mixer=attention"),
        (None, "model.tie_word_embeddings=false"),
        ("model.tie_word_embeddings=false", "model.tie_word_embeddings=true"),
        (None, "model.num_heads=4"),  # of the same shapes
        (None, "model.decay=0.9"),
        ("model.rotary_layout=half", "model.rotary_layout=interleaved"),
    ],
)
def test_a_named_checkpoint_of_another_model(
    options, whole: Path, tmp_path: Path, capsys, before: str | None, now: str
) -> None:
    checkpoint = (whole if before is None else tmp_path / "run") / "checkpoints/step_4"
    assert before is None or run([*options, before]) == 0
    named = as_options({"train.resume": checkpoint, "train.out_dir": tmp_path / "b"})
    assert run([*options, *named, now]) == 2
    line = error_line(capsys)
    assert f"checkpoint ({checkpoint}) is another model: " in line
    assert "take over the model section of its run's config.yaml" in line
    assert not (tmp_path / "b").exists()
    assert before is not None or not (tmp_path / "cache").exists()  # found before the text is read


@pytest.mark.parametrize("change", ["model.num_heads=4", "model.decay=1"])
def test_initial_weights_that_mean_something_else(
    options, whole: Path, tmp_path: Path, capsys, change: str
) -> None:
    assert run([*options, f"model.init_from={whole}", change]) == 2
    key, _, value = change.partition("=")
    line = error_line(capsys)
    assert f"error: {key} ({value}) is " in line and f" of model.init_from ({whole}), whose" in line
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


def test_a_named_checkpoint_of_another_vocabulary(options, whole: Path, capsys) -> None:
    assert run(options + BPE, train__resume=whole / "checkpoints/step_4") == 2
    assert "data.tokenizer (bpe) is not the tokenizer" in error_line(capsys)


def test_a_short_run_goes_on_as_a_long_one_with_its_own_warm_up(
    options, tmp_path: Path, capsys
) -> None:
    """The recipe's steps were shortened to a tenth of the run, each time anew."""
    options = [option for option in options if not option.startswith("train.warmup_steps=")]
    assert run(options, train__max_steps=10) == 0
    assert "warmup_steps (30) is too long for train.max_steps (10)" in capsys.readouterr().err
    for _ in range(2):  # also the same command again, after an interruption
        assert stopped_at(options, 11, train__max_steps=20) == 143
        kept = f"train.warmup_steps (2): the run in {tmp_path / 'run'} goes on with its own 1"
        assert kept in capsys.readouterr().err
    assert "warmup_steps: 1\n" in (tmp_path / "run/config.yaml").read_text()
    assert run(options, train__max_steps=20, train__warmup_steps=2) == 2
    assert "differs in train.warmup_steps (1 -> 2)" in error_line(capsys)


def test_a_dollar_in_a_prompt_goes_on_as_it_is(options, tmp_path: Path, capsys) -> None:
    """The first run took it as text, the next one read its own config.yaml as something else."""
    prompt = "${oc.env:HOME} costs 5 ${"
    for steps in (2, 4):
        assert run(options, train__sample_prompt=prompt, train__max_steps=steps) == 0
    printed = capsys.readouterr().err
    assert f"  | {prompt}" in printed and "nothing is replaced" not in printed
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2, 3, 4]


def test_a_record_that_was_written_but_can_not_be(options, finished: Path, capsys) -> None:
    shutil.rmtree(finished / "final")
    newest = finished / "checkpoints/step_6"
    (newest / "training_state.json").write_text('{"step": "x"}')
    (newest / "manifest.json").unlink()
    write_manifest(newest)
    assert run(options, train__resume=newest) == 2
    assert "training_state.json: best_loss is missing" in error_line(capsys)
    assert run(options) == 0
    assert "going back to step_4" in capsys.readouterr().err
