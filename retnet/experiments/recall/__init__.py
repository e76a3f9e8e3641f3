"""Synthetic tasks of memory: recall by distance and number of things."""
