"""The order of the lines of a Triton kernel: valid, and asking for no more registers than the order that is printed."""

from __future__ import annotations

from math import prod

import pytest

import tttc
from tests.helpers import LIBRARY, dims_of
from tttc.backends import triton
from tttc.backends.triton.kernel_spec import KernelSpec
from tttc.backends.triton.line_schedule import list_schedule
from tttc.compiler.driver import untuned
from tttc.ir.adjoint import backward_block
from tttc.ir.names import spelled
from tttc.ir.program import Block, cotangent
from tttc.ir.text import Namer, steps


def both_orders(variant, backward):
    """The lines of the first scan as printed and as emitted, and the variables that are its chunk's alone."""
    program = untuned(variant, dims_of(variant, 64), triton)
    scan = program.scans[0]
    assigns = tuple(backward_block(program.adjoint_of(scan)) if backward else scan.block.assigns)
    passing = {*scan.sequence, *(map(cotangent, [a.target for a in scan.outputs]) if backward else ())}
    passing |= set(scan.carry) if backward else set()
    names = {p.name for p in passing}

    def namer():
        return Namer({spelled(p.name) for p in (*scan.results, *scan.params)}, program.names)

    lines = steps(Block(assigns), namer())
    spec = KernelSpec(scan, program)
    return lines, list_schedule(lines, lambda e: prod(map(spec.block, e.axes)), names, namer()), names, spec


def mentioned(line, values):
    """What a line reads: values that have lines of their own, and variables."""
    found, stack = set(), [line.value] if line.target else list(line.value.src)
    while stack:
        e = stack.pop()
        if e in values or e.op == "leaf":
            found.add(e)
        else:
            stack += e.src
    return found


def most_alive(lines, passing, spec):
    """The largest number of numbers that are alive after a line."""
    values = {x.value for x in lines if x.target is None}
    last = {e: i for i, x in enumerate(lines) for e in mentioned(x, values)}
    born = {e: -1 for e in last if e.op == "leaf" and e.name in passing}
    born |= {x.value: i for i, x in enumerate(lines) if x.target is None}
    sizes = {e: prod(map(spec.block, e.axes)) for e in born}
    return max(sum(sizes[e] for e in born if born[e] <= i < last.get(e, i)) for i in range(-1, len(lines)))


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", sorted(set(LIBRARY) - {"LaCT", "MTTT", "ViTTT"}))
def test_lines_in_an_order_of_short_lives(name, backward):
    before, after, passing, spec = both_orders(LIBRARY[name], backward)
    assert {(x.value, x.target) for x in after} == {(x.value, x.target) for x in before}
    assert len(after) == len(before)
    assert len({x.name for x in after}) == len(after)
    values, made, renewed = {x.value for x in after if x.target is None}, set(), set()
    for line in after:
        read = mentioned(line, values)
        assert {e for e in read if e in values} <= made
        assert not {e.name for e in read if e.op == "leaf"} & renewed
        made.add(line.value)
        if line.target is not None and line.target.at is None:
            renewed.add(line.target.name)
    assert most_alive(after, passing, spec) <= most_alive(before, passing, spec)


def test_a_backward_asks_for_fewer_registers():
    before, after, passing, spec = both_orders(tttc.library.TTTLinear, True)
    assert most_alive(after, passing, spec) < 0.9 * most_alive(before, passing, spec)
