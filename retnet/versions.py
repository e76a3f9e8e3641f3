"""The versions of the libraries with which this package was tried."""

import warnings
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

# from the first to before the second; requirements.txt says the same
TRIED = {
    "torch": ("2.12", "2.14"),
    "transformers": ("5.20", "5.25"),
    "datasets": ("5.0", "6"),
    "tokenizers": ("0.23", "0.24"),
    "accelerate": ("1.14", "2"),
}


def warn_of_untried() -> None:
    """Say once, on import, which libraries are older or newer than all that were tried."""
    for name, (first, end) in TRIED.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        if not Version(first) <= Version(found) < Version(end):
            warnings.warn(
                f"{name} {found} was not tried with this package, which was with {first} up to "
                f"before {end}: results may differ silently, so install one of these",
                stacklevel=2,
            )
