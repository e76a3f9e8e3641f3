"""A corpus and a configuration small enough to train in a second."""

import logging
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from retnet import cli
from retnet.commands import train

WORDS = ["state", "head", "decays", "every", "token", "adds", "its", "key", "and", "value"]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 documents of ragged length."""
    rng = random.Random(0)
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(40):
        words = rng.choices(WORDS, k=rng.randint(2, 60))
        (folder / f"{i:02}.txt").write_text(" ".join(words) + f" {i}.\n")
    return folder


@pytest.fixture
def options(corpus: Path, tmp_path: Path) -> list[str]:
    """Overrides that make any configuration tiny."""
    return tiny_options(corpus, tmp_path)


@pytest.fixture(scope="session")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run with ``options``, for all tests to read and none to change."""
    folder = tmp_path_factory.mktemp("whole")
    assert cli.run(train.main, ["configs/tiny.yaml", *tiny_options(corpus, folder)]) == 0
    return folder / "run"


@pytest.fixture
def finished(whole: Path, tmp_path: Path) -> Path:
    """A copy of it where the test's own run would be: checkpoints of steps 4 and 6."""
    shutil.copytree(whole.parent, tmp_path, dirs_exist_ok=True)
    return tmp_path / "run"


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What the package says while a test calls it without an entry point."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("retnet")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)


def tiny_options(corpus: Path, folder: Path) -> list[str]:
    return as_options(
        {
            "model.hidden_size": 16,
            "model.num_hidden_layers": 1,
            "model.num_heads": 2,
            "model.dropout": 0.1,
            "data.source": corpus,
            "data.tokenizer": "bytes",
            "data.seq_len": 24,
            "data.cache_dir": folder / "cache",
            "train.max_steps": 6,
            "train.batch_size": 4,
            "train.optimizer": "adamw",
            "train.learning_rate": 3e-3,
            "train.warmup_steps": 2,
            "train.eval_every": 3,
            "train.save_every": 2,
            "train.sample_tokens": 4,
            "train.log_every": 2,
            "train.device": "cpu",
            "train.precision": "fp32",
            "train.out_dir": folder / "run",
        }
    )


def as_options(values: dict[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in values.items()]
