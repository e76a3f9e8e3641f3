"""A manifest knows every file as it was written, and no damage passes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from retnet.checkpoints import check_weights_unchanged, load_checkpoint, write_manifest
from retnet.checkpoints.format import TRAINING_STATE, read_progress
from retnet.checkpoints.verify import ALWAYS_THERE, checkpoint_damage, edited_card, find_damage
from retnet.errors import UserError
from tests.checkpoints.folders import shard

STATE = {"step": 6, "global_batch": 4, "best_loss": 2.5, "best_step": 3, "seconds": 1.5}


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """What a folder of weights without moments must hold, one letter in most files."""
    for name in ALWAYS_THERE:
        (tmp_path / name).write_text("a")
    (tmp_path / TRAINING_STATE).write_text(json.dumps(STATE))
    write_manifest(tmp_path)
    return tmp_path


def manifest(content: object) -> Callable[[Path], object]:
    return lambda folder: (folder / "manifest.json").write_text(json.dumps(content))


def described(name: str = "data.json", **changes: object) -> Callable[[Path], object]:
    return manifest({"files": {name: {"bytes": 2, "sha256": "0"} | changes}})


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "data.json").unlink(), "data.json is missing"),
        (lambda folder: (folder / "data.json").write_text("b"), "data.json is not what was writt"),
        (lambda folder: (folder / "data.json").write_text("aa"), "data.json has 2 bytes, 1 were"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json cannot be read"),
        (manifest([]), "manifest.json cannot be read"),
        (manifest({}), "manifest.json cannot be read"),
        (manifest({"files": []}), "manifest.json cannot be read"),
        (manifest({"files": {"data.json": 3}}), "manifest.json cannot be read"),
        (described(bytes="many"), "manifest.json cannot be read"),
        (described(bytes=1.5), "manifest.json cannot be read"),
        (described(sha256=None), "manifest.json cannot be read"),
        (described("../data.json"), "manifest.json cannot be read"),
    ],
)
def test_damage_is_named(whole: Path, spoil: Callable[[Path], object], words: str) -> None:
    assert find_damage(whole) is None
    spoil(whole)
    for damage in (find_damage(whole), checkpoint_damage(whole, resumable=False)):
        assert damage is not None and damage.startswith(words)


def test_only_some_files(whole: Path) -> None:
    (whole / "data.json").write_text("b")
    assert find_damage(whole, only=["config.json"]) is None
    assert find_damage(whole, only=["config.json", "data.json"]) is not None


def test_what_a_checkpoint_must_hold(whole: Path) -> None:
    assert checkpoint_damage(whole, resumable=False) is None
    nothing = "manifest.json says nothing of"
    assert checkpoint_damage(whole, resumable=True) == f"{nothing} optimizer.safetensors"
    (whole / "optimizer.safetensors").write_text("a")
    (whole / "manifest.json").unlink()
    write_manifest(whole)
    assert checkpoint_damage(whole, resumable=True) is None
    manifest({"files": {}})(whole)
    lacking = "config.json, model.safetensors, tokenizer.json, data.json, training_state.json"
    assert checkpoint_damage(whole, resumable=False) == f"{nothing} {lacking}"


def test_weights_must_be_what_was_written_and_other_files_may_be_edited(whole: Path) -> None:
    (whole / "config.json").write_text("edited")
    check_weights_unchanged(whole)
    (whole / "model.safetensors").write_text("b")
    with pytest.raises(
        UserError, match=r"is damaged, model\.safetensors .* or remove manifest\.js"
    ):
        check_weights_unchanged(whole)
    (whole / "manifest.json").unlink()
    check_weights_unchanged(whole)


def test_shards_are_weights_and_checked_as_such(copy: Path) -> None:
    shard(copy)
    write_manifest(copy)
    load_checkpoint(copy)
    file = copy / "model-2.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"damaged, model-2\.safetensors is not what was"):
        load_checkpoint(copy)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[]", "does not hold an object"),
        ("{}", "best_loss is missing"),
        ("null", "does not hold an object"),
        ('{"step"', "is not readable JSON"),
        (STATE | {"more": 1}, "more is no key of it"),
        (STATE | {"step": "x"}, 'step ("x") must be int'),
        (STATE | {"step": 2.5}, "step (2.5) must be int"),
        (STATE | {"step": None}, "step (null) must be int"),
        (STATE | {"step": True}, "step (true) must be int"),
        (STATE | {"step": [6]}, "step ([6]) must be int"),
        (STATE | {"step": -3}, "step (-3) must be at least 0"),
        (STATE | {"step": 10**30}, "step (1000000000000000000000000000000) must be"),
        (STATE | {"global_batch": -1}, "global_batch (-1) must be at least 0"),
        (STATE | {"best_loss": "low"}, 'best_loss ("low") must be float or null'),
        (STATE | {"best_loss": float("nan")}, "best_loss (nan) must be finite"),
        (STATE | {"best_loss": -1.0}, "best_loss (-1.0) must be at least 0"),
        (STATE | {"best_loss": None}, "belong together"),
        (STATE | {"best_step": 7}, "best_step (7) comes after step (6)"),
        (STATE | {"seconds": float("nan")}, "seconds (nan) must be at least 0"),
        (STATE | {"seconds": {}}, "seconds ({}) must be float"),
        (STATE | {"precision": "fp8"}, "precision (fp8) must be fp32 or bf16"),
    ],
)
def test_a_record_that_was_written_and_can_not_be(whole: Path, content: object, words: str) -> None:
    """The manifest agrees, and still it is no record of a run."""
    assert checkpoint_damage(whole, resumable=False) is None
    text = content if isinstance(content, str) else json.dumps(content)
    (whole / TRAINING_STATE).write_text(text)
    (whole / "manifest.json").unlink()
    write_manifest(whole)
    damage = checkpoint_damage(whole, resumable=False)
    assert damage is not None and words in damage and TRAINING_STATE in damage
    with pytest.raises(UserError, match="copy the checkpoint again"):
        read_progress(whole)


def test_a_record_before_the_first_evaluation(whole: Path) -> None:
    early = STATE | {"best_loss": None, "best_step": None, "seconds": 2}
    (whole / TRAINING_STATE).write_text(json.dumps(early))
    assert vars(read_progress(whole)) == early | {"precision": None}  # of before it was recorded
    (whole / TRAINING_STATE).write_text(json.dumps(early | {"precision": "bf16"}))
    assert read_progress(whole).precision == "bf16"


def test_a_card_is_there_to_be_edited(whole: Path) -> None:
    card = whole / "README.md"
    assert edited_card(whole) is None
    card.write_text("written")
    assert edited_card(whole) == card  # a checkpoint of before there were any: somebody's own
    write_manifest(whole)
    assert edited_card(whole) is None
    card.write_text("edited")
    assert edited_card(whole) == card
    assert checkpoint_damage(whole, resumable=False) is None
    files = json.loads((whole / "manifest.json").read_text())["files"]
    manifest({"files": files | {"README.md": {"bytes": 1, "sha256": "0"}}})(whole)
    assert find_damage(whole) is None  # exports of before described it
    (whole / "manifest.json").unlink()
    assert edited_card(whole) == card
