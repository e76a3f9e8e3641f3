"""Fixtures of the data package's tests: no network, and specs with a cache of their own."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import retnet.data.prepare as prepare
from retnet.data import DataSpec

SpecFor = Callable[..., DataSpec]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def spec_for(tmp_path: Path) -> SpecFor:
    """A spec with byte tokens, short windows and a cache of its own."""

    def make(source: Path | str, **options: object) -> DataSpec:
        defaults = {"tokenizer": "bytes", "seq_len": 8, "cache_dir": str(tmp_path / "cache")}
        return DataSpec(source=str(source), **{**defaults, **options})  # type: ignore[arg-type]

    return make


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps({field: text, "n": 1}) for text in texts))


def texts(name: str, count: int = 30) -> list[str]:
    return [f"{name} document {index}" for index in range(count)]


@pytest.fixture
def splits(tmp_path: Path) -> Path:
    """A folder whose files are named after splits."""
    write_jsonl(tmp_path / "set/data/train-00000-of-00002.jsonl", texts("a"))
    write_jsonl(tmp_path / "set/data/train-00001-of-00002.jsonl", texts("b"))
    write_jsonl(tmp_path / "set/data/test-00000-of-00001.jsonl", texts("t"))
    (tmp_path / "set/README.md").write_text("# A data set")
    return tmp_path / "set"


def write_documents(path: Path, count: int = 40) -> Path:
    rows = [f"document {index}: the cat sat on mat {index * 7}" for index in range(count)]
    path.write_text("\n".join(json.dumps({"text": text}) for text in rows))
    return path


def entries(spec: DataSpec) -> list[str]:
    folder = Path(spec.cache_dir)
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each preparation that is really made."""
    made: list[int] = []
    real = prepare._build

    def counted(*arguments: object) -> None:
        made.append(1)
        real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(prepare, "_build", counted)
    return made
