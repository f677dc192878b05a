"""Native kernels where an axis has one entry, alone and together with others, and where tokens are matrices.

An axis of one entry is one that any other is mistaken for: a vector of it is a number, and its distance in memory may
be anything. Each declaration is dense, so that few kernels reach many of the ways in which a chunk is written.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np
import pytest
import torch

import tttc
from tests.helpers import differences, inputs_for, layer_result, oracle_result
from tttc.backends.memory import dense_from
from tttc.backends.tvm_common.loops import fuse_loops
from tttc.backends.tvm_common.statements import TOKENS, gathered, statements
from tttc.ir import build as b
from tttc.ir.adjoint import backward_block
from tttc.ir.expr import Axis, Expr, leaf, leaves, postorder
from tttc.ir.ops import align, evaluate
from tttc.ir.program import S_AXIS, T_AXIS, Assign, Program

pytestmark = pytest.mark.skipif(find_spec("tvm") is None, reason="apache-tvm is an extra: pip install 'tttc[tvm]'")


class Rows(tttc.Variant):
    """Tokens that are matrices, and a norm that has no affine part."""

    mini_batch = 2
    W = tttc.state("D", "E")
    q = tttc.token("J", "D")
    k = tttc.token("J", "D")
    v = tttc.token("J", "E")

    def learner(self, x):
        return tttc.rms_norm(x @ self.W, 1.0, eps=1e-2)

    def loss(self, k, v):
        return 0.5 * tttc.sum((self.learner(k) - v) ** 2)

    update = tttc.sgd(lr=tttc.gate("lr"))


class Dense(tttc.Variant):
    """States of none to three axes, a product that several read, a rate of each kind."""

    mini_batch = 2
    W = tttc.state("D", "F")
    scale = tttc.state(init=1.0)
    V = tttc.state("M", "F", "E")
    gain = tttc.param("E", init=1.0)
    v = tttc.token("E")

    def learner(self, x):
        h = tttc.tanh((x @ self.W) * self.scale)
        y = tttc.sum(tttc.einsum("f,mfe->me", h, self.V), axis=0)
        return tttc.softmax(y) + self.gain * y

    def loss(self, k, v):
        return 0.1 * tttc.mean((self.learner(k) - v) ** 2)

    update = tttc.sgd(
        lr=tttc.gate("lr"), average=tttc.gate("rho"), decay={"W": 0.9, "scale": tttc.gate("alpha"), "V": 1.0}
    )


class Online(tttc.Variant):
    """Gradients at the weights of the token before: a triangular system, with a decay for each channel."""

    anchor, mini_batch = "token", 3
    W = tttc.state("D", "E")
    v = tttc.token("E")

    def learner(self, x):
        return x @ self.W

    def loss(self, k, v):
        return 0.1 * tttc.sum((self.learner(k) - v) ** 2)

    update = tttc.sgd(lr=tttc.gate("lr", per="channel", axis="E"), decay=tttc.gate("alpha", per="channel", axis="E"))


class Moved(tttc.Variant):
    """Weights that every token moves before they are used: a matrix of tokens plus one of weights."""

    mini_batch, read = 2, "end"
    W = tttc.state("D", "E")
    P = tttc.token("D", "E")
    v = tttc.token("E")

    def learner(self, x):
        return x @ (self.W + self.P)

    def loss(self, k, v):
        return 0.1 * tttc.sum((tttc.sigmoid(self.learner(k)) - v) ** 2)

    update = tttc.sgd(lr=tttc.gate("lr"))


class Average(tttc.Variant):
    """Weights that are averaged channel by channel, and are used through a function."""

    mini_batch, read = 3, "end"
    W = tttc.state("D", "E")
    v = tttc.token("E")

    def learner(self, x):
        return x @ tttc.tanh(self.W)

    def loss(self, k, v):
        return 0.1 * tttc.sum(tttc.huber(self.learner(k) - v, 0.7))

    update = tttc.sgd(
        lr=tttc.gate("lr", per="channel", axis="D"), average=tttc.gate("rho", per="channel", axis="D"), clip=0.5
    )


KERNELS = [  # whole mini-batches where the kernels of an open one take long to compile
    (Rows, dict(D=1, E=1, J=1), 4),
    (Rows, dict(D=2, E=1, J=3), 4),
    (Dense, dict(D=1, E=1, F=1, M=1), 4),
    (Dense, dict(D=3, E=1, F=2, M=2), 2),
    (Online, dict(D=1, E=1), 1),
    (Online, dict(D=2, E=1), 5),
    (Online, dict(D=1, E=3), 5),
    (Moved, dict(D=1, E=1), 4),
    (Moved, dict(D=2, E=3), 4),
    (Average, dict(D=1, E=1), 3),
    (Average, dict(D=1, E=2), 6),
]


@pytest.mark.usefixtures("plain_kernels")
@pytest.mark.parametrize(("variant", "dims", "tokens"), KERNELS, ids=lambda x: getattr(x, "__name__", None))
def test_native_kernels_with_axes_of_one(variant, dims, tokens):
    """Outputs, final states and every gradient."""
    layer = tttc.compile(variant, dims, torch.float64, backend="tvm")
    inputs = inputs_for(layer, tokens, heads=2)
    assert not differences(layer_result(layer, inputs), oracle_result(variant, inputs))


def test_cotangents_of_one_entry_lie_at_any_distance():
    """What torch expands has no distance along an axis of one entry, and is called dense all the same."""
    layer = tttc.compile(Online, dict(D=2, E=1), torch.float64, backend="tvm")
    inputs = inputs_for(layer, 5)
    found = [_gradient(layer, inputs, weights) for weights in (torch.ones(1, 5, 1, 1, dtype=torch.float64), None)]
    assert torch.equal(*found)


def _gradient(layer, inputs, weights):
    z, _ = layer(inputs.q, inputs.k, inputs.v, gates=inputs.gates, params=inputs.params, state=inputs.state)
    (found,) = torch.autograd.grad(z.sum(), inputs.k) if weights is None else torch.autograd.grad(z, inputs.k, weights)
    return found


def test_dense_is_what_a_kernel_takes_for_it():
    x = torch.arange(6.0).as_strided((2, 3, 1), (3, 1, 0))
    assert dense_from(0, x).stride() == (3, 1, 1)
    assert torch.equal(dense_from(0, x), x)
    y = torch.arange(6.0).as_strided((1, 3, 2), (77, 2, 1))
    assert dense_from(0, y).stride() == (6, 2, 1)
    assert dense_from(1, y) is y
    assert dense_from(0, x.expand(2, 3, 4)).stride() == (12, 4, 1)
    assert dense_from(0, torch.empty(0, 3, 1).as_strided((0, 3, 1), (9, 9, 0))).stride() == (3, 1, 1)


# -- statements, without a kernel --------------------------------------------------------------------------------------

T_, S_, D, E = T_AXIS, S_AXIS, Axis("D", "D"), Axis("E", "E")
SIZES = {TOKENS: 3, "D": 2, "E": 4}


def value_of(e: Expr, variables: dict[str, np.ndarray], sizes: dict[str, int]) -> np.ndarray:
    """By the meaning that the table of operations gives."""
    known = {x: variables[x.name] for x in leaves([e])}
    for x, value in known.items():
        assert value.shape == tuple(sizes[a.size] for a in x.axes), f"{x!r} has shape {value.shape}"
    by_axis = {a.name: sizes[a.size] for x in postorder([e]) for a in (*x.axes, *([x.arg] if x.op == "size" else []))}
    return np.asarray(evaluate(e, known, by_axis))


def assert_statements_are(assigns: Sequence[Assign], program: Program, sizes: dict[str, int]) -> None:
    """Every statement in NumPy, in the order of the groups, each value as it was stored; and none gathers."""
    draw = np.random.default_rng(0)
    given = {e.name: draw.uniform(0.2, 0.9, [sizes[a.size] for a in e.axes]) for e in leaves(values(assigns))}
    stored = dict(given)
    made = [s for group in fuse_loops(statements(assigns, program)) for s in group.statements]
    assert len({s.name for s in made}) == len(made)
    for s in made:
        assert s.kind == "turn" or not gathered(s.value, s.lane), str(s)
        stored[s.name] = align(value_of(s.value, stored, sizes), s.value.axes, s.target.axes)
    for a in assigns:
        wanted = align(value_of(a.value, given, sizes), a.value.axes, a.target.axes)
        np.testing.assert_allclose(stored[a.leaf.name], np.broadcast_to(wanted, stored[a.leaf.name].shape), 1e-9, 1e-12)


def values(assigns: Sequence[Assign]) -> list[Expr]:
    return [a.value for a in assigns]


def block(*pairs: tuple[Expr, Expr]) -> list[Assign]:
    return [Assign(target, value) for target, value in pairs]


def variable(name: str, *axes: Axis) -> Expr:
    return leaf(name, "state", axes)


def test_a_value_is_read_along_each_of_its_axes():
    """Each copy has a name of its own."""
    x = variable("x", T_, D, E)
    made = block((variable("a", T_, E, D), b.apply("exp", x)), (variable("c", D, E, T_), b.apply("tanh", x)))
    assert_statements_are(made, Program("p", "", (), {}), SIZES)


def test_one_statement_reads_a_value_along_two_ways():
    """x + x.T of a square matrix, the second inside a function."""
    x, other = variable("x", D, Axis("D1", "D")), {D: Axis("D1", "D"), Axis("D1", "D"): D}
    turned = b.rename(b.apply("exp", b.mul(x, b.const(2.0))), other)
    made = block((variable("a", D, Axis("D1", "D")), b.add(x, turned)))
    assert_statements_are(made, Program("p", "", (), {}), SIZES)


def test_the_last_token_of_a_value_that_is_read_at_every_token():
    """Also where another token axis takes the name of the one whose last entry was read."""
    x = variable("x", T_, D)
    turned = b.rename(b.apply("tanh", b.last(b.mul(variable("y", T_, S_), b.const(2.0)), T_)), {S_: T_})
    made = block((variable("a", D, T_), b.mul(b.last(b.apply("exp", x), T_), x)), (variable("c", T_), turned))
    assert_statements_are(made, Program("p", "", (), {}), SIZES)


def test_a_walk_reads_a_value_that_lies_otherwise():
    x = variable("x", D, T_)
    made = block((variable("a", T_, D), b.cumprod(x, T_)), (variable("c", T_, D), b.shift(b.apply("exp", x), T_)))
    assert_statements_are(made, Program("p", "", (), {}), SIZES)


def test_a_contraction_that_several_read():
    """Also where one of them is a result under other names."""
    product = b.contract((variable("x", T_, D), variable("W", D, E)), (D,))
    renamed = b.rename(product, {T_: S_})
    made = block((variable("a", T_, E), b.add(product, b.const(1.0))), (variable("c", S_, E), renamed))
    assert_statements_are(made, Program("p", "", (), {}), SIZES)


@pytest.mark.parametrize("variant", [Rows, Dense, Online, Moved, Average])
@pytest.mark.parametrize("size", [1, 2])
def test_the_statements_of_a_chunk_are_the_chunk(variant, size):
    """Forward and backward of every scan."""
    dims = dict.fromkeys("DEFJM", size)
    program = tttc.compile(variant, dims, torch.float64, backend="tvm").stages.program
    for scan in program.scans:
        sizes = {**program.dims, TOKENS: 3 if scan.loops else 1}
        assert_statements_are(scan.block.assigns, program, sizes)
        if scan.differentiated:
            assert_statements_are(backward_block(program.adjoint_of(scan)), program, sizes)


MANY = """
import sys
import torch
import tttc

class Many(tttc.Variant):
    mini_batch, read, steps = 2, "end", 4
    W = tttc.state("D", "D")
    V = tttc.state("D", "D")

    def learner(self, x):
        return tttc.layer_norm(tttc.gelu(tttc.tanh(x @ self.W) @ self.V), 1.0, 0.0, eps=0.1)

    def loss(self, k, v):
        return 0.1 * tttc.sum((self.learner(k) - v) ** 2)

    update = tttc.sgd(lr=tttc.gate("lr"), decay=tttc.gate("alpha"))

layer = tttc.compile(Many, {"D": 2}, torch.float64, backend="tvm")
scan = layer._scans["many"]
scan.kernel(False, ())
sys.setrecursionlimit(sys.getrecursionlimit() // 4)
print(scan.kernel(True, ()).name)
"""


def test_the_statements_of_a_chunk_may_be_many():
    """What is declared for one of them ends with it: nothing is as deep as they are many."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", MANY], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "many_adjoint", done.stderr[-2000:]
