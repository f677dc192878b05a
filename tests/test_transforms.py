"""Derivatives of every mode and order, and batches: `torch.func`, forward mode, double backward, is_grads_batched.

The truth is the oracle's: the declaration's own functions in float64 with torch.autograd.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

import tttc
from tests.helpers import LIBRARY, dims_of
from tests.test_gradients import jacobian_vector, random_like
from tttc.backends.torch.ops import ELEMENTWISE, FUSED_DERIVATIVES, HELPERS
from tttc.ir.scalars import SCALARS
from tttc.reference import reference
from tttc.verification.comparison import random_inputs, relative_error

pytestmark = pytest.mark.usefixtures("plain_kernels")  # what calls them is tested
F64 = torch.float64
NATIVE = pytest.param("tvm", marks=pytest.mark.skipif(find_spec("tvm") is None, reason="apache-tvm is not installed"))
BACKENDS = ["torch", NATIVE]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
CLOSE = 1e-9  # two orders of derivatives in float64, summed in another order

# -- the functions that PyTorch source is made of ----------------------------------------------------------------------


def emitted(name: str) -> Any:
    """What the emitter writes for a row of the table, as a function of its operands."""
    scope: dict[str, Any] = {"torch": torch, "F": F, "aten": torch.ops.aten}
    for text in HELPERS.values():
        exec(text, scope)
    template = ELEMENTWISE.get(name) or FUSED_DERIVATIVES[name].replace("{g}", "{1}").replace("{x}", "{0}")
    return eval(f"lambda x, y=None, z=None: {template.format('x', 'y', 'z')}", scope)


def operands(name: str) -> list[torch.Tensor]:
    """Points of the domain on both sides of every bend, none of them at one."""
    low, high = SCALARS[name].domain if name in SCALARS else (-3.0, 3.0)
    count = SCALARS[name].arity if name in SCALARS else 2
    generator = torch.Generator().manual_seed(len(name))
    made = [low + (high - low) * torch.rand(8, generator=generator, dtype=F64) for _ in range(count)]
    return [made[0], made[1].abs()] if name == "huber" else made


@pytest.mark.parametrize("name", [*ELEMENTWISE, *FUSED_DERIVATIVES])
def test_every_row_of_the_table_is_differentiated_in_every_way(name):
    """Twice in reverse, forward over reverse and reverse over forward, and mapped over."""
    function, values = emitted(name), operands(name)
    tangents = random_like(values, torch.Generator().manual_seed(1))

    def loss(*xs: torch.Tensor) -> torch.Tensor:
        return (function(*xs) * torch.arange(1.0, 9, dtype=F64)).sum() + sum(x.square().sum() for x in xs)

    leaves = [x.clone().requires_grad_() for x in values]
    assert torch.autograd.gradcheck(lambda *xs: function(*xs) + 0 * sum(xs), leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda *xs: function(*xs) + 0 * sum(xs), leaves)
    every = tuple(range(len(values)))
    first = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    along = sum((g * u).sum() for g, u in zip(first, tangents, strict=True))
    wanted = torch.autograd.grad(along, leaves, allow_unused=True, materialize_grads=True)
    ways = {
        "forward over reverse": jvp(grad(loss, every), tuple(values), tuple(tangents))[1],
        "reverse over forward": grad(lambda *xs: jvp(loss, xs, tuple(tangents))[1], every)(*values),
    }
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x.clone().requires_grad_(), u) for x, u in zip(values, tangents, strict=True)]
        found = [forward_ad.unpack_dual(g).tangent for g in torch.autograd.grad(loss(*duals), duals)]
        ways["in a dual level"] = [torch.zeros_like(x) if g is None else g for x, g in zip(values, found, strict=True)]
    for way, found in ways.items():
        for g, w in zip(found, wanted, strict=True):
            torch.testing.assert_close(g, w, msg=f"{name}, {way}")
    torch.testing.assert_close(vmap(function)(*values), function(*values))


def test_every_function_of_the_table_has_a_form():
    assert set(ELEMENTWISE) == {n for n, row in SCALARS.items() if row.infix is None}


# -- a layer as a function of its tensors ------------------------------------------------------------------------------


class Problem:
    """A layer as a function of q, k, v and its gates, of 5 tokens: two mini-batches of 2 and one that is left open."""

    def __init__(self, name: str, backend: str, tokens: int = 5) -> None:
        variant = LIBRARY[name]
        variant = variant if variant.mini_batch == 1 else variant.replace(mini_batch=2)
        self.layer = tttc.compile(variant, dims_of(variant, 3, 4), F64, backend=backend)
        self.inputs = random_inputs(self.layer.signature, self.layer.dims, 2, tokens, 2)
        self.gates = list(self.inputs.gates)
        self.rest = {"params": detached(self.inputs.params), "state": detached(self.inputs.state)}
        self.rest["tokens"] = detached(self.inputs.tokens) or None
        given = (self.inputs.q, self.inputs.k, self.inputs.v, *self.inputs.gates.values())
        self.values = tuple(x.detach() for x in given)
        self.tangents = tuple(random_like(self.values, torch.Generator().manual_seed(7)))
        self.every = tuple(range(len(self.values)))

    def __call__(self, *values: torch.Tensor, run: Any = None) -> torch.Tensor:
        """Outputs and states as one vector."""
        q, k, v, *gates = values
        z, state = (run or self.layer)(q, k, v, gates=dict(zip(self.gates, gates, strict=True)), **self.rest)
        return torch.cat([z.flatten(), *(x.flatten() for x in state.values())])

    def oracle(self, *values: torch.Tensor) -> torch.Tensor:
        return self(*values, run=lambda q, k, v, **given: reference(self.layer.signature.variant, q, k, v, **given))

    def loss(self, *values: torch.Tensor) -> torch.Tensor:
        return self(*values).square().sum()

    def leaves(self) -> list[torch.Tensor]:
        return [x.clone().requires_grad_() for x in self.values]

    def gradient(self) -> tuple[torch.Tensor, ...]:
        leaves = self.leaves()
        return torch.autograd.grad(self.oracle(*leaves).square().sum(), leaves)

    def moved(self) -> torch.Tensor:
        """J u."""
        leaves = self.leaves()
        (found,) = jacobian_vector([self.oracle(*leaves)], leaves, self.tangents)
        return found

    def curved(self) -> tuple[torch.Tensor, ...]:
        """H u, of the loss."""
        leaves = self.leaves()
        first = torch.autograd.grad(self.oracle(*leaves).square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(first, leaves, self.tangents)


def detached(group: Any) -> dict[str, torch.Tensor]:
    return {n: x.detach() for n, x in (group or {}).items()}


def close(found: Any, wanted: Any) -> None:
    for x, y in zip(found, wanted, strict=True):
        assert x is not None
        assert relative_error(x, y) <= CLOSE


# solves, a learner with a norm and gates of its own, one with gelu, one that carries its open mini-batch as rows
NAMES = ("DeltaNet", "TTTLinear", "TTTMLP", "Moneta")
problems = pytest.mark.parametrize("name", NAMES[:2])


@pytest.mark.parametrize("name", NAMES)
@every_backend
def test_forward_mode(name, backend):
    """In a dual level and by `torch.func.jvp`, with gradients asked for and without."""
    problem = Problem(name, backend)
    wanted = problem.moved()
    close([jvp(problem, problem.values, problem.tangents)[1]], [wanted])
    for mode in (torch.no_grad, torch.enable_grad):
        with mode(), forward_ad.dual_level():
            duals = map(forward_ad.make_dual, problem.values, problem.tangents)
            close([forward_ad.unpack_dual(problem(*duals)).tangent], [wanted])


@every_backend
def test_forward_mode_of_one_token(backend):
    """The kernel of a single token, which runs where no gradient is asked for, knows of no tangents either."""
    problem = Problem("TTTLinear", backend, tokens=1)
    with torch.no_grad(), forward_ad.dual_level():
        duals = map(forward_ad.make_dual, problem.values, problem.tangents)
        found = forward_ad.unpack_dual(problem(*duals)).tangent
    close([found], [problem.moved()])


@every_backend
def test_tangents_that_come_after_the_forward(backend):
    """Cotangents that carry a tangent, through a backward whose forward had none: J' is linear."""
    problem = Problem("TTTLinear", backend)
    leaves = problem.leaves()
    z = problem(*leaves)
    with forward_ad.dual_level():
        one = torch.ones_like(z)
        found = torch.autograd.grad(z, leaves, forward_ad.make_dual(one, 2 * one), retain_graph=True)
        tangents = [forward_ad.unpack_dual(g).tangent for g in found]
    close(tangents, [2 * g for g in torch.autograd.grad(z, leaves, torch.ones_like(z))])


