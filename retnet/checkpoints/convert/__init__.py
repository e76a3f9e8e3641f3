"""Other projects' checkpoints become ours: ``python -m retnet.checkpoints.convert --help``.

One file for each of them; ``sources`` reads what they have, ``target`` writes our folder.
"""
