"""The whole family beside the RetNet: a training step, a token and the state of every mixer."""

from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders import Contender, Field, Ours, Size
from benchmarks.measure import FAMILY, Piece, Plan, Results, measure, random_ids
from benchmarks.training import passes
from retnet.generation.decode import decode_one
from retnet.model import MIXERS
from retnet.model.fast_decode.weights import lay_out_for_decoding
from retnet.model.models import model_class

PLAIN = "RetNet, plain forward pass"
TRAINING, DECODING = "a training step of one row", "decoding after {} tokens"
FEATURES = 64  # the Performer's, of a head, at which its cost is stated
FAMILY_BOUNDS = {  # of a training step's time in retention's
    "linear": 1.15,
    "gated_retention": 1.15,
    f"performer, m = {FEATURES}": 2.0,
    "aft simple": 2.0,
    "rwkv": 2.0,
}
STATE_FACT = "{}: bytes of state after {} tokens"


def variants(plan: Plan) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> mixer and keys: every mixer with its defaults, and cases with bounds of their own.

    The hybrid is the one of docs/mixers.md: each second layer attends to a window.
    """
    layers = list(range(1, plan.size.num_hidden_layers, 2)) or [0]
    window = {"attention_layers": layers, "attention_window": max(2, plan.train_short // 4)}
    return {name: (name, {}) for name in MIXERS} | {
        f"performer, m = {FEATURES}": ("performer", {"num_features": FEATURES}),
        "aft simple": ("aft", {"aft_variant": "simple"}),
        "aft full": ("aft", {"aft_variant": "full"}),
        "hybrid, window": ("retention", window),
    }


def make_family(plan: Plan) -> list[Ours]:
    """A model of each, in the order of the table.

    Where positions are weights, so many take more than 12 d^2 parameters a layer: the inner width
    is then given, the Transformer's.
    """
    size: Size = plan.size
    made = []
    for name, (mixer, own) in variants(plan).items():
        kind = model_class(mixer)
        config_class: Any = kind.config_class
        values = {**vars(size), "tie_word_embeddings": True} | own
        if MIXERS[mixer].positions == "learned":
            values["max_position_embeddings"] = plan.family_positions
            values["intermediate_size"] = 4 * size.hidden_size
        made.append(Ours(name, kind(config_class(**values))))
    return made


class Plain(Ours):
    """Our RetNet without its fast step: what the mixers' decoding is measured against."""

    def decode(self, memory: Any, token: Tensor) -> Tensor:
        return decode_one(self.model, token, memory)


def family(plan: Plan, results: Results) -> None:
    """Training steps, tokens after two contexts, and what is kept of these."""
    field = Field(plan.device, plan.dtype)
    for one in make_family(plan):
        lay_out_for_decoding(one.model)
        field.add(one)
    results.note_field(plan.size, field)
    pieces = passes(field.contenders, 1, plan.train_short, plan, TRAINING)
    measure(FAMILY, pieces, plan, results)
    everybody: list[Contender] = [Plain(PLAIN, field.contenders[0].model), *field.contenders]
    for context in plan.family_contexts:
        ids = random_ids(1, context, plan, plan.size)
        pieces = [
            Piece(DECODING.format(context), one.name, plan.tokens, one.decoding(ids, plan.tokens))
            for one in everybody
        ]
        measure(FAMILY, pieces, plan, results)
        for one in field.contenders:
            with torch.inference_mode():
                num_bytes = one.read(ids).num_bytes()
            results.facts[STATE_FACT.format(one.name, context)] = num_bytes
