"""Measurements beside the package: parity, and other implementations."""
