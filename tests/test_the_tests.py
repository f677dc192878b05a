"""Faults injected on purpose: each must turn the comparison red, or the other tests prove nothing.

Every fault is a small one that a compiler of this kind can have. The same comparison without it is green.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

import pytest
import torch

import tttc
from tests.helpers import (
    LIBRARY,
    Result,
    compiled,
    differences,
    inputs_for,
    layer_result,
    oracle_result,
    result_of,
    split_call,
)
from tttc.backends import torch as torch_backend
from tttc.ir import build as b
from tttc.ir.expr import OPS, Expr, transform
from tttc.ir.names import prefixed
from tttc.ir.program import Assign, ScanKind
from tttc.ir.response import Response
from tttc.library import GatedThreeLayer, LinearAttention, TTTLinear
from tttc.runtime.arguments import BoundCall
from tttc.runtime.state import State
from tttc.verification.comparison import Row, verify

compiler = import_module("tttc.compiler.pipeline")  # the attribute `tttc.compile` is the function
sequencing = import_module("tttc.runtime.sequencing")
torch_ops = import_module("tttc.backends.torch.ops")
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


def verified(variant=Tanh, *, chunk=None, **settings):
    return verify(variant.replace(mini_batch=4, **settings), {"D": 3, "F": 4}, tokens=TOKENS, heads=1, chunk=chunk)


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
    adjoint = next(s for s in compiler.PIPELINE if s.name == "adjoint")

    def faulty(program, options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(b, "partial", wrong)
            return adjoint.run(program, options)

    stages = [replace(s, run=faulty) if s is adjoint else s for s in compiler.PIPELINE]
    monkeypatch.setattr(compiler, "PIPELINE", tuple(stages))
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
    load = torch_backend.load_scans

    def cut(source, program, settings, place):
        return {n: without_tail(n, x) for n, x in load(source, program).items()}

    monkeypatch.setattr(torch_backend, "load_scans", cut)
    assert {"state W", "state b", "grad v"} <= wrong_rows(verified())
    assert verify(Tanh, {"D": 3}, tokens=8).ok


class Dropped:
    """A scan of the open mini-batch that leaves what it carries as it was."""

    accepts_16bit, pull = False, None

    def __init__(self, scan):
        self.scan = scan

    def prewarm_backward(self, inputs):
        self.scan.prewarm_backward(inputs)

    def forward(self, inputs, checkpoint):
        (z, *carry), saved = self.scan.forward(inputs, checkpoint)
        return (z, *(torch.zeros_like(x) for x in carry)), saved

    def backward(self, inputs, saved, checkpoint, cotangents):
        return self.scan.backward(
            inputs, saved, checkpoint, (cotangents[0], *(torch.zeros_like(x) for x in cotangents[1:]))
        )


def without_tail(name, scan):
    return Dropped(scan) if name.endswith("_open") else scan


# -- momentum, decay, online gradients ----------------------------------------------------------------------


def test_without_a_fault_every_rule_is_green():
    """The declarations of this part and of the next one; their open mini-batches are carried as sums."""
    linear = ("Mamba2", "GLA", "DeltaNet", "GatedDeltaNet", "KDA", "MomentumDeltaNet")
    for name in (*linear, "Titans", "LaCT", "Moneta", "ViTTT"):
        assert verified(LIBRARY[name]).ok, name
        assert compiled(name, 3, 4, mini_batch=4).decode == "sums", name


@pytest.mark.parametrize("name", ["Mamba2", "GLA", "GatedDeltaNet", "Titans"])
def test_a_product_of_decays_off_by_one(monkeypatch, name):
    """The decay of the source token instead of that of the reading one: a[s] ... a[t - 1]."""
    right = b.segprod
    monkeypatch.setattr(b, "segprod", lambda a, rows, columns: right(b.shift(a, rows, 1.0), rows, columns))
    assert {"z", "grad k", "grad v"} <= wrong_rows(verified(LIBRARY[name]))


@pytest.mark.parametrize("part", ["later", "forward"])
def test_a_kernel_with_a_wrong_triangle(monkeypatch, part):
    """The helper of the generated code, with one token too many or too few in each product."""
    text = torch_ops.HELPERS["segprod"]
    old, new = {"later": (".tril(-1)", ".tril()"), "forward": (".tril().view", ".tril(-1).view")}[part]
    assert old in text
    monkeypatch.setitem(torch_ops.HELPERS, "segprod", text.replace(old, new))
    assert {"z", "grad k"} <= wrong_rows(verified(LIBRARY["Mamba2"]))


@pytest.mark.parametrize("name", ["Mamba2", "GLA", "Titans"])
def test_a_token_that_sees_itself_under_decay(monkeypatch, name):
    """read="before" with the triangle of "after": the outputs are wrong, the weights are not."""
    monkeypatch.setattr(Response, "before", lambda self: self)
    wrong = wrong_rows(verified(LIBRARY[name], read="before"))
    assert {"z", "grad q"} <= wrong
    assert not any(row.startswith("state") for row in wrong)


@pytest.mark.parametrize("name", ["GatedDeltaNet", "KDA", "MomentumDeltaNet"])
def test_an_anchor_one_token_late(monkeypatch, name):
    """The online gradient at W_t instead of W_{t-1}, which only the products of rates can tell apart: of the rest the
    system reads what lies below the diagonal.
    """
    monkeypatch.setattr(Response, "before", lambda self: self)
    assert {"z", "state W", "grad k"} <= wrong_rows(verified(LIBRARY[name]))


def test_a_system_solved_by_the_wrong_triangle(monkeypatch):
    """Forward and backward exchanged: the first token depends on the last."""
    text = torch_ops.HELPERS["solve"]
    assert "upper=upper" in text
    monkeypatch.setitem(torch_ops.HELPERS, "solve", text.replace("upper=upper", "upper=not upper"))
    assert {"z", "state W", "grad k"} <= wrong_rows(verified(LIBRARY["DeltaNet"]))


def test_a_backward_that_solves_the_same_system_again(monkeypatch):
    """The transpose forgotten: the forward is right, the gradients are not."""
    row = OPS["solve"]

    def untransposed(g, y, matrix, right):
        known, unknown = y.arg
        dx = b.solve(matrix, b.rename(b.broadcast(g, y.axes), {unknown: known}), known, unknown)
        return row.adjoint(g, y, matrix, right)[0], b.rename(dx, {unknown: known})

    monkeypatch.setitem(OPS, "solve", replace(row, adjoint=untransposed))
    wrong = wrong_rows(verified(LIBRARY["DeltaNet"]))
    assert {"grad k", "grad v", "grad W"} <= wrong
    assert not {"z", "state W"} & wrong


# -- the borders of a mini-batch ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Titans", "LaCT", "Moneta", "MomentumDeltaNet"])
def test_a_stale_memory(monkeypatch, name):
    """Momentum, or what a view accumulates, stays what it was where the sequence began: right for one mini-batch."""
    after_stage(monkeypatch, "schedule", lambda p: replace(p, scans=tuple(map(forgetful, p.scans))))
    assert "z" in wrong_rows(verified(LIBRARY[name], chunk=4))
    assert verify(LIBRARY[name].replace(mini_batch=4), {"D": 3, "F": 4}, tokens=4, chunk=4).ok


def forgetful(scan):
    kept = (Assign(a.target, a.target) if a.leaf.role == "memory" and scan.carry else a for a in scan.updates)
    return replace(scan, updates=tuple(kept))


@pytest.mark.parametrize("variable", ["S", "a"])
def test_an_open_mini_batch_that_loses_its_tail(monkeypatch, variable):
    """What the last tokens added, or how much they forgot: right where there is no tail."""

    def losing(scan):
        kept = (Assign(a.target, a.target) if a.leaf.name == prefixed(variable, "W1") else a for a in scan.updates)
        return replace(scan, updates=tuple(kept))

    after_stage(monkeypatch, "schedule", lambda p: replace(p, scans=tuple(map(losing, p.scans))))
    assert "state W1" in wrong_rows(verified(LIBRARY["Titans"]))
    assert verify(LIBRARY["Titans"].replace(mini_batch=4), {"D": 3, "F": 4}, tokens=8).ok


def test_an_open_mini_batch_that_loses_a_token(monkeypatch):
    """Where an open mini-batch is carried as its tokens: the last one is handed on as zeros."""

    class Losing(State):
        def __init__(self, *parts, **named):
            super().__init__(*parts, **named)
            self.rows = {n: torch.cat([x[:, :-1], 0 * x[:, -1:]], 1) for n, x in self.rows.items()}

    layer = compiled("MTTT", 3, mini_batch=4, read="start")
    inputs = inputs_for(layer, TOKENS)
    wanted = layer_result(layer, inputs)
    assert not differences(result_of(*split_call(layer, inputs, [6]), inputs), wanted)
    monkeypatch.setattr(sequencing, "State", Losing)
    assert differences(result_of(*split_call(layer, inputs, [6]), inputs), wanted)
    assert not differences(result_of(*split_call(layer, inputs, [4]), inputs), wanted)


@pytest.mark.parametrize("name", ["LaCT", "ViTTT"])
def test_no_stage_for_a_mini_batch_that_ends_early(monkeypatch, name):
    """The weights that a ragged tail hands on go through no stage: what is read before is right."""
    after_stage(monkeypatch, "schedule", lambda p: replace(p, scans=tuple(map(unstaged, p.scans))))
    settings = {"mini_batch": 4, "read": "start"}
    wrong = wrong_rows(verify(LIBRARY[name].replace(**settings), {"D": 3, "F": 4}, tokens=TOKENS))
    assert {"state W1", "state W2"} <= wrong
    assert "z" not in wrong
    assert verify(LIBRARY[name].replace(**settings), {"D": 3, "F": 4}, tokens=8).ok


def unstaged(scan):
    """The end of a mini-batch without its stages: W - S."""
    if scan.kind is not ScanKind.CLOSE:
        return scan
    sums = {p.name: p for p in scan.fixed}
    plain = [
        b.sub(a.target, sums[prefixed("S", a.leaf.name)]) if a.leaf.role == "state" else a.value for a in scan.updates
    ]
    return replace(scan, updates=tuple(Assign(a.target, x) for a, x in zip(scan.updates, plain, strict=True)))


def test_tau_of_the_wrong_token(monkeypatch):
    """A whole mini-batch hands on what tau of its last token says, here that of the token before it."""
    right = b.last
    monkeypatch.setattr(b, "last", lambda a, axis: right(b.shift(a, axis, 1.0) if is_tau(a) else a, axis))
    assert {"z", "state W", "state b", "grad tau"} <= wrong_rows(verified())


def test_tau_of_the_wrong_token_where_a_mini_batch_ends_early(monkeypatch):
    """The same where the sequence ends: only the weights that it hands on are wrong."""
    right = BoundCall.value

    def early(self, p, values, now, stop):
        before = is_tau(p) and not p.at
        return right(self, p, values, now - before, stop - before)

    monkeypatch.setattr(BoundCall, "value", early)
    wrong = wrong_rows(verified())
    assert {"state W", "state b", "grad tau"} <= wrong
    assert "z" not in wrong


def is_tau(e):
    return e.op == "leaf" and e.name == "tau"


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
