"""Recipes by name, where there is no file of that name: what an installed package brings along."""

from pathlib import Path

import pytest

from retnet.errors import UserError
from retnet.training import load_config
from retnet.training.recipes import RECIPES, find_recipe, recipe_names


@pytest.mark.parametrize("name", ["tiny", "tiny.yaml", "configs/tiny.yaml"])
def test_a_recipe_by_name_from_anywhere(name: str, tmp_path: Path, monkeypatch, caplog) -> None:
    expected = load_config(RECIPES / "tiny.yaml", ["train.seed=3"])
    monkeypatch.chdir(tmp_path)
    with caplog.at_level("INFO", "retnet"):
        assert load_config(name, ["train.seed=3"]) == expected
    assert f"configuration ({name}) is no file here: it is the recipe {RECIPES}/tiny" in caplog.text
    assert expected.train.out_dir == "runs/tiny-retention"


def test_a_file_comes_before_a_recipe(tmp_path: Path, monkeypatch, caplog) -> None:
    (tmp_path / "tiny").write_text("train: {seed: 41}")
    monkeypatch.chdir(tmp_path)
    with caplog.at_level("INFO", "retnet"):
        assert load_config("tiny").train.seed == 41
    assert "recipe" not in caplog.text


@pytest.mark.parametrize("name", ["tyny", "other/tiny", "tiny.txt", "/tiny.yaml"])
def test_what_is_no_recipe(name: str) -> None:
    assert find_recipe(name) is None
    with pytest.raises(UserError, match=r"is not a file: .* or a recipe's name: base, .* tiny,"):
        load_config(name)


def test_all_recipes_are_known() -> None:
    assert recipe_names() == sorted(path.stem for path in Path("configs").iterdir())
