"""What a program may hold after each stage: whatever else a stage makes is refused by the history, always."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

import tttc
from tests.helpers import VARIANTS
from tttc.compiler import pipeline
from tttc.ir import build as b
from tttc.ir.expr import Expr, leaf
from tttc.ir.program import T_AXIS, Allocate, Assign, Block, LoopProgram, Restore, Save
from tttc.ir.spec import SPECS
from tttc.ir.verify import MalformedProgram


def compiled_with(monkeypatch, stage, change):
    """A declaration compiled where one stage makes something else."""
    stages = [
        replace(s, run=lambda p, o, run=s.run: change(run(p, o))) if s.name == stage else s for s in pipeline.PIPELINE
    ]
    monkeypatch.setattr(pipeline, "PIPELINE", tuple(stages))
    return tttc.compile(VARIANTS["TTTLinear"], {"D": 3}, torch.float64)


def beginning_with(program, *statements):
    first, *others = program.functions
    return replace(program, functions=(replace(first, body=(*statements, *first.body)), *others))


def test_every_stage_has_one():
    assert list(SPECS) == [stage.name for stage in pipeline.PIPELINE]


ONE = leaf("p", "param", (T_AXIS,))
STRANGERS = {
    "shift": (b.last(b.shift(ONE, T_AXIS), T_AXIS), ("declare", "differentiate", "simplify", "primal")),
    "cumprod": (b.last(b.cumprod(ONE, T_AXIS), T_AXIS), ("declare", "differentiate", "simplify", "primal")),
    "last": (b.last(ONE, T_AXIS), ("declare", "differentiate", "simplify")),
    "shift_back": (b.last(b.shift_back(ONE, T_AXIS), T_AXIS), ("dualize", "schedule")),
    "put_last": (b.last(b.put_last(b.const(1), T_AXIS), T_AXIS), ("dualize", "schedule")),
    "softmax": (b.last(b.normalize("softmax", (ONE,), (T_AXIS,)), T_AXIS), ("adjoint",)),
}


@pytest.mark.parametrize(
    ("op", "value", "stage"), [(op, e, stage) for op, (e, stages) in STRANGERS.items() for stage in stages]
)
def test_an_operation_where_it_may_not_be(monkeypatch, op: str, value: Expr, stage: str):
    target = next(iter(SPECS[stage].kinds & {"output", "sum", "saved"}))
    block = Block((Assign(leaf(":x", target), value),))

    def change(program):
        first, *others = program.functions
        given = replace(first, params=(*first.params, ONE), body=(block, *first.body))
        return replace(program, functions=(given, *others))

    with pytest.raises(MalformedProgram, match=f"stage '{stage}', .*: '{op}' must not occur after this stage"):
        compiled_with(monkeypatch, stage, change)


@pytest.mark.parametrize("stage", ["declare", "differentiate", "simplify", "primal", "dualize", "schedule"])
@pytest.mark.parametrize("statement", [Save, Restore])
def test_a_statement_where_it_may_not_be(monkeypatch, statement, stage):
    with pytest.raises(MalformedProgram, match=f"there is no {statement.__name__} after this stage"):
        compiled_with(monkeypatch, stage, lambda p: beginning_with(p, statement(())))


def test_a_loop_before_there_are_tokens(monkeypatch):
    with pytest.raises(MalformedProgram, match="there is no Allocate after this stage"):
        compiled_with(monkeypatch, "simplify", lambda p: beginning_with(p, Allocate(p.functions[0].params[0])))


@pytest.mark.parametrize(
    ("stage", "kind", "at"),
    [
        ("declare", "gradient", None),
        ("simplify", "sum", None),
        ("simplify", "token", "t"),
        ("primal", "token", "c"),
        ("dualize", "saved", None),
        ("schedule", "token", "t"),
        ("schedule", "cotangent", None),
        ("adjoint", "end", None),
    ],
)
def test_a_leaf_of_a_kind_that_may_not_be(monkeypatch, stage, kind, at):
    def change(program):
        first, *others = program.functions
        return replace(program, functions=(replace(first, params=(*first.params, leaf(":x", kind, (), at))), *others))

    with pytest.raises(MalformedProgram, match=f"is a {kind} at {at}, of which there are none after this stage"):
        compiled_with(monkeypatch, stage, change)


def test_a_program_of_another_stage(monkeypatch):
    def without_its_part(program):
        return LoopProgram(**{f.name: getattr(program, f.name) for f in fields(LoopProgram)})

    with pytest.raises(MalformedProgram, match="stage 'dualize' made a LoopProgram, not a DualProgram"):
        compiled_with(monkeypatch, "dualize", without_its_part)