@problems
@every_backend
def test_the_gradient_by_transforms(name, backend):
    problem = Problem(name, backend)
    wanted = problem.gradient()
    close(grad(problem.loss, problem.every)(*problem.values), wanted)
    for mode in (torch.enable_grad, torch.no_grad):  # the transform has ended where its result is called
        pull = vjp(problem.loss, *problem.values)[1]
        with mode():
            close(pull(torch.ones((), dtype=F64)), wanted)


@problems
@every_backend
def test_second_derivatives(name, backend):
    """Each order of the modes, by transforms and without."""
    problem = Problem(name, backend)
    values, tangents, every = problem.values, problem.tangents, problem.every
    wanted = problem.curved()
    gradient = grad(problem.loss, every)
    close(jvp(gradient, values, tangents)[1], wanted)
    close(grad(lambda *xs: jvp(problem.loss, xs, tangents)[1], every)(*values), wanted)
    close(vjp(gradient, *values)[1](tangents), wanted)
    leaves = problem.leaves()
    first = torch.autograd.grad(problem.loss(*leaves), leaves, create_graph=True)
    close(torch.autograd.grad(first, leaves, tangents), wanted)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, u) for x, u in zip(problem.leaves(), tangents, strict=True)]
        found = torch.autograd.grad(problem.loss(*duals), duals)
        close([forward_ad.unpack_dual(g).tangent for g in found], wanted)
        leaves = problem.leaves()
        moved = problem.loss(*map(forward_ad.make_dual, leaves, tangents))
        close(torch.autograd.grad(forward_ad.unpack_dual(moved).tangent, leaves), wanted)


