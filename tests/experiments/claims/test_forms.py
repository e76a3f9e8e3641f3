"""Claims about what is computed: measured, and their rules with something wrong."""

import pytest
import torch

from retnet.experiments.claims import approximation, forms
from retnet.experiments.claims.setup import Setup
from retnet.experiments.claims.verdict import Outcome, verdict
from tests.experiments.claims.test_costs import tiny_setup  # noqa: F401


def test_the_three_forms_agree(tiny: Setup) -> None:
    findings = forms.three_forms(tiny)
    assert verdict(findings) is Outcome.HELD and len(findings) == 2 * 2 * 3
    assert all(x.figure.value > 0 for x in findings if "logits" in x.what), "two ways, not one"


def test_a_form_that_differs_is_found(tiny: Setup, monkeypatch) -> None:
    values, gradients = forms._values, forms._gradients

    def wrong_values(model, ids, mode):  # type: ignore[no-untyped-def]
        logits, states = values(model, ids, mode)
        off = 1e-2 * (mode != "recurrent")
        return logits + off, [state + off for state in states]

    def wrong_gradients(model, ids, mode):  # type: ignore[no-untyped-def]
        return [x * (1 + (mode != "recurrent")) for x in gradients(model, ids, mode)]

    monkeypatch.setattr(forms, "_values", wrong_values)
    assert verdict(forms.three_forms(tiny)) is Outcome.PART
    monkeypatch.setattr(forms, "_gradients", wrong_gradients)
    assert verdict(forms.three_forms(tiny)) is Outcome.NOT


def test_normalisations_cancel_without_eps_alone(tiny: Setup) -> None:
    none, own, torchs, typical = forms.normalisations(tiny)
    assert none.outcome is Outcome.HELD and none.figure.value < 1e-6
    assert own.outcome is torchs.outcome is Outcome.NOT
    assert 0 < typical.figure.value < own.figure.value < torchs.figure.value


@pytest.mark.parametrize(("scale", "expected"), [(1e6, Outcome.HELD), (None, Outcome.NOT)])
def test_normalisations_come_out_each_way(tiny: Setup, monkeypatch, scale, expected) -> None:
    def outputs(setup, seed):  # type: ignore[no-untyped-def]
        plain = torch.randn(1, 2, 9, 8, dtype=torch.float64)
        return (plain, torch.randn_like(plain)) if scale is None else (scale * plain, plain * 9e9)

    monkeypatch.setattr(forms, "_outputs", outputs)
    assert verdict(forms.normalisations(tiny)) is expected


def test_the_normalised_scores_sum_up_to_one_at_most() -> None:
    """Of values that are all 1 the output is that sum, divided by its size where that is above."""
    q, k = torch.randn(2, 1, 3, 40, 8, dtype=torch.float64).unbind()
    out = forms.normalised_retention(9 * q, 9 * k, torch.ones_like(q), torch.tensor([-0.1] * 3))
    assert out.abs().max() == pytest.approx(1)


def test_the_performer_comes_closer_with_features(tiny: Setup, monkeypatch) -> None:
    monkeypatch.setattr(approximation, "TOKENS", 64)
    errors = [approximation.relative_error(m, 16, 0.5, seed=0) for m in (16, 1024)]
    assert errors[1] < 0.15 < errors[0] < 1
    findings = approximation.performer(tiny)
    assert verdict(findings) is Outcome.NOT
    assert any("266 features" in x.what for x in findings), "the usual number of them"


@pytest.mark.parametrize(("error", "expected"), [(0.05, Outcome.HELD), (0.2, Outcome.NOT)])
def test_the_performer_comes_out_each_way(tiny, monkeypatch, error, expected) -> None:
    monkeypatch.setattr(approximation, "relative_error", lambda m, *rest: error)
    assert verdict(approximation.performer(tiny)) is expected


def test_the_performer_is_held_in_part_where_only_many_features_do(tiny, monkeypatch) -> None:
    monkeypatch.setattr(approximation, "relative_error", lambda m, *rest: m**-0.5)
    findings = approximation.performer(tiny)
    assert verdict(findings) is Outcome.PART
    assert not any(x.limit for x in findings if "4,096 features" in x.what), "nobody has so many"
    slopes = [x.figure.value for x in findings if "b in error" in x.what]
    assert slopes == pytest.approx([-0.5, -0.5])
