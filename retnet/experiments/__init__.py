"""Recipes that train and evaluate."""