@every_backend
def test_a_third_derivative(backend):
    """Of the gradients' gradients, where one value comes from another."""
    problem = Problem("DeltaNet", backend, tokens=3)

    def third(run: Any) -> tuple[torch.Tensor, ...]:
        q, *rest = problem.leaves()
        leaves = [q, *rest]
        given = [q, rest[0] + 0.1 * q, *rest[1:]]
        found = (run(*given).square().sum(),)
        for _ in range(2):
            found = torch.autograd.grad(sum(x.square().sum() for x in found), leaves, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in found), leaves)

    close(third(problem), third(problem.oracle))


@every_backend
def test_jacobians_and_hessians(backend):
    """By rows, by columns, in batches of torch.autograd's own, against one row after the other."""
    problem = Problem("TTTLinear", backend, tokens=3)
    q, k, *rest = problem.values
    functional = torch.autograd.functional

    def of_k(x: torch.Tensor) -> torch.Tensor:
        return problem(q, x, *rest)[:5]

    def loss(x: torch.Tensor) -> torch.Tensor:
        return problem.loss(q, x, *rest)

    wanted = functional.jacobian(lambda x: problem.oracle(q, x, *rest)[:5], k)
    close([jacrev(of_k)(k), jacfwd(of_k)(k)], [wanted, wanted])
    close([functional.jacobian(of_k, k, vectorize=True)], [wanted])
    close([functional.jacobian(of_k, k, vectorize=True, strategy="forward-mode")], [wanted])
    wanted = functional.hessian(lambda x: problem.oracle(q, x, *rest).square().sum(), k)
    close([hessian(loss)(k), jacrev(jacrev(loss))(k), jacfwd(jacfwd(loss))(k)], 3 * [wanted])
    close([functional.hessian(loss, k, vectorize=True)], [wanted])


