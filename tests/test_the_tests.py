"""Faults injected on purpose: each must turn the comparison red, or the other tests prove nothing.

Every fault is a small one that a compiler of this kind can have. The same comparison without it is green.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

import pytest
import torch

import tttc
from tests.helpers import Result, compiled, differences, inputs_for, layer_result, oracle_result
from tttc.ir import build as b
from tttc.ir.expr import OPS, Expr, transform
from tttc.ir.program import Assign
from tttc.library import GatedThreeLayer, LinearAttention, TTTLinear
from tttc.verify import Row, verify

compiler = import_module("tttc.compile")  # the attribute `tttc.compile` is the function
api = import_module("tttc.api")
TOKENS = 10  # two mini-batches of 4 and a tail of 2


class Tanh(tttc.Variant):
    """A learner with a nonlinearity, a learning rate and a reading scale."""

    mini_batch = 4
    W = tttc.state("D", "D")
    b = tttc.state("D")

    def learner(self, x):
        return tttc.tanh(x @ self.W + self.b)

    def loss(self, k, v):
        return 0.5 * tttc.sum((self.learner(k) - v) ** 2)

    update = tttc.sgd(lr=tttc.gate("lr"), read_scale=tttc.gate("tau"))


def verified(variant=Tanh, **settings):
    return verify(variant.replace(mini_batch=4, **settings), {"D": 3, "F": 4}, tokens=TOKENS)


def wrong_rows(found):
    return {row.name for row in found.rows if not row.ok}


def after_stage(monkeypatch, name, change):
    """Change what a stage of the compiler makes."""
    stages = [
        replace(s, run=lambda p, o, run=s.run: change(run(p, o))) if s.name == name else s for s in compiler.PIPELINE
    ]
    monkeypatch.setattr(compiler, "PIPELINE", tuple(stages))


def test_without_a_fault_everything_is_green():
    for variant in (Tanh, TTTLinear, LinearAttention, GatedThreeLayer):
        for read in ("after", "before", "start", "end"):
            assert verified(variant, read=read).ok


# -- derivatives --------------------------------------------------------------------------------------------


def test_a_wrong_derivative(monkeypatch):
    """tanh' = (1 - tanh)**2 instead of 1 - tanh**2: the updates are wrong, and all that follows."""
    right = b.partial
    wrong = lambda y, i: b.power(b.sub(b.const(1), y), 2) if y.op == "tanh" else right(y, i)  # noqa: E731
    monkeypatch.setattr(b, "partial", wrong)
    assert {"z", "state W", "state b", "grad q", "grad W"} <= wrong_rows(verified())


