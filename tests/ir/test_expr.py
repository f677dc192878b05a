"""The expression: interned, immutable, and of any depth."""

from __future__ import annotations

import copy
import gc
import pickle
import threading

import pytest

from tttc.ir import build as b
from tttc.ir.differentiate import lower_composites, vjp
from tttc.ir.expr import OPS, Axis, const, leaf, leaves, postorder, substitute, transform
from tttc.ir.linearity import dependence
from tttc.ir.program import S_AXIS, T_AXIS
from tttc.ir.rewrite import rewrite
from tttc.ir.simplify import RULES, simplify

D, E = Axis("D", "D"), Axis("E", "E")
DEPTH = 20_000  # twenty times Python's recursion limit


def x():
    return leaf("x", "token", (D,))


def deep(depth=DEPTH):
    """tanh(... tanh(tanh(x) + x) ... + x)"""
    node = x()
    for _ in range(depth // 2):
        node = b.add(b.apply("tanh", node), x())
    return node


def test_equal_structure_is_the_same_node():
    W = leaf("W", "state", (D, E))
    assert leaf("W", "state", (D, E)) is W
    assert b.contract((x(), W), (D,)) is b.contract((x(), W), (D,))
    assert b.add(b.mul(x(), const(2)), x()) is b.add(b.mul(x(), const(2.0)), x())


def test_other_structure_is_another_node():
    nodes = [
        x(),
        leaf("y", "token", (D,)),
        leaf("x", "param", (D,)),
        leaf("x", "token", (E,)),
        leaf("x", "token", (D,), "c"),
        b.neg(x()),
        b.sub(x(), const(1)),
        b.sub(const(1), x()),
        b.power(x(), 2),
        b.power(x(), 3),
    ]
    assert len(set(nodes)) == len(nodes)


def test_interning_holds_nothing_alive():
    b.mul(leaf("short_lived", "token", (D,)), const(17.5))
    gc.collect()
    from tttc.ir import expr

    assert not any(e.op == "leaf" and e.name == "short_lived" for e in list(expr._interned.values()))


def test_interning_across_threads():
    """The same graph from many threads at once is one node."""
    made = []

    def make():
        node = x()
        for i in range(200):
            node = b.add(b.apply("tanh", node), const(i))
        made.append(node)

    threads = [threading.Thread(target=make) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(made) == 8
    assert all(node is made[0] for node in made)


@pytest.mark.parametrize("attribute", ["op", "src", "arg", "axes", "anything"])
def test_nodes_cannot_be_changed(attribute):
    with pytest.raises(AttributeError, match="immutable"):
        setattr(x(), attribute, None)


def test_pickling_and_copying_keep_identity():
    e = b.contract((b.apply("tanh", x()), leaf("W", "state", (D, E))), (D,))
    assert pickle.loads(pickle.dumps(e)) is e
    assert copy.deepcopy(e) is e
    assert copy.copy(e) is e


def test_deep_graphs():
    """Building, walking, substituting, rewriting and classifying: none by Python recursion."""
    e = deep()
    assert deep() is e
    assert len(postorder([e])) == DEPTH + 1
    assert leaves([e]) == [x()]
    y = leaf("y", "token", (D,))
    assert leaves(substitute([e], {x(): y})) == [y]
    assert transform([e], lambda node, src: x()) == [x()]
    assert simplify([e]) == [e]
    assert rewrite([b.mul(e, const(1))], RULES) == [e]
    assert dependence(e, [x()]).dependence.name == "NONLINEAR"
    assert lower_composites([e], [x()]) == [e]


def test_the_derivative_of_a_deep_graph():
    e = deep(DEPTH // 5)
    (g,), _ = vjp([(e, const(1))], [x()])
    assert len(postorder([g])) > DEPTH // 5


def test_long_sums():
    """More terms than Python allows calls: no rule goes down a sum by recursion."""
    e = x()
    for i in range(1100):
        e = b.add(e, b.apply("tanh", b.mul(const(i + 2), x())))
    assert all(rule.apply(e) is None for rule in RULES)


def test_every_rule_reaches_into_a_deep_graph():
    """A term at the bottom is simplified like one at the top."""
    e = b.mul(x(), const(1))
    for _ in range(DEPTH):
        e = b.apply("tanh", e)
    wanted = x()
    for _ in range(DEPTH):
        wanted = b.apply("tanh", wanted)
    assert simplify([e]) == [wanted]


def test_postorder_puts_operands_first_and_each_node_once():
    e = b.add(b.mul(x(), x()), b.apply("tanh", b.mul(x(), x())))
    order = postorder([e, x()])
    assert len(order) == len(set(order)) == 4
    assert all(order.index(s) < order.index(node) for node in order for s in node.src)


def test_types_follow_from_the_operands():
    W, t, s = leaf("W", "state", (D, E)), T_AXIS, S_AXIS
    k = leaf("k", "token", (t, D), "c")
    assert b.contract((k, W), (D,)).axes == (t, E)
    assert b.contract((k, b.rename(k, {t: s})), (D,)).axes == (t, s)
    assert b.add(leaf("b", "state", (E,)), b.contract((k, W), (D,))).axes == (t, E)
    assert b.mean(W, (E,)).axes == (D,)
    assert b.broadcast(leaf("lr", "gate", (t,), "c"), (t, s)).axes == (t, s)
    assert b.rename(W, {D: E, E: D}).axes == (E, D)
    assert b.last(k, t).axes == (D,)
    assert b.put_last(x(), t).axes == (t, D)


def test_every_row_has_a_name_and_a_type_rule():
    assert all(op.name == name and callable(op.infer) for name, op in OPS.items())
