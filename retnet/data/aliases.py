"""How large a YAML text is with its aliases written out: each line may be ten times the one before.

Libraries that write such a value out, in a message for instance, take all time and memory. A text
that is simply long takes minutes to read.
"""

import math

import yaml

MOST_NODES = 10_000  # of a file that somebody wrote
MOST_TEXT = 1 << 20  # characters; reading that many takes seconds


def too_large(node: yaml.Node | None) -> bool:
    """Whether a node has more than 10,000 values, its aliases written out; or holds itself."""
    return node is not None and _size(node, {}) > MOST_NODES


def _size(node: yaml.Node, known: dict[int, float]) -> float:
    """How many values a node is when its aliases are written out; inf when it holds itself."""
    if id(node) not in known:
        known[id(node)] = math.inf
        parts = node.value if isinstance(node, yaml.CollectionNode) else ()
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(node)]
