"""Which rules are linear recurrences of one matrix: by what they are, and not by what they are called."""

from __future__ import annotations

import pytest
import torch

import tttc
from tests.helpers import LIBRARY, Result, differences, dims_of, inputs_for, oracle_result
from tttc.errors import BackendRefusal
from tttc.export import onnx as export
from tttc.ir.linear_recurrence import linear_recurrence
from tttc.library import DeltaNet, LinearAttention, TTTLinear

pytest.importorskip("onnxruntime", reason="onnxruntime is an extra: pip install 'tttc[onnx]'")

RULES = ("GatedDeltaNet", "GLA", "KDA", "DeltaNet", "LinearAttention", "RetNet", "Mamba2", "Longhorn")


class Delta(tttc.Variant):
    """What the others below change."""

    anchor = "token"
    W = tttc.state("D", "E", init=tttc.normal(0.3))
    v = tttc.token("E")

    def learner(self, x):
        return x @ self.W

    def loss(self, k, v):
        return 0.5 * tttc.sum((self.learner(k) - v) ** 2)

    update = tttc.sgd(lr=tttc.gate("lr", scale=0.2), decay=tttc.gate("decay"), decay_first=True)


class Turned(Delta):
    """The weights stand the other way round; a decay for each of their columns is one for each key channel."""

    W = tttc.state("E", "D", init=tttc.normal(0.3))

    def learner(self, x):
        return x @ self.W.T

    decays = tttc.gate("decay", per="channel")
    update = tttc.sgd(lr=tttc.gate("lr", scale=0.2), decay=decays, decay_first=True)


class Scaled(Delta):
    """Keys and errors in other scales, and a weight of its own for each token."""

    weight = tttc.gate("weight")

    def learner(self, x):
        return (-2.0 * x) @ self.W

    def loss(self, k, v):
        return 0.05 * self.weight * tttc.sum((v - self.learner(k) / 4.0) ** 2)


class Surrounded(Delta):
    """What is read goes through more, together with its token and a param."""

    gain = tttc.param("E", init=1.5)

    def output(self, q):
        return tttc.tanh(self.gain * self.learner(q)) + tttc.sum(q)


class Weighted(LinearAttention):
    """A rate for each channel of the values, and a decay that is a number."""

    strength = tttc.gate("strength", per="channel")

    def loss(self, k, v):
        return -tttc.dot(self.learner(k), self.strength * v)

    update = tttc.sgd(lr=0.5, decay=0.9)


class Paired(Delta):
    """A key that is made of two tokens, and no target."""

    def loss(self, k, v):
        return 0.3 * tttc.sum(self.learner(k * tttc.tanh(self.x)) ** 2)

    x = tttc.token("D")


OWN = {v.__name__: v for v in (Turned, Scaled, Surrounded, Weighted, Paired)}


# -- those that are nearly one -----------------------------------------------------------------------------------------


class Normalised(Delta):
    def learner(self, x):
        return tttc.l2_norm(x @ self.W, eps=1e-6)


class Biased(Delta):
    c = tttc.state("E")

    def learner(self, x):
        return x @ self.W + self.c


class ReadTwice(Delta):
    def output(self, q):
        return q @ self.W + tttc.tanh(self.x @ self.W)

    x = tttc.token("D")


class EntryByEntry(Delta):
    rates = tttc.gate("weight", per="channel", axis="E")

    def loss(self, k, v):
        return 0.1 * tttc.sum(self.rates * (self.learner(k) - v) ** 2)


class Ridge(Delta):
    def loss(self, k, v):
        return 0.1 * tttc.sum((self.learner(k) - v) ** 2) + 0.01 * tttc.sum(self.W * self.W)


class OtherKey(Delta):
    def loss(self, k, v):
        return 0.1 * tttc.dot(self.learner(k) - v, self.learner(self.x))

    x = tttc.token("D")


class Before(Delta):
    read = "before"


class Late(Delta):
    update = tttc.sgd(lr=tttc.gate("lr", scale=0.2), decay=tttc.gate("decay"))


class Frozen(DeltaNet):
    anchor, mini_batch = "mini_batch", 4


class Pushed(Delta):
    update = tttc.sgd(lr=tttc.gate("lr", scale=0.2), momentum=tttc.gate("momentum"))


class Columns(LinearAttention):
    W = tttc.state("D", "E")
    v = tttc.token("E")
    update = tttc.sgd(lr=1.0, decay=tttc.gate("decay", per="channel", axis="E"))


NEAR = (Normalised, Biased, ReadTwice, EntryByEntry, Ridge, OtherKey, Before, Late, Frozen, Pushed, Columns)


def compiled(variant):
    return tttc.compile(variant, dims_of(variant, 3, 5) | {"E": 4}, torch.float32, backend="torch")


CASES = [(n, "com.microsoft") for n in (*RULES, *OWN)] + [(n, "ai.onnx") for n in ("GLA", "KDA", *OWN)]


@pytest.mark.parametrize(("name", "linear"), CASES)
def test_a_rule_of_the_operator_is_one_node(name, linear):
    """Decays of zero, in one call also below it, any number of tokens, none among them: within 1e-5."""
    variant = OWN[name] if name in OWN else LIBRARY[name]
    layer = compiled(variant)
    exported = export.model(layer, linear)
    assert sum(n.op_type == "LinearAttention" for n in nodes(exported)) == 1
    session = export.Session(exported.SerializeToString())
    for tokens in (0, 1, 9, 37):
        inputs = inputs_for(layer, tokens, batch=2, heads=2)
        with torch.no_grad():
            if "decay" in inputs.gates:
                inputs.gates["decay"][:, 1::5] *= -1.0 if tokens == 9 else 1.0
                inputs.gates["decay"][:, 4::7] = 0.0
        wanted = oracle_result(variant, inputs)._replace(gradients={})
        z, state = session(export.arrays(layer, session, inputs))
        final = {n: torch.from_numpy(state[f"past_{n}"]).double() for n in wanted.final}
        assert differences(Result(torch.from_numpy(z).double(), final, {}), wanted, 1e-5, 1e-5) == ""


@pytest.mark.parametrize("variant", [*NEAR, TTTLinear, LIBRARY["MomentumDeltaNet"]])
def test_what_is_nearly_one_is_none(variant):
    assert linear_recurrence(compiled(variant).stages.program) is None


def test_one_that_is_asked_for_and_is_none_is_refused():
    with pytest.raises(BackendRefusal, match=r"TTTLinear.* no rule of ai\.onnx's LinearAttention.*\n  Take linear"):
        export.text(compiled(TTTLinear), "ai.onnx")
    assert "Scan <" in export.text(compiled(DeltaNet), "scan")


def nodes(model):
    """All nodes of a model, of its functions and of what stands inside of nodes."""
    waiting = [*model.graph.node, *(n for f in model.functions for n in f.node)]
    while waiting:
        node = waiting.pop()
        yield node
        waiting += [n for a in node.attribute if a.HasField("g") for n in a.g.node]
