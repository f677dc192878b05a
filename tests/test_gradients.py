"""Derivatives of the layer against numerical ones, of the first and of the second order."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import (
    READS,
    VARIANTS,
    compiled,
    differences,
    gradients,
    inputs_for,
    keywords,
    layer_result,
    result_of,
)
from tttc.reference import reference
from tttc.verification.comparison import relative_error

TOKENS = 5  # two mini-batches of 2 and one that is left open


def positional(layer, inputs):
    """The layer as a function of plain tensors, and these tensors: what torch.autograd.gradcheck takes."""
    names = list(inputs.named())

    def function(*values):
        given = dict(zip(names, values, strict=True))
        groups = {
            "gates": inputs.gates,
            "params": inputs.params,
            "state": inputs.state,
            "tokens": inputs.tokens,
        }
        arguments = {kind: {n: given[n] for n in group} for kind, group in groups.items()}
        z, state = layer(given["q"], given["k"], given["v"], **arguments)
        return z, *state.values()

    return function, tuple(inputs.named().values())


def small(name, **settings):
    return compiled(name, D=3, F=4, **({"mini_batch": 2} | settings))


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("name", VARIANTS)
def test_gradcheck(name, read):
    """Every entry of the Jacobian by every input, against central differences (torch's tolerances: 1e-5 absolute,
    1e-3).
    """
    layer = small(name, read=read)
    function, values = positional(layer, inputs_for(layer, TOKENS))
    assert torch.autograd.gradcheck(function, values)


@pytest.mark.parametrize("mini_batch", [2, "all"])
@pytest.mark.parametrize("name", VARIANTS)
def test_gradgradcheck(name, mini_batch):
    """The derivative of the backward, along random directions: all entries would be tens of thousands of calls."""
    layer = small(name, mini_batch=mini_batch)
    function, values = positional(layer, inputs_for(layer, TOKENS))
    assert torch.autograd.gradgradcheck(function, values, fast_mode=True)


def test_gradgradcheck_of_every_entry():
    """The same without random directions, for the smallest variant with every part: gates, params, several states."""
    layer = compiled("TTTLinear", D=2, mini_batch=2)
    function, values = positional(layer, inputs_for(layer, 3))
    assert torch.autograd.gradgradcheck(function, values)


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("name", VARIANTS)
def test_adjoint_dot_product(name, read):
    """<J x, y> = <x, J' y>: J x of the oracle, J' y of the layer, in random directions. 1e-11 is that of a sum of
    gradients; the two sides are one number here, and it may be smaller than its terms, hence relative to their
    norms."""
    layer = small(name, read=read)
    inputs = inputs_for(layer, TOKENS)
    values = list(inputs.named().values())
    generator = torch.Generator().manual_seed(1)
    x = random_like(values, generator)
    z, state = reference(layer.signature.variant, inputs.q, inputs.k, inputs.v, **keywords(inputs))
    moved = jacobian_vector([z, *state.values()], values, x)
    y = random_like(moved, generator)
    z, state = layer(inputs.q, inputs.k, inputs.v, **keywords(inputs))
    pulled = torch.autograd.grad([z, *state.values()], values, y, allow_unused=True, materialize_grads=True)
    assert abs(dot(moved, y) - dot(x, pulled)) <= 1e-11 * (dot(moved, moved) * dot(y, y)) ** 0.5


def random_like(values, generator):
    return [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in values]


def dot(one, other):
    return sum(float((a * b).sum()) for a, b in zip(one, other, strict=True))


def jacobian_vector(results, values, x):
    """J x, as the derivative of J' u by u, which is linear in u."""
    u = [torch.zeros_like(y, requires_grad=True) for y in results]
    pulled = torch.autograd.grad(results, values, u, create_graph=True, allow_unused=True, materialize_grads=True)
    return torch.autograd.grad(pulled, u, x, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("checkpoint", [1, 3, "auto"])
@pytest.mark.parametrize("name", VARIANTS)
def test_double_backward_does_not_depend_on_checkpoints(name, checkpoint):
    """A function of the gradients differentiated again: 1e-11, as for every sum of gradients in float64."""
    wanted = second_order(small(name, checkpoint=None))
    found = second_order(small(name, checkpoint=checkpoint))
    wrong = {n: error for n in wanted if not (error := relative_error(found[n], wanted[n])) <= 1e-11}
    assert not wrong


def second_order(layer):
    """The gradients of |gradients|**2 / 2, in which every second derivative occurs."""
    inputs = inputs_for(layer, 11)
    function, values = positional(layer, inputs)
    total = sum((y**2).sum() for y in function(*values))
    first = torch.autograd.grad(total, values, create_graph=True, allow_unused=True)
    norm = sum((g**2).sum() for g in first if g is not None) / 2
    second = torch.autograd.grad(norm, values, allow_unused=True)
    return {
        n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(inputs.named().items(), second, strict=True)
    }


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_under_create_graph_are_those_without(name):
    layer = small(name)
    inputs = inputs_for(layer, 11)
    z, state = layer(inputs.q, inputs.k, inputs.v, **keywords(inputs))
    total = z.sum() + sum(w.sum() for w in state.values())
    values = list(inputs.named().values())
    plain = torch.autograd.grad(total, values, retain_graph=True, allow_unused=True)
    recorded = torch.autograd.grad(total, values, create_graph=True, allow_unused=True)
    for x, y in zip(plain, recorded, strict=True):
        assert (x is None) == (y is None)
        assert x is None or relative_error(y, x) <= 1e-11  # the same sums, once from recomputed chunks


@pytest.mark.parametrize("name", VARIANTS)
def test_only_what_is_asked_for(name):
    """Gradients of some inputs are those among all; inputs without requires_grad get none."""
    layer = small(name)
    inputs = inputs_for(layer, TOKENS)
    wanted = layer_result(layer, inputs)
    given = keywords(inputs) | {"state": {n: w.detach() for n, w in inputs.state.items()}}
    z, state = layer(inputs.q.detach(), inputs.k, inputs.v, **given)
    found = gradients(z, dict(state), {"k": inputs.k, "v": inputs.v}, seed=0)
    assert relative_error(found["k"], wanted.gradients["k"]) <= 1e-11
    assert relative_error(found["v"], wanted.gradients["v"]) <= 1e-11
    with torch.no_grad():
        z, state = layer(inputs.q, inputs.k, inputs.v, **keywords(inputs))
    assert not any(x.requires_grad for x in (z, *state.values()))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_graph_may_be_used_twice(name):
    """A second backward through the same call, with retain_graph, gives the same gradients."""
    layer = small(name, checkpoint=3)
    inputs = inputs_for(layer, 11)
    z, state = layer(inputs.q, inputs.k, inputs.v, **keywords(inputs))
    first = result_of(z, state, inputs)
    assert not differences(result_of(z, state, inputs), first, output=0.0, gradient=0.0)
