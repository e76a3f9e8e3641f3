"""Libraries that quantise any model of nn.Linear do so with ours; each where it is installed.

torch's own quantize_dynamic: test_deployment.py, and fast_decode/test_paths.py for its line.
"""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch

from retnet.generation import Usage, generate
from tests.model.conftest import make_model, random_ids
from tests.model.fast_decode.cases import GREEDY


def torchao_int8(model: Any) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())


def torchao_int4(model: Any) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    groups = torchao.PerGroup(32)
    config = torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=groups)
    torchao.quantize_(model, config)


def quanto(kind: str) -> Callable[[Any], None]:
    def quantise(model: Any) -> None:
        library = pytest.importorskip("optimum.quanto")
        library.quantize(model, weights=getattr(library, kind))
        library.freeze(model)

    return quantise


# how, the class of the weights, the most that logits may be off (relative, root mean square)
QUANTISERS: dict[str, tuple[Callable[[Any], None], str, float]] = {
    "torchao int8": (torchao_int8, "an Int8Tensor", 0.05),
    "torchao int4": (torchao_int4, "an IntxUnpackedToInt8Tensor", 0.4),
    "quanto int8": (quanto("qint8"), "a WeightQBytesTensor", 0.05),
    "quanto int4": (quanto("qint4"), "a WeightQBitsTensor", 0.4),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", QUANTISERS)
def test_a_quantised_model_works_and_the_line_names_its_weights(name: str) -> None:
    quantise, kind, most = QUANTISERS[name]
    model = make_model("retention", torch.float32, hidden_size=64, intermediate_size=None)
    ids = random_ids(1, 12)
    with torch.no_grad():
        expected = model(ids).logits
        small = copy.deepcopy(model)
        quantise(small)
        error = (small(ids).logits - expected).norm() / expected.norm()
    assert 0 < error < most
    made = small.generate(ids, **GREEDY, pad_token_id=0)
    assert made.equal(small.generate(ids, **GREEDY, pad_token_id=0, use_cache=False))
    saved = io.BytesIO()
    torch.save(small.state_dict(), saved)
    assert saved.getbuffer().nbytes < 0.9 * sum(x.nbytes for x in model.state_dict().values())
    if name == "quanto int4":  # quanto's product fails in inference mode, where our loop is
        return
    usage = Usage()
    list(generate(small, ids, max_new_tokens=3, usage=usage))
    weight = "model.layers.0.mixer.q_proj.weight"
    assert usage.path == f"plain step: {weight} is {kind}"
