"""The properties of the parity matrix: two ways to the same numbers, and how far they differ.

Each property is a function of a ``Case``, a random model in one precision, that draws a random
situation and computes it in both ways.
"""

import copy
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import PAD, Case
from retnet.model.cache import DecoderCache
from retnet.model.mixers.base import Mixer

NEW_TOKENS = 6
FAR = 10_000_000


def worst(value: Tensor, expected: Tensor) -> float:
    """The largest difference in units of the expected values' standard deviation."""
    spread = expected.double().std() if expected.numel() > 1 else expected.double().abs().max()
    return ((value - expected).double().abs().max() / spread.clamp(min=1e-12)).item()


def largest(differences: Iterable[float]) -> float:
    """The largest of them; NaN if any of them is, which Python's ``max`` may drop."""
    return torch.tensor(list(differences), dtype=torch.float64).max().item()


def _run(case: Case, batch: dict[str, Tensor], cache: DecoderCache, mode: str | None) -> Tensor:
    """Float64 logits of the unmasked tokens; the cache goes on."""
    logits = case.logits(
        batch["input_ids"], past_key_values=cache, mode=mode,
        **{name: value for name, value in batch.items() if name != "input_ids"},
    )  # fmt: skip
    return logits[batch["attention_mask"].bool()]


def _forms(case: Case, mode: str) -> tuple[float, float]:
    """Logits and state of one form against the recurrent one, perhaps after an earlier text."""
    batch = case.batch()
    mine = case.memory(len(batch["input_ids"]))
    theirs = copy.deepcopy(mine)
    logits = worst(_run(case, batch, mine, mode), _run(case, batch, theirs, "recurrent"))
    states = [
        worst(state, other.mixer[name])
        for layer, other in zip(mine.layers, theirs.layers, strict=True)
        for name, state in layer.mixer.items()
        if name not in layer.growing and state.is_floating_point()
    ]
    return logits, largest([0.0, *states])


def parallel_is_recurrent(case: Case) -> float:
    return _forms(case, "parallel")[0]


def chunkwise_is_recurrent(case: Case) -> float:
    return _forms(case, "chunkwise")[0]


def states_agree(case: Case) -> float:
    return largest(_forms(case, mode)[1] for mode in case.modes[:-1])


def splits(case: Case) -> float:
    """Pieces with a cache between them, each in a mode of its own, against one pass."""
    batch = case.batch()
    cache = case.memory(len(batch["input_ids"]))
    whole = _run(case, batch, copy.deepcopy(cache), case.mode())
    out = [
        case.logits(
            **{"ids" if name == "input_ids" else name: v[:, cut] for name, v in batch.items()},
            past_key_values=cache,
            mode=case.mode(),
        )
        for cut in case.pieces(batch["input_ids"].shape[1])
    ]
    return worst(torch.cat(out, dim=1)[batch["attention_mask"].bool()], whole)


def token_by_token(case: Case) -> float:
    """A prompt, then one token at a time, against one pass."""
    ids = case.ids(2, case.draw.randint(2, 30))
    prompt = case.draw.randrange(1, ids.shape[1])
    cache = case.model.new_cache()
    out = [case.logits(ids[:, :prompt], past_key_values=cache)]
    out += [
        case.logits(ids[:, t : t + 1], past_key_values=cache) for t in range(prompt, ids.shape[1])
    ]
    return worst(torch.cat(out, dim=1), case.logits(ids))


def _gradients(case: Case, batch: dict[str, Tensor], cuts: list[slice], modes: Any) -> list[Tensor]:
    """Of a fixed function of the logits of the unmasked tokens, with a cache between the cuts."""
    cache = case.model.new_cache()
    with case.autocast():
        parts = [
            case.model(
                **{name: value[:, cut] for name, value in batch.items()},
                past_key_values=cache,
                mode=mode,
            ).logits
            for cut, mode in zip(cuts, modes, strict=True)
        ]
    logits = torch.cat(parts, dim=1).to(torch.promote_types(parts[0].dtype, torch.float32))
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(logits.shape, generator=generator, dtype=torch.float64).to(logits.dtype)
    loss = (logits * weights)[batch["attention_mask"].bool()].sum()
    return list(torch.autograd.grad(loss, list(case.model.parameters())))


