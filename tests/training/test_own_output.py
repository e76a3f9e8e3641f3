"""A run may write below its own source: what the project writes is never text."""

import json
import shutil
from pathlib import Path

import pytest

from retnet import cli
from retnet.checkpoints.format import BEST, CHECKPOINTS, DATA_RECORD, FINAL, METRICS
from retnet.commands import compare, train
from retnet.data.listing import files_below
from retnet.training.health import DIVERGED
from retnet.training.run_folder import CONFIG, LOCK, SET_ASIDE
from tests.training.conftest import as_options

EVERY_STEP = {"train.eval_every": 1, "train.save_every": 1}


def as_data_set(folder: Path) -> None:
    """Files named after splits instead."""
    texts = [file.read_text() for file in sorted(folder.glob("*.txt"))]
    shutil.rmtree(folder)
    folder.mkdir()
    for name, part in (("train", texts[:30]), ("test", texts[30:])):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": x}) for x in part))


@pytest.mark.parametrize(
    ("source", "out_dir"),
    [(".", "runs/tiny"), (".", "."), ("./**/*.[tj]*", "runs/tiny"), ("data set", "runs/tiny")],
)
@pytest.mark.slow
def test_a_run_below_its_source_goes_on_and_can_be_compared(
    options, corpus: Path, tmp_path: Path, monkeypatch, capsys, source: str, out_dir: str
) -> None:
    recipe = str(Path("configs/tiny.yaml").absolute())
    shutil.copytree(corpus, tmp_path / "text")
    if source == "data set":
        as_data_set(tmp_path / "text")
    monkeypatch.chdir(tmp_path / "text")
    places = {"data.source": source.replace("data set", "."), "data.cache_dir": "data/cache"}
    places |= {"train.out_dir": out_dir, **EVERY_STEP}
    options = [recipe, *options, *as_options(places)]
    assert cli.run(train.main, [*options, "train.max_steps=2"]) == 0
    # what trackers leave
    (Path(out_dir) / "wandb/run/files").mkdir(parents=True)
    (Path(out_dir) / "wandb/run/files/requirements.txt").write_text("torch\n")
    before = json.loads((Path(out_dir) / FINAL / DATA_RECORD).read_text())
    assert cli.run(train.main, [*options, "train.max_steps=3"]) == 0
    after = json.loads((Path(out_dir) / FINAL / DATA_RECORD).read_text())
    assert after == before
    models = [out_dir, f"{out_dir}/final", "--no-speed"]
    assert cli.run(compare.main, models) == 0
    capsys.readouterr()
    assert cli.run(compare.main, [*models, "--text", "."]) == 0
    assert f"{30 if source == 'data set' else 40} documents" in capsys.readouterr().out
    assert len(list(Path("data/cache").iterdir())) == 1


def test_all_names_of_a_run_are_known(tmp_path: Path) -> None:
    """The data room lists them, because it may not import the rooms that write them."""
    mine = ["sub/notes.txt", "notes.md"]
    names = [CONFIG, LOCK, METRICS, DIVERGED]
    names += [f"{folder}/x.txt" for folder in (CHECKPOINTS, BEST, FINAL, f"{SET_ASIDE}final")]
    names += [f"{folder}/x.txt" for folder in ("wandb", "retnet", "trackio", "mlflow", ".aim")]
    for name in [*mine, *names]:
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text("x")
    found = files_below(tmp_path, "data.source", lambda path: True)
    assert found == [tmp_path / "run" / name for name in sorted(mine)]