def test_a_wrong_derivative_of_the_outer_loop_alone(monkeypatch):
    """The forward is right, the backward is not: only gradients turn red."""
    right = b.partial
    wrong = lambda y, i: b.mul(b.const(1 + 1e-9), right(y, i)) if y.op == "tanh" else right(y, i)  # noqa: E731
    adjoint = compiler.PIPELINE[-1].run

    def faulty(program, options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(b, "partial", wrong)
            return adjoint(program, options)

    monkeypatch.setattr(compiler, "PIPELINE", (*compiler.PIPELINE[:-1], replace(compiler.PIPELINE[-1], run=faulty)))
    wrong_ones = wrong_rows(verified())
    assert {"grad q", "grad W"} <= wrong_ones
    assert not {"z", "state W", "state b"} & wrong_ones


def test_a_missing_term_of_a_gradient(monkeypatch):
    """The second operand of a product gets no cotangent."""
    row = OPS["contract"]
    monkeypatch.setitem(
        OPS,
        "contract",
        replace(row, adjoint=lambda g, y, *src: (row.adjoint(g, y, *src)[0], *[None] * (len(src) - 1))),
    )
    assert not verified().ok


def test_a_wrong_sign(monkeypatch):
    row = OPS["sub"]
    monkeypatch.setitem(OPS, "sub", replace(row, adjoint=lambda g, y, a, c: (row.adjoint(g, y, a, c)[0], g)))
    assert not verified(TTTLinear).ok


# -- masks and carries --------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [Tanh, TTTLinear, LinearAttention, GatedThreeLayer])
@pytest.mark.parametrize("read", ["after", "before"])
def test_a_mask_off_by_one(monkeypatch, variant, read):
    """A token that does not see itself, or that does: the outputs are wrong, the weights are not."""
    after_stage(monkeypatch, "schedule", lambda p: replace(p, scans=tuple(map(off_by_one, p.scans))))
    wrong = wrong_rows(verified(variant, read=read))
    assert {"z", "grad q"} <= wrong
    assert not any(name.startswith("state") for name in wrong)


def off_by_one(scan):
    """The same scan with every mask strict that is not, and the other way round."""

    def visit(e, src):
        flipped = (*e.arg[:2], not e.arg[2]) if e.op == "mask" else e.arg
        return Expr(e.op, src, flipped)

    return replace(scan, outputs=tuple(Assign(a.target, *transform([a.value], visit)) for a in scan.outputs))


def test_a_stale_carry(monkeypatch):
    """The weights that a chunk hands on are those that it was given."""
    after_stage(monkeypatch, "schedule", lambda p: replace(p, scans=tuple(map(stale, p.scans))))
    assert {"z", "state W", "grad k"} <= wrong_rows(verified())


def stale(scan):
    return replace(scan, updates=tuple(Assign(a.target, a.target) for a in scan.updates)) if scan.loops else scan


def test_a_tail_that_is_dropped(monkeypatch):
    """The tokens after the last whole mini-batch change nothing: right where there are none."""
    load = api.torch_backend.load
    monkeypatch.setattr(api.torch_backend, "load", lambda s, p: {n: without_tail(n, x) for n, x in load(s, p).items()})
    assert {"state W", "state b", "grad v"} <= wrong_rows(verified())
    assert verify(Tanh, {"D": 3}, tokens=8).ok


class Dropped:
    """A scan of the open mini-batch that leaves what it carries as it was."""

    def __init__(self, scan):
        self.scan = scan

    def forward(self, inputs, checkpoint):
        (z, *carry), saved = self.scan.forward(inputs, checkpoint)
        return (z, *(torch.zeros_like(x) for x in carry)), saved

    def backward(self, inputs, saved, checkpoint, cotangents):
        return self.scan.backward(
            inputs, saved, checkpoint, (cotangents[0], *(torch.zeros_like(x) for x in cotangents[1:]))
        )


def without_tail(name, scan):
    return Dropped(scan) if name.endswith("_open") else scan


# -- rates --------------------------------------------------------------------------------------------------


def with_update(**changes):
    return lambda program: replace(program, update=replace(program.update, **changes))


def test_a_missing_tau(monkeypatch):
    after_stage(monkeypatch, "declare", with_update(tau={"W": None, "b": None}))
    assert {"z", "state W", "state b", "grad tau"} <= wrong_rows(verified())


def test_a_missing_learning_rate(monkeypatch):
    after_stage(monkeypatch, "declare", with_update(lr={"W": b.const(0.1), "b": b.const(0.1)}))
    assert {"z", "state W", "state b", "grad lr"} <= wrong_rows(verified())


def test_two_learning_rates_exchanged(monkeypatch):
    """A rate per state, handed to the wrong state."""

    def exchanged(program):
        lr = dict(program.update.lr)
        lr["W1"], lr["Wg"] = lr["Wg"], lr["W1"]
        return replace(program, update=replace(program.update, lr=lr))

    after_stage(monkeypatch, "declare", exchanged)
    assert not verified(GatedThreeLayer).ok


def test_another_mini_batch(monkeypatch):
    """Gradients taken at the start of a mini-batch of 5 instead of 4: right only while there is one."""
    after_stage(monkeypatch, "declare", with_update(mini_batch=5))
    assert not verified().ok


@pytest.mark.parametrize(
    ("declared", "compiled_as"),
    [("after", "before"), ("before", "start"), ("start", "end"), ("end", "after")],
)
def test_another_read(monkeypatch, declared, compiled_as):
    after_stage(monkeypatch, "declare", with_update(read=compiled_as))
    assert "z" in wrong_rows(verified(read=declared))


# -- the comparison itself ----------------------------------------------------------------------------------


def test_a_row_is_red_for_nan_and_for_too_much():
    assert Row("z", 1e-13, 1e-12).ok
    assert not Row("z", 1e-11, 1e-12).ok
    assert not Row("z", float("nan"), 1e-12).ok
    assert not Row("z", float("inf"), 1e-12).ok


@pytest.mark.parametrize("part", ["z", "final", "gradients"])
@pytest.mark.parametrize("fault", ["nan", "last digit", "shape"])
def test_the_comparison_sees_a_single_entry(part, fault):
    """One wrong number among all, a NaN, or another shape."""
    layer = compiled("TTTLinear", mini_batch=4)
    inputs = inputs_for(layer, TOKENS)
    found, wanted = layer_result(layer, inputs), oracle_result(layer.signature.variant, inputs)
    assert not differences(found, wanted)
    value = getattr(found, part)
    name = "W1"
    spoiled = broken(value if part == "z" else value[name], fault)
    changed = spoiled if part == "z" else {**value, name: spoiled}
    assert differences(Result(**(found._asdict() | {part: changed})), wanted)


def broken(x, fault):
    if fault == "shape":
        return x[None]
    x = x.detach().clone()
    x.view(-1)[0] += float("nan") if fault == "nan" else 1e-8
    return x


def test_fresh_memory_is_poisoned():
    """What the fixture of conftest.py promises."""
    assert torch.isnan(torch.empty(3)).all()
    assert torch.isnan(torch.zeros(2).new_empty(3)).all()
    assert torch.isnan(torch.empty_like(torch.zeros(3))).all()
    assert torch.empty(3, dtype=torch.int64).dtype == torch.int64