def gradients(case: Case) -> float:
    """All parameters' gradients through pieces in any modes, against one recurrent pass."""
    batch = case.batch()
    length = batch["input_ids"].shape[1]
    mode = "recurrent" if case.modes else None
    expected = _gradients(case, batch, [slice(0, length)], [mode])
    cuts = case.pieces(length) if case.draw.random() < 0.5 else [slice(0, length)]
    mine = _gradients(case, batch, cuts, [case.mode() for _ in cuts])
    return largest(
        ((a - b).abs().max() / b.abs().max().clamp(min=1e-12)).item()
        for a, b in zip(mine, expected, strict=True)
    )


def _padded(prompts: list[Tensor], side: str) -> dict[str, Tensor]:
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), PAD)
    for row, prompt in enumerate(prompts):
        cut = slice(width - len(prompt), None) if side == "left" else slice(0, len(prompt))
        ids[row, cut] = prompt
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def _prompts(case: Case) -> list[Tensor]:
    lengths = [case.draw.randint(1, 12) for _ in range(3)]
    return [case.ids(1, length)[0] for length in lengths]


def _padding(case: Case, side: str) -> float:
    prompts = _prompts(case)
    batch = _padded(prompts, side)
    alone = torch.cat([case.logits(prompt[None])[0] for prompt in prompts])
    return worst(_run(case, batch, case.model.new_cache(), case.mode()), alone)


def left_padding(case: Case) -> float:
    return _padding(case, "left")


def right_padding(case: Case) -> float:
    return _padding(case, "right")


def packing(case: Case) -> float:
    """Documents in one row against each alone."""
    documents = [case.ids(1, case.draw.randint(1, 12)) for _ in range(4)]
    ids = torch.cat(documents, dim=1)
    segments = [torch.full_like(document, n) for n, document in enumerate(documents)]
    packed = case.logits(ids, segment_ids=torch.cat(segments, dim=1), mode=case.mode())
    return worst(packed, torch.cat([case.logits(document) for document in documents], dim=1))


def shifted(case: Case) -> float:
    """A text at positions 10,000,000 and on, its second half through the cache."""
    ids = case.ids(2, case.draw.randint(2, 30))
    half = ids.shape[1] // 2
    far = torch.arange(FAR, FAR + ids.shape[1])[None]
    cache = case.model.new_cache()
    out = [
        case.logits(ids[:, :half], position_ids=far[:, :half], past_key_values=cache),
        case.logits(ids[:, half:], past_key_values=cache),
    ]
    return worst(torch.cat(out, dim=1), case.logits(ids))


def reloaded(case: Case) -> float:
    """Saved as safetensors and loaded again."""
    ids = case.ids(2, 20)
    with tempfile.TemporaryDirectory() as folder:
        case.model.save_pretrained(folder)
        again = type(case.model).from_pretrained(folder, dtype=case.model.dtype).eval()
    other = Case(case.wide, again, case.precision, case.draw)
    return worst(other.logits(ids), case.logits(ids))


def _against_float64(case: Case) -> tuple[Tensor, Tensor]:
    batch, mode = case.batch(), case.mode()
    exact = Case(case.wide, case.wide, "float64", case.draw)
    expected = _run(exact, batch, case.wide.new_cache(), mode)
    return _run(case, batch, case.model.new_cache(), mode), expected


def rounding(case: Case) -> float:
    """The precision itself: the same weights in float64."""
    return worst(*_against_float64(case))


def typical_rounding(case: Case) -> float:
    """The root of the mean square in place of the worst."""
    value, expected = _against_float64(case)
    return ((value - expected).pow(2).mean().sqrt() / expected.std()).item()


