"""What comes from above as the loss: gradients of the states are then the vector-Jacobian product of the learner."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

import tttc
from tttc.errors import DeclarationError, TTTCError

BACKENDS = ["torch", *(["tvm"] if find_spec("tvm") else [])]


class SwiGLU(tttc.Variant):
    """The chunk learns at its end, from what the network says of each token."""

    mini_batch, read = "all", "start"
    W1, W3 = tttc.state("D", "F"), tttc.state("D", "F")
    W2 = tttc.state("F", "D")

    def learner(self, x):
        return (tttc.silu(x @ self.W1) * (x @ self.W3)) @ self.W2

    def loss(self, k):
        return tttc.upstream(self.learner(k))

    update = tttc.sgd(lr=1.0)


class Named(tttc.Variant):
    """States and params with every name that is near, and a loss of more than what comes from above."""

    mini_batch = 4
    k, v = tttc.token("D"), tttc.token("E")
    upstream, u, z = tttc.state("D", "E"), tttc.state("D", "E"), tttc.param("E", init=1.0)

    def learner(self, x):
        return tttc.tanh(x @ self.upstream) * self.z + x @ self.u

    def loss(self, k, v):
        return 0.5 * tttc.upstream(self.learner(k)) + 0.1 * tttc.sum((self.learner(k) - v) ** 2)

    update = tttc.sgd(lr=tttc.gate("lr"), momentum=0.5)


ONLINE = Named.replace(anchor="token", read="before")


@pytest.mark.parametrize(
    ("variant", "backend"), [*((SwiGLU, b) for b in BACKENDS), (Named, "torch"), (ONLINE, "torch")]
)
def test_equals_its_definition(variant, backend):
    found = tttc.verify(variant, {"D": 4, "F": 6, "E": 3}, tokens=11, backend=backend)
    assert found.ok, found


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_chunk_takes_one_step_along_the_vector_jacobian_product(backend):
    layer = tttc.compile(SwiGLU, {"D": 4, "F": 6}, torch.float64, backend=backend)
    x, u = torch.randn(2, 2, 5, 1, 4, dtype=torch.float64)
    state = {n: torch.randn(2, 1, *w.shape, dtype=torch.float64) for n, w in layer.init_state().items()}

    def learner(w):
        return (torch.nn.functional.silu(x @ w["W1"]) * (x @ w["W3"])) @ w["W2"]

    z, after = layer(x, x, u, state=state)
    wanted, pulled = torch.func.vjp(learner, {n: w.clone() for n, w in state.items()})
    assert torch.allclose(z, wanted, rtol=1e-12, atol=1e-12)
    for n, g in pulled(u)[0].items():
        assert torch.allclose(after[n], state[n] - g, rtol=1e-12, atol=1e-12), n
    stepped = None
    for t in range(5):  # decoding
        now = slice(t, t + 1)
        _, stepped = layer(x[:, now], x[:, now], u[:, now], state=state if stepped is None else stepped)
    for n in state:
        assert torch.allclose(stepped[n], after[n], rtol=1e-12, atol=1e-12), n


class Above(SwiGLU):
    """There is no v of the output."""

    def output(self, q):
        return tttc.upstream(self.learner(q))


class Unlike(SwiGLU):
    """z is wider than v."""

    def loss(self, k):
        return tttc.upstream(k @ self.W1)


class Neither(SwiGLU):
    """A loss of no token."""

    def loss(self):
        return tttc.sum(self.W1)


@pytest.mark.parametrize(
    ("variant", "said"),
    [
        (Above, ["tttc.upstream outside of `loss`", "return tttc.upstream(self.learner(q))", "self.u"]),
        (Unlike, ["[F] and [D]", "upstream(k @ self.W1)", 'v = tttc.token("F")']),
        (Neither, ["in loss: TypeError", "takes 1 positional argument but 3 were given"]),
    ],
)
def test_what_has_nothing_above_it_is_refused_with_the_line(variant, said):
    with pytest.raises(DeclarationError) as raised:
        tttc.compile(variant, {"D": 4, "F": 6})
    assert all(part in str(raised.value) for part in said), raised.value


def test_outside_of_a_declaration_there_is_nothing_above():
    with pytest.raises(TTTCError, match=r"outside of `loss`"):
        tttc.upstream(torch.ones(3))
