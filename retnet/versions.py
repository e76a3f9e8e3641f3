"""The versions of the libraries with which this package was tried."""

import warnings
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

# from the first to before the second, as in requirements.txt
TRIED = {
    "torch": ("2.11", "2.16"),
    "transformers": ("5.20", "5.25"),
    "datasets": ("5.0", "5.3"),
    "tokenizers": ("0.23.1", "0.24"),
    "accelerate": ("1.14", "1.16"),
}


def warn_of_untried(tried: Mapping[str, tuple[str, str]] = TRIED) -> None:
    """Say once, on import, which libraries are older or newer than all that were tried."""
    for name, (first, end) in tried.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        if not Version(first) <= Version(found) < Version(end):
            warnings.warn(
                f"{name} {found} was not tried with this package: results may differ silently, "
                f"take {first} or newer, below {end}",
                stacklevel=2,
            )