@problems
@every_backend
def test_gradients_in_batches(name, backend):
    """`is_grads_batched`, once more differentiated, and a vmap over torch.autograd.grad of a graph made before."""
    problem = Problem(name, backend)
    leaves = problem.leaves()
    z = problem(*leaves)
    rows = torch.stack(random_like([z] * 3, torch.Generator().manual_seed(2)))
    wanted = [torch.autograd.grad(z, leaves, row, create_graph=True) for row in rows]
    found = torch.autograd.grad(z, leaves, rows, is_grads_batched=True, create_graph=True)
    stacked = [torch.stack(each) for each in zip(*wanted, strict=True)]
    close(found, stacked)
    second = torch.autograd.grad(sum(g.square().sum() for g in stacked), leaves, retain_graph=True)
    close(torch.autograd.grad(sum(g.square().sum() for g in found), leaves, retain_graph=True), second)
    close(vmap(lambda row: torch.autograd.grad(z, leaves, row, retain_graph=True))(rows), stacked)


@problems
@every_backend
def test_mapped_over(name, backend):
    """Any axis, or none, of any input; per-sample gradients; maps within maps and within gradients."""
    problem = Problem(name, backend)
    many = [torch.stack([x, 0.5 * x, x.flip(0)]) for x in problem.values]
    each = list(zip(*many, strict=True))
    wanted = torch.stack([problem.oracle(*xs) for xs in each])
    close([vmap(problem)(*many)], [wanted])
    close([vmap(vmap(problem))(*(torch.stack([x, x]) for x in many))], [torch.stack([wanted, wanted])])
    dims = (None, 1, *len(many[2:]) * (0,))
    found = vmap(problem, dims, out_dims=1)(problem.values[0], many[1].movedim(0, 1), *many[2:])
    close([found], [torch.stack([problem.oracle(problem.values[0], *xs[1:]) for xs in each], 1)])
    gradient = grad(problem.loss, problem.every)
    alone = [torch.stack(gs) for gs in zip(*(gradient(*xs) for xs in each), strict=True)]
    close(vmap(gradient)(*many), alone)
    close(grad(lambda *xs: vmap(problem.loss)(*xs).sum(), problem.every)(*many), alone)
    shared = grad(lambda k: vmap(lambda q: problem.loss(q, k, *problem.values[2:]))(many[0]).sum())(problem.values[1])
    rows = [grad(problem.loss, 1)(q, *problem.values[1:]) for q in many[0]]
    close([shared], [torch.stack(rows).sum(0)])


@pytest.mark.parametrize("backend", [NATIVE])
def test_what_is_mapped_over_runs_at_once_by_the_kernels(monkeypatch, backend):
    """One call of a scan for the whole batch, forward and backward, and none of the program in PyTorch."""
    from tttc.backends.torch.load import TorchScan
    from tttc.backends.tvm_common.scan import TVMScan

    problem = Problem("DeltaNet", backend)
    many = [torch.stack([x, x, x]) for x in problem.values]
    batches = []

    def counted(name: str, run: Any) -> Any:
        def method(self: Any, inputs: Any, *rest: Any) -> Any:
            batches.append((name, len(inputs[0])))
            return run(self, inputs, *rest)

        return method

    for name in ("forward", "backward"):
        monkeypatch.setattr(TVMScan, name, counted(name, getattr(TVMScan, name)))
    monkeypatch.setattr(TorchScan, "forward", lambda *_: pytest.fail("the program in PyTorch ran"))
    vmap(grad(problem.loss))(*many)
    assert batches == [("forward", 6), ("backward", 6)]


# -- what bends --------------------------------------------------------------------------------------------------------

x = sympy.symbols("x")
bent = tttc.elementwise(0.3 * x + sympy.Abs(x) * x**2)


class Bent(tttc.Variant):
    """A learner of functions that bend, with a loss that does."""

    W = tttc.state("D", "D", init=tttc.normal(0.3))
    P = tttc.state("D", "D", init=tttc.normal(0.3))
    mini_batch = 4
    update = tttc.sgd(lr=tttc.gate("lr"))

    def learner(self, x: Any) -> Any:
        h = x @ self.W
        return (tttc.where(h < 0, 0.5 * h, tttc.abs(h)) + tttc.sign(h) * h * h) @ self.P

    def loss(self, k: Any, v: Any) -> Any:
        return tttc.sum(tttc.huber(self.learner(k) - v, 0.5))


