"""Derivatives of derivatives and torch.func's transforms, through whole models and both losses."""

import pytest
import torch
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.model.conftest import make_model, random_ids

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


def form_of(model) -> dict[str, str]:
    """The form with a backward pass of its own; short rows would take retention's plain one."""
    modes = model.config.mixer_class.modes
    return {"mode": "chunkwise" if "chunkwise" in modes else modes[0]} if modes else {}


@pytest.fixture(params=[True, False], ids=["logits", "loss alone"])
def loss_of(request: pytest.FixtureRequest, model):
    """The loss as a function of parameters and rows [B, T], and the parameters."""
    parameters = {name: x.detach() for name, x in model.named_parameters()}

    def loss(parameters, ids):
        keywords = {"labels": ids, "return_logits": request.param, "use_cache": False}
        keywords |= form_of(model)
        return functional_call(model, parameters, (ids,), keywords).loss

    return loss, parameters


def test_func_grad_is_backward(model, loss_of) -> None:
    loss, parameters = loss_of
    ids = random_ids(2, 9)
    found = grad(loss)(parameters, ids)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(found[name], parameter.grad, atol=1e-10), name


def test_gradients_of_each_row(loss_of) -> None:
    loss, parameters = loss_of
    rows = random_ids(3, 9)
    found = vmap(grad(loss), in_dims=(None, 0))(parameters, rows[:, None])
    for i, row in enumerate(rows):
        alone = grad(loss)(parameters, row[None])
        for name, expected in alone.items():
            assert torch.allclose(found[name][i], expected, atol=1e-10), name


def test_jacobian_and_hessian_of_a_parameter(loss_of) -> None:
    """The Hessian against a central difference."""
    loss, parameters = loss_of
    ids, name = random_ids(1, 6), "model.norm.weight"

    def of_one(weight):
        return loss(parameters | {name: weight}, ids)

    at, step, i = parameters[name], 1e-5, 3
    assert torch.allclose(jacrev(of_one)(at), grad(of_one)(at), atol=1e-12)
    found = jacrev(jacrev(of_one))(at)[i]
    direction = torch.zeros_like(at).index_fill(0, torch.tensor(i), step)
    difference = (grad(of_one)(at + direction) - grad(of_one)(at - direction)) / (2 * step)
    assert difference.abs().max() > 1e-6
    assert torch.allclose(found, difference, atol=1e-7)


@pytest.mark.parametrize("return_logits", [True, False])
def test_second_derivatives_over_several_inputs(mixer: str, return_logits: bool) -> None:
    """A Hessian times a vector, by autograd twice, against a central difference.

    torch's fused attention says itself that it has no second derivative; its plain one has.
    """
    model = make_model(mixer)
    ids = random_ids(2, 12)
    parameters = list(model.parameters())
    vectors = [torch.randn_like(p) for p in parameters]

    def gradients(create_graph: bool = False):
        how = {"return_logits": return_logits, "use_cache": False} | form_of(model)
        with sdpa_kernel(SDPBackend.MATH):
            loss = model(ids, labels=ids, **how).loss
        return torch.autograd.grad(loss, parameters, create_graph=create_graph)

    first = gradients(create_graph=True)
    along = sum((g * v).sum() for g, v in zip(first, vectors, strict=True))
    found = torch.autograd.grad(along, parameters)
    step, ends = 1e-6, []  # few features with a bend cross it
    for sign in (1, -2):
        with torch.no_grad():
            for p, v in zip(parameters, vectors, strict=True):
                p.add_(v, alpha=sign * step)
        ends.append(gradients())
    for product, above, below in zip(found, *ends, strict=True):
        difference = (above - below) / (2 * step)
        assert torch.allclose(product, difference, atol=1e-5 * float(difference.abs().max() + 1))
