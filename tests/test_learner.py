"""A learner as a module, differentiated twice, against the class itself: token by token, by torch.autograd."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from importlib.util import find_spec

import pytest
import torch

import tttc
from benchmarks import learner
from tests.networks import WIDTH, modules
from tttc.declare.variant import bind
from tttc.errors import DeclarationError, ShapeError
from tttc.library import TTTMLP, GatedThreeLayer
from tttc.runtime import autograd

N = 2  # sequences with weights of their own
DIMS = {"D": 4, "F": 6, "E": 3, "P": 2}


class SwiGLU(tttc.Variant):
    W1, W3 = tttc.state("D", "F", init=tttc.normal(0.5)), tttc.state("D", "F", init=tttc.normal(0.5))
    W2 = tttc.state("F", "D", init=tttc.normal(0.5))

    def learner(self, x):
        return (tttc.silu(x @ self.W1) * (x @ self.W3)) @ self.W2


class Layer(tttc.Variant):
    """One layer, whose kernels are soon compiled."""

    W = tttc.state("D", "F", init=tttc.normal(0.5))

    def learner(self, x):
        return tttc.tanh(x @ self.W)


class Named(tttc.Variant):
    """Names of the module's own, values without tokens, two axes of x, a state that is not read, a width of its own."""

    q = tttc.token("D", "P")
    half, idle, params = tttc.state("P", "E", init=tttc.normal(0.5)), tttc.state("D"), tttc.state("E", init=0.5)
    scale = tttc.param("E", init=2.0)

    def learner(self, x):
        h = tttc.einsum("p,pe->e", tttc.sum(x, axis=0), tttc.softmax(self.half)) / tttc.size(x)
        return tttc.exp(self.params * self.scale) * tttc.tanh(h)


def by_definition(variant, weights, x):
    """The class on every token of one sequence."""
    bound = bind(variant, {n.removeprefix("params.").removesuffix("'"): w for n, w in weights.items()})
    return torch.stack([bound.learner(token) for token in x])


def given(module, tokens, dtype):
    """Weights of N sequences by their names in the module, and tokens."""
    torch.manual_seed(2)
    own = {n: (p + 0.1 * torch.randn(N, *p.shape)).to(dtype) for n, p in module.named_parameters()}
    x = torch.randn(N, tokens, *module.x_shape, dtype=dtype, requires_grad=True)
    return {n: w.detach().requires_grad_() for n, w in own.items()}, x


def differentiated(z, weights, x):
    """z, a gradient of it, and a gradient of that, by reverse mode over reverse mode."""
    generator, leaves = torch.Generator().manual_seed(1), [x, *weights.values()]

    def slopes(tensors):
        total = sum((torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) * y).sum() for y in tensors)
        return torch.autograd.grad(total, leaves, create_graph=True, allow_unused=True, materialize_grads=True)

    first = slopes([z * z])
    return [z, *first, *slopes(first)]


def twice(f):
    """The gradient of the square of a gradient by the weights, by transforms."""

    def square(inner):
        return lambda w, x: sum((g**2).sum() for g in torch.func.grad(inner)(w, x).values())

    return torch.func.grad(square(lambda w, x: (f(w, x) ** 2).sum()))


class Checked:
    """A learner by some backend on sequences with weights of their own, and what is true of it."""

    def __init__(self, variant, backend, tokens=3, dtype=torch.float64, tolerance=1e-10):
        self.variant, self.tolerance = variant, tolerance
        self.module = tttc.nn.Learner(variant, DIMS, backend=backend)
        self.weights, self.x = given(self.module, tokens, dtype)
        self.each = [({n: w[i] for n, w in self.weights.items()}, self.x[i]) for i in range(N)]
        self.wanted = self.derivatives(torch.stack([by_definition(variant, w, a) for w, a in self.each]))

    def called(self, w, x):
        return torch.func.functional_call(self.module, w, (x,))

    def derivatives(self, z):
        return differentiated(z, self.weights, self.x)

    def equal(self, found, true):
        assert torch.allclose(found, true, rtol=self.tolerance, atol=self.tolerance)

    def one_by_one(self):
        for found, true in zip(
            self.derivatives(torch.stack([self.called(*a) for a in self.each])), self.wanted, strict=True
        ):
            self.equal(found, true)

    def mapped(self):
        for found, true in zip(
            self.derivatives(torch.vmap(self.called)(self.weights, self.x)), self.wanted, strict=True
        ):
            self.equal(found, true)

    def thrice(self):
        """The third derivative is one of operations of PyTorch; forward mode too."""
        held, x = {n: w[0].detach() for n, w in self.weights.items()}, self.x[0].detach()

        def of(f):
            again = torch.func.grad(lambda w, x: sum((g**2).sum() for g in twice(f)(w, x).values()))
            slope = torch.func.grad(lambda w, x: (f(w, x) ** 2).sum())
            moved = torch.func.jvp(lambda w: slope(w, x), (held,), ({n: w.sin() for n, w in held.items()},))[1]
            return [*again(held, x).values(), *moved.values()]

        for found, true in zip(of(self.called), of(partial(by_definition, self.variant)), strict=True):
            self.equal(found, true)

    def transformed(self):
        held, x = {n: w.detach() for n, w in self.weights.items()}, self.x.detach()
        found = torch.vmap(twice(self.called))(held, x)
        true = twice(partial(by_definition, self.variant))({n: w[0] for n, w in held.items()}, x[0])
        for n, g in true.items():
            self.equal(found[n][0], g)