class Relu(tttc.Variant):
    W = tttc.state("D", "F", init=tttc.normal(0.5))
    P = tttc.state("F", "D", init=tttc.normal(0.5))
    mini_batch = 4
    update = tttc.sgd(lr=tttc.gate("lr"))

    def learner(self, x: Any) -> Any:
        return tttc.softmax(bent(tttc.relu(x @ self.W) @ self.P) + tttc.silu(x))

    def loss(self, k: Any, v: Any) -> Any:
        return 0.5 * tttc.sum((self.learner(k) - v) ** 2)


def clipped(**settings: Any) -> Any:
    return LIBRARY["DeltaNet"].replace(mini_batch=4, anchor="mini_batch", **settings)


BENT = {
    "bent": Bent,
    "relu": Relu,
    "clip": clipped(update=tttc.sgd(lr=tttc.gate("lr"), clip=0.5)),
    "clip_norm": clipped(update=tttc.sgd(lr=tttc.gate("lr"), at_end=tttc.clip_norm(0.3)), read="start"),
}


@pytest.mark.parametrize("checkpoint", [None, 1])
@pytest.mark.parametrize("name", BENT)
def test_double_backward_where_functions_bend(name, checkpoint):
    """A gradient penalty, against that of the oracle."""
    variant = BENT[name]
    layer = tttc.compile(variant, dims_of(variant, 3, 4), F64, backend="torch", checkpoint=checkpoint)
    inputs = random_inputs(layer.signature, layer.dims, 1, 6 if layer.signature.read != "end" else 4, 2)
    leaves = [x for x in inputs.named().values() if x.requires_grad]

    def penalty(run: Any) -> tuple[torch.Tensor, ...]:
        z, _ = run(inputs.q, inputs.k, inputs.v, gates=inputs.gates, params=inputs.params, state=inputs.state)
        found = torch.autograd.grad(z.square().sum(), leaves, create_graph=True, materialize_grads=True)
        total = sum(g.square().sum() for g in found)
        return torch.autograd.grad(total, leaves, materialize_grads=True, allow_unused=True)

    found, wanted = penalty(layer), penalty(lambda *a, **b: reference(variant, *a, **b))
    largest = max(float(w.norm()) for w in wanted)
    assert largest > 0
    assert all(float((g - w).norm()) <= CLOSE * largest for g, w in zip(found, wanted, strict=True))


# -- modules -----------------------------------------------------------------------------------------------------------


@every_backend
def test_an_ensemble_of_modules(backend):
    """`stack_module_state` and a vmap over `functional_call`, and the gradient of each of its members."""
    torch.manual_seed(0)
    blocks = [tttc.nn.TTT(LIBRARY["TTTLinear"], 8, 2, backend=backend, dtype=F64) for _ in range(3)]
    tokens = torch.randn(2, 5, 8, dtype=F64)
    params, buffers = stack_module_state(blocks)

    def call(own: Any, given: torch.Tensor) -> torch.Tensor:
        return functional_call(blocks[0], (own, buffers), (given,))

    found = vmap(call, (0, None))(params, tokens)
    close(found, [block(tokens) for block in blocks])
    gradients = vmap(grad(lambda own, given: call(own, given).square().sum()), (0, None))(params, tokens)
    for i, block in enumerate(blocks):
        wanted = torch.autograd.grad(block(tokens).square().sum(), list(block.parameters()), materialize_grads=True)
        close([gradients[n][i] for n, _ in block.named_parameters()], wanted)


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_a_graph_of_a_transform_is_refused(transform):
    """torch.compile around a transform: the operators of a graph would drop the tangents."""
    layer = tttc.compile(LIBRARY["DeltaNet"], {"D": 3}, F64, backend="torch")
    x, lr = torch.randn(2, 4, 1, 3, dtype=F64), torch.full((2, 4, 1), 0.1, dtype=F64)

    def z(q: torch.Tensor) -> torch.Tensor:
        return layer(q, x, x, gates={"lr": lr})[0]

    made = {"vmap": vmap(z), "grad": grad(lambda q: z(q).sum()), "jvp": lambda q: jvp(z, (q,), (q,))[1]}[transform]
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="out of the transform"):
        torch.compile(made, backend="aot_eager", fullgraph=True)(torch.stack([x, x]) if transform == "vmap" else x)
