"""train.py, generate.py and compare.py: arguments, what they call, and what they print."""
