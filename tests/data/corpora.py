"""Token files in memory for the tests of the data package."""

import numpy as np

from retnet.data import TokenFile

BOS, EOS, PAD = 256, 257, 258


def tokens_of(lengths: list[int]) -> TokenFile:
    """Documents of the given text lengths; a text token is 1000 + its index in the file."""
    tokens: list[int] = []
    starts = []
    for length in lengths:
        starts.append(len(tokens))
        first = 1000 + len(tokens) + 1
        tokens += [BOS, *range(first, first + length), EOS]
    return TokenFile(
        tokens=np.array(tokens, dtype=np.uint32),
        document_starts=np.array(starts, dtype=np.int64),
        document_bytes=np.array(lengths, dtype=np.int64),
        manifest={"pad_token_id": PAD},
    )