@pytest.fixture
def kernels_alone(monkeypatch):
    """No backward in operations of PyTorch, which is what a second derivative otherwise is."""

    def refused(*given):
        raise AssertionError("a derived backward runs in operations of PyTorch")

    monkeypatch.setattr(autograd, "_recorded_backward", refused)


@pytest.mark.usefixtures("kernels_alone")
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("variant", [SwiGLU, TTTMLP, GatedThreeLayer, Named])
def test_its_derivatives_are_those_of_the_class(variant, backend):
    checked = Checked(variant, backend)
    checked.one_by_one()
    checked.mapped()
    checked.transformed()


@pytest.mark.skipif(find_spec("tvm") is None, reason="apache-tvm is an extra: pip install 'tttc[tvm]'")
def test_kernels_for_this_cpu_differentiate_it_twice_chunk_by_chunk(kernels_alone):
    checked = Checked(Layer, "tvm", tokens=70)
    checked.one_by_one()
    checked.mapped()


@pytest.mark.skipif(find_spec("triton") is None, reason="there is no triton for this platform")
def test_kernels_for_a_gpu_differentiate_it_twice(kernels_alone):
    Checked(SwiGLU, "triton", tokens=70, dtype=torch.float32, tolerance=2e-5).mapped()


def test_tokens_come_as_they_like_and_derivatives_in_batches():
    module = tttc.nn.Learner(SwiGLU, DIMS, backend="torch").double()
    weights = dict(module.named_parameters())
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    z = by_definition(SwiGLU, weights, x.flatten(0, 1)).unflatten(0, (5, 3))
    for cut in ((0, 0), (slice(0, 0),), (slice(None), slice(0, 0)), (slice(None), slice(None, None, 2))):
        assert torch.allclose(module(x[cut]), z[cut], rtol=1e-12, atol=1e-12)
    none = torch.autograd.grad(module(x[:0]).sum(), module.W1, create_graph=True)[0]
    assert not none.any()
    given = torch.eye(60, dtype=torch.float64).reshape(60, 5, 3, 4)
    found, true = (torch.autograd.grad(y, module.W2, given, is_grads_batched=True)[0] for y in (module(x), z))
    assert torch.allclose(found, true, rtol=1e-12, atol=1e-12)
    pulled = torch.func.vjp(module, x[0])[1]  # called when the transform has ended
    assert torch.allclose(
        pulled(x[1])[0], torch.func.vjp(lambda x: by_definition(SwiGLU, weights, x), x[0])[1](x[1])[0]
    )


def test_derivatives_beyond_those_of_kernels():
    Checked(SwiGLU, "torch").thrice()


def test_a_network_learns_by_whatever_learner_it_has():
    tokens = torch.randint(0, 7, (2, 9), generator=torch.Generator().manual_seed(0))
    for variant in (SwiGLU, TTTMLP, GatedThreeLayer):
        found = []
        for backend, backward in (("auto", "graph"), ("torch", "sweep")):
            prefix, suffix = modules(window=3)
            for block in suffix.blocks:
                block.prime = tttc.nn.Learner(variant, {"D": WIDTH, "F": 4}, backend=backend).double()
            update = tttc.sgd(lr=0.5, at_end=tttc.clip_norm(0.4, scope="all"))
            network = tttc.nn.EndToEnd(prefix, suffix, fast="*.prime.W*", chunk=3, update=update, backward=backward)
            loss = network(tokens).loss
            found.append([loss, *torch.autograd.grad(loss, list(network.parameters()))])
        for one, other in zip(*found, strict=True):
            assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)


def test_it_is_a_module_like_any_other():
    module = tttc.nn.Learner(Named, DIMS)
    assert list(module.state_dict()) == ["half'", "idle", "params'", "params.scale"]
    x = torch.randn(3, 2, 4, 2)
    y = module(x)
    assert y.shape == (3, 2, 3)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), y)
    assert [module(x.to(d)).dtype for d in (torch.bfloat16, torch.float64)] == [torch.bfloat16, torch.float64]
    assert tttc.nn.Learner(Named, DIMS, device="meta")(x.to("meta")).shape == y.shape
    graph = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(graph(x), y)


class Gated(SwiGLU):
    delta = tttc.gate("delta")

    def learner(self, x):
        return self.delta * x @ self.W1


class Constant(SwiGLU):
    def learner(self, x):
        return self.W1


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: tttc.nn.Learner(Gated, DIMS), DeclarationError, ["reads gate `delta`", "given x alone"]),
        (lambda: tttc.nn.Learner(Constant, DIMS), DeclarationError, ["does not read x", "use its argument"]),
        (lambda: tttc.nn.Learner(SwiGLU, {"D": 4}), ShapeError, ["no size is given for F", "W1, W3, W2"]),
        (lambda: tttc.nn.Learner(SwiGLU(), DIMS), DeclarationError, ["an instance of `SwiGLU`"]),
        (lambda: tttc.nn.Learner(SwiGLU, DIMS)(torch.ones(2, 5)), ShapeError, ["[2, 5]", "[..., 4]", "D=4"]),
    ],
)
def test_what_is_no_learner_is_refused(make, error, said):
    with pytest.raises(error) as raised:
        make()
    assert all(part in str(raised.value) for part in said), raised.value


def test_what_is_timed_is_the_same():
    steps = learner.Steps({"B": 2, "T": 3, "D": 4, "F": 5})
    for step in (steps.forward, steps.gradient, steps.gradient_of_gradient):
        for found, true in zip(step(learner.of_backend("torch", {"D": 4, "F": 5})), step(learner.eager), strict=True):
            assert torch.allclose(found, true, rtol=1e-4, atol=1e-5)
