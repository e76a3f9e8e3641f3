"""What pyproject.toml has no words for: configs/ is installed inside the package."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["retnet", "retnet.*"]), "retnet.configs"],
    package_dir={"retnet.configs": "configs"},
    package_data={"retnet": ["py.typed"], "retnet.configs": ["*.yaml"]},
    py_modules=["retnet_commands"],
)
