"""Several seeds and settings of a recipe."""

import re
import statistics
from pathlib import Path

import pytest

from retnet import cli
from retnet.errors import UserError
from retnet.experiments import repeat


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    text = tmp_path / "text.txt"
    text.write_text("every token adds its key and value to the state, and the state decays. " * 40)
    return [
        "configs/shakespeare-char.yaml", "--out", str(tmp_path / "runs"), f"data.source={text}",
        f"data.cache_dir={tmp_path / 'cache'}", "data.seq_len=16", "model.hidden_size=16",
        "model.num_hidden_layers=1", "model.num_heads=2", "train.max_steps=4", "train.device=cpu",
        "train.warmup_steps=1", "train.sample_tokens=0", "train.eval_every=2",
    ]  # fmt: skip


def test_a_row_for_each_mixer_and_setting(arguments, tmp_path: Path, capsys) -> None:
    vary = ["--seeds", "0", "1", "--vary", "train.learning_rate=1e-3,1e-1"]
    vary += ["--mixers", "retention", "attention"]
    assert cli.run(repeat.main, [*arguments, *vary]) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 1 + 2 * 2
    settings = [re.split(r"  +", row)[0] for row in table[1:]]
    assert settings == [
        "mixer=retention, learning_rate=1e-3", "mixer=retention, learning_rate=1e-1",
        "mixer=attention, learning_rate=1e-3", "mixer=attention, learning_rate=1e-1",
    ]  # fmt: skip
    mean, spread, *each = map(float, table[1].split()[2:])
    assert mean == pytest.approx(statistics.mean(each), abs=1e-4)
    assert spread == pytest.approx(statistics.stdev(each), abs=1e-4)
    folder = tmp_path / "runs/shakespeare-char-retention-1e-3-0"
    assert repeat.final_loss(folder) == pytest.approx(each[0], abs=1e-4)

    assert cli.run(repeat.main, [*arguments, *vary]) == 0  # finished runs are only read
    again = capsys.readouterr()
    assert again.out.splitlines() == table and again.err.count("is finished") == 8


def test_one_mixer_one_seed(arguments, capsys) -> None:
    assert cli.run(repeat.main, [*arguments, "--seeds", "3", "--mixers", "attention"]) == 0
    (row,) = capsys.readouterr().out.splitlines()[1:]
    assert row.startswith("mixer=attention ") and "nan" in row


def test_mistakes(arguments, capsys) -> None:
    assert cli.run(repeat.main, [*arguments, "--vary", "train.seed"]) == 2
    assert "--vary (train.seed) must be key=value,value" in capsys.readouterr().err


def test_a_run_that_does_not_finish(arguments, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeat, "train", lambda *_: 3)
    with pytest.raises(UserError, match="did not finish"):
        repeat.main([*arguments, "--seeds", "0"])
