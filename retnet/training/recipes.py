"""The recipes of configs/, which an installed package brings along."""

from pathlib import Path

import retnet

_PACKAGE = Path(retnet.__file__).parent
# beside the package in a clone; a wheel has them inside
RECIPES = next(
    (folder for folder in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if folder.is_dir()),
    _PACKAGE / "configs",
)


def recipe_names() -> list[str]:
    """What ``find_recipe`` knows."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def find_recipe(name: str | Path) -> Path | None:
    """The recipe of a name, as ``tiny``, ``tiny.yaml`` or ``configs/tiny.yaml``; None: of none."""
    path = Path(name)
    if path.parent not in (Path(), Path("configs")) or path.suffix not in ("", ".yaml"):
        return None
    return RECIPES / f"{path.stem}.yaml" if path.stem in recipe_names() else None
