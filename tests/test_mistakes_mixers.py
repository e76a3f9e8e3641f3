"""What is a mistake with a RetNet is one with every mixer: the same answer, or it has no such key.

The rows are those of test_mistakes.py that are about the model.
"""

from pathlib import Path

import pytest

from retnet.model.mixers import MIXERS
from retnet.training.spec import mixer_keys
from tests.generation.builders import save_checkpoint
from tests.places import RUN, make_broken_checkpoints
from tests.test_mistakes import CONFIGURATION, is_answered
from tests.test_mistakes_checkpoints import GENERATION

OTHERS = [mixer for mixer in MIXERS if mixer != "retention"]
START = RUN + " model."


def one_key(arguments: str) -> bool:
    """Whether a single key of the RetNet is what is wrong."""
    key = arguments.removeprefix(START)
    return key != arguments and " " not in key and key.partition("=")[0] in mixer_keys("retention")


KEYS = [(arguments.removeprefix(START), words) for arguments, words in CONFIGURATION
        if one_key(arguments)]  # fmt: skip
ONCE = ("/foreign", "/scales", "/types", "/format")  # made of the RetNet alone
BROKEN = [
    (arguments, words)
    for arguments, words in GENERATION
    if arguments.startswith("{broken}/") and not any(name in arguments for name in ONCE)
]


@pytest.mark.parametrize("mixer", OTHERS)
@pytest.mark.parametrize(("key", "words"), KEYS, ids=[key for key, _ in KEYS])
def test_a_key(mixer: str, key: str, words: str, places, tmp_path, capsys, monkeypatch) -> None:
    name, _, value = key.partition("=")
    known = mixer_keys(mixer)
    if name == "hidden_size" and value == "15" and "num_heads" not in known:
        pytest.skip("any width will do without heads")
    run = RUN if "num_heads" in known else RUN.replace(" model.num_heads=2", "")
    if name == "attention_window" and mixer == "attention":
        pytest.skip("it is attention")
    if name not in known and value != "[1.5]":  # a value of no key's type is one for all mixers
        words = f"has no meaning with model.mixer={mixer}"
    given = f"{run} model.mixer={mixer} model.{key}"
    is_answered("train", given, words, places, tmp_path, capsys, monkeypatch)


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of each mixer the checkpoints of ``places``, with the same things wrong."""
    folder = tmp_path_factory.mktemp("mixers")
    for mixer in OTHERS:
        save_checkpoint(folder / mixer / "good", mixer)
        make_broken_checkpoints(folder / mixer, folder / mixer / "good")
    return folder


@pytest.mark.parametrize("mixer", OTHERS)
@pytest.mark.parametrize(("arguments", "words"), BROKEN, ids=[args for args, _ in BROKEN])
def test_a_checkpoint(
    mixer: str, arguments: str, words: str, broken, places, tmp_path, capsys, monkeypatch
) -> None:
    here = places | {"broken": broken / mixer}
    is_answered("generate", arguments, words, here, tmp_path, capsys, monkeypatch)


def test_there_are_enough() -> None:
    assert len(KEYS) >= 15 and len(BROKEN) >= 10