def gradient_rounding(case: Case) -> float:
    """The typical error of one pass's gradients in any mode, in units of the typical entry."""
    batch, mode = case.batch(), case.mode()
    whole = [slice(0, batch["input_ids"].shape[1])]
    exact = replace(case, model=case.wide, precision="float64")
    found, expected = (
        torch.cat([x.flatten().double() for x in _gradients(own, batch, whole, [mode])])
        for own in (case, exact)
    )
    return ((found - expected).norm() / expected.norm()).item()


def _generate(case: Case, batch: dict[str, Any], **options: Any) -> Tensor:
    model: Any = case.model  # transformers types generate's self as a protocol
    with case.autocast():
        out = model.generate(
            **batch, do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=None, **options
        )
    return out[:, batch["input_ids"].shape[1] :]


def _batched(case: Case, **options: Any) -> float:
    """How many tokens of a left-padded batch differ from those of single prompts."""
    prompts = _prompts(case)
    together = _generate(case, _padded(prompts, "left"), **options)
    alone = torch.cat([_generate(case, _padded([prompt], "left"), **options) for prompt in prompts])
    return (together != alone).sum().item()


def greedy_batched(case: Case) -> float:
    return _batched(case)


def beams_batched(case: Case) -> float:
    return _batched(case, num_beams=4)


def cached(case: Case) -> float:
    """How many tokens differ when every step reads the whole text anew."""
    batch = _padded(_prompts(case), "left")
    return (_generate(case, batch) != _generate(case, batch, use_cache=False)).sum().item()


@dataclass(frozen=True)
class Property:
    """A row of the matrix.

    Attributes:
        name: What is equal.
        measure: The difference found in one case.
        unit: "logits", "states" (standard deviations of the expected ones), "gradients" (largest
            entry of the expected tensor) or "tokens" (a count).
        applies: Whether a mixer has this row.
        limits: What ``--check`` allows in float64 and in float32.
        every: It runs in one of so many cases, because it is slow.
    """

    name: str
    measure: Callable[[Case], float]
    unit: str = "logits"
    applies: Callable[[type[Mixer]], bool] = lambda _: True
    limits: tuple[float, float] = (1e-10, 1e-4)
    every: int = 1


Applies = Callable[[type[Mixer]], bool]


def _has(mode: str) -> Applies:
    return lambda mixer: mode in mixer.modes


def _turns_relatively(mixer: type[Mixer]) -> bool:
    return mixer.relative and mixer.positions != "learned"


TOKENS_PER_CASE = 3 * NEW_TOKENS
PROPERTIES = (
    Property("parallel = recurrent", parallel_is_recurrent, applies=_has("parallel")),
    Property("chunkwise = recurrent", chunkwise_is_recurrent, applies=_has("chunkwise")),
    Property("final states of the forms", states_agree, "states", applies=_has("recurrent")),
    Property("gradients, any modes, any split", gradients, "gradients", limits=(1e-10, 1e-3)),
    Property("split anywhere, any mode to any mode", splits),
    Property("prefill + decode = full forward", token_by_token),
    Property("left padding = alone", left_padding),
    Property("right padding = alone", right_padding),
    Property("packed documents = alone", packing),
    Property(
        "shifted by 10,000,000 positions", shifted, limits=(1e-6, 1e-4), applies=_turns_relatively
    ),
    Property("saved and loaded", reloaded, every=4),
    Property("cached = uncached, greedy", cached, "tokens", every=4),
    Property("left-padded batch = single, greedy", greedy_batched, "tokens", every=4),
    Property("left-padded batch = single, 4 beams", beams_batched, "tokens", every=4),
    Property("the precision itself: error against float64", rounding),
    Property("the same, root mean square", typical_rounding),
    Property("the same, of gradients", gradient_rounding, "gradients", limits=(1e-10, 1e-3)),
)
