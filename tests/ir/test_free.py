"""Free axes: which there are, what couples an axis, and that a strip of a scan is that strip of its results."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import tttc
from tests.helpers import LIBRARY, dims_of, evaluate_function
from tests.ir.test_ops import EXAMPLES
from tttc.ir import build as b
from tttc.ir.adjoint import adjoint_function, scan_adjoint
from tttc.ir.expr import Axis, Expr, leaf, leaves, postorder
from tttc.ir.free import free_axis
from tttc.ir.names import own, prefixed, suffixed
from tttc.ir.program import T_AXIS, Assign, Function, Program, Scan, ScanKind, cotangent

D, D1 = Axis("D", "D"), Axis("D1", "D")
SIZES = {"D": 4, "E": 6, "P": 5}
COLUMNS = ("DeltaNet", "GatedDeltaNet", "KDA", "LinearAttention", "Longhorn", "Mamba2", "RetNet", "GLA")
COUPLED = ("TTTLinear", "TTTMLP", "Titans", "GatedThreeLayer")

W = leaf("W", "state", (D, D1))
q, k, v = (leaf(n, "token", (T_AXIS, D), "c") for n in "qkv")
z = leaf("z", "output", (T_AXIS, D1), "c")


def columns_of(e: Expr) -> Expr:
    return b.rename(e, {D: D1})


def scan_of(output: Expr, weights: Expr = W, target: Expr = z) -> Scan:
    return Scan("scan", ScanKind.WHOLE, (), (W,), (q, k, v), (Assign(target, output),), (Assign(W, weights),), 2)


READ = b.contract((q, W), (D,))
GROWN = b.add(W, b.contract((k, columns_of(v)), (T_AXIS,)))


def loops_of(name: str) -> list[Scan]:
    program = tttc.compile(LIBRARY[name], dims_of(LIBRARY[name], 3)).stages.program
    return [s for s in program.scans if s.loops]


# -- which axes are free -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COLUMNS)
def test_columns_of_a_matrix_that_is_only_read_from_the_left(name):
    """Of q and k the same dim is the other axis of the weights, which is summed over."""
    (scan,) = loops_of(name)
    found = free_axis(scan)
    assert (found.size, found.strip) == ("D", suffixed("D", "strip"))
    assert found.slots == {"W": 1, "v": 1, own("z"): 1}


def test_what_is_carried_beside_the_weights_is_cut_too():
    (scan,) = loops_of("MomentumDeltaNet")
    assert free_axis(scan).slots == {prefixed("M", "W"): 1, "W": 1, "v": 1, own("z"): 1}


@pytest.mark.parametrize("name", COUPLED)
def test_a_norm_couples_what_it_normalises(name):
    assert [free_axis(scan) for scan in loops_of(name)] == [None] * len(loops_of(name))


def test_the_last_axis_of_a_sequence_is_the_second_of_the_weights():
    assert free_axis(scan_of(READ, GROWN)).slots == {"W": 1, "v": 1, "z": 1}


def test_an_elementwise_memory_is_free_in_everything():
    w, out = leaf("w", "state", (D,)), leaf("z", "output", (T_AXIS, D), "c")
    update = b.add(w, b.total(b.mul(k, v), (T_AXIS,)))
    scan = Scan("scan", ScanKind.WHOLE, (), (w,), (q, k, v), (Assign(out, b.mul(q, w)),), (Assign(w, update),), 2)
    assert free_axis(scan).slots == {"k": 1, "q": 1, "v": 1, "w": 0, "z": 1}


COUPLING = {
    "sum": lambda x: b.mul(x, b.total(x, (D1,))),
    "mean": lambda x: b.sub(x, b.mean(x, (D1,))),
    "max": lambda x: b.sub(x, b.maximum(x, (D1,))),
    "contract": lambda x: b.mul(x, b.contract((x, columns_of(v)), (D1,))),
    "softmax": lambda x: Expr("softmax", (x,), (D1,)),
    "l2_norm": lambda x: Expr("l2_norm", (x,), (D1, 1e-6)),
    "last": lambda x: b.mul(x, b.last(x, D1)),
    "put_last": lambda x: b.add(x, b.put_last(b.total(x, (D1,)), D1)),
    "cumprod": lambda x: b.cumprod(x, D1),
    "shift": lambda x: b.shift(x, D1),
    "shift_back": lambda x: b.shift_back(x, D1),
    "mask": lambda x: b.contract((x, b.mask(W, D, D1)), (D,)),
}


@pytest.mark.parametrize("name", COUPLING)
def test_what_an_operation_ends_or_runs_along_is_not_free(name):
    output = b.contract((q, W), (D,)) if name != "mask" else q
    assert free_axis(scan_of(READ, GROWN)) is not None
    assert free_axis(scan_of(COUPLING[name](output), GROWN)) is None


def test_a_matrix_that_is_transposed_is_no_strip_of_its_own():
    """W + W^T: columns would need rows."""
    turned = b.rename(W, {D: D1, D1: D})
    assert free_axis(scan_of(READ, b.add(GROWN, turned))) is None


def test_a_vector_with_itself_is_no_strip():
    """outer(v, v) has the axis twice."""
    grown = b.add(W, b.contract((v, columns_of(v)), (T_AXIS,)))
    assert free_axis(scan_of(READ, grown)) is None


def test_what_another_result_lacks_is_not_free():
    """A strip would make all of that result, and take all of its cotangent."""
    count = leaf("n", "state", (D,))
    scan = scan_of(READ, GROWN)
    more = Assign(count, b.add(count, b.total(k, (T_AXIS,))))
    assert free_axis(replace(scan, carry=(W, count), updates=(*scan.updates, more))) is None


def test_tokens_and_single_calls_are_not_cut():
    """Tokens are a chunk's; without a loop there is little to do."""
    row = leaf("z", "output", (T_AXIS,), "c")
    assert free_axis(scan_of(b.total(q, (D,)), GROWN, row)) is None
    scan = scan_of(READ, GROWN)
    assert free_axis(replace(scan, loops=False)) is None


# -- what a strip computes ---------------------------------------------------------------------------------------------


def strip_of(x: np.ndarray, position: int | None, part: slice) -> np.ndarray:
    return x if position is None else np.moveaxis(np.moveaxis(x, position, 0)[part], 0, position)


def inputs_of(scan: Scan, dims: dict[str, int], tokens: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    shapes = {p.name: [dims.get(a.size, tokens) for a in p.axes] for p in scan.params}
    return {n: generator.uniform(0.1, 0.9, shape) for n, shape in shapes.items()}


@pytest.mark.parametrize("name", [*COLUMNS, "MomentumDeltaNet"])
def test_a_strip_of_the_scan_is_that_strip_of_its_results(name):
    """And of its adjoint, where the cotangents of what all strips read are added up."""
    (scan,) = loops_of(name)
    dims, free = {"D": 4, suffixed("D", "strip"): 2}, free_axis(scan)
    given, slots = inputs_of(scan, dims, 7), free.slots
    wanted, back = results_of(scan, dims, given)
    found = []
    for part in (slice(2), slice(2, 4)):
        inside = {n: strip_of(x, slots.get(n), part) for n, x in given.items()}
        found.append(results_of(free.cut(scan), dims, inside))
    for target, x, *strips in zip(scan.results, wanted, *(made for made, _ in found), strict=True):
        # the same sums in the same order
        np.testing.assert_allclose(np.concatenate(strips, slots[target.name]), x, rtol=1e-12)
    for p, x, *strips in zip(scan.params, back, *(made for _, made in found), strict=True):
        at = slots.get(p.name)
        # the sum over the columns in two parts: a few units of the largest term
        np.testing.assert_allclose(sum(strips) if at is None else np.concatenate(strips, at), x, rtol=1e-10)


def results_of(scan: Scan, dims: dict[str, int], given: dict[str, np.ndarray]) -> tuple[tuple[np.ndarray, ...], ...]:
    """What a scan makes, and the cotangents of its inputs where those of its results are all 1."""
    made = evaluate_function(scan.function(), dims, given)
    back = {cotangent(r).name: np.ones_like(x) for r, x in zip(scan.results, made, strict=True)}
    adjoint = adjoint_function(scan_adjoint(scan, Program("", "", (), dims), {}))
    return made, evaluate_function(adjoint, dims, given | back)


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_operation_makes_strips_of_a_free_axis(name):
    """Whatever the table has, also in time to come: what is called free is tried."""
    for e in EXAMPLES[name]:
        for axis in e.axes:
            target = leaf("result", "output", (axis, *(a for a in e.axes if a != axis)))
            params = tuple({x.name: x for x in leaves([e])}.values())
            scan = Scan("scan", ScanKind.WHOLE, params, (), (), (Assign(target, e),), (), 1)
            if (free := free_axis(scan)) is None:
                continue
            given, part = inputs_of(scan, SIZES, 0), slice(SIZES[free.size] // 2)
            (whole,) = evaluate_function(once(scan), SIZES, given)
            inside = {n: strip_of(x, free.slots.get(n), part) for n, x in given.items()}
            (found,) = evaluate_function(once(free.cut(scan)), {**SIZES, free.strip: part.stop}, inside)
            np.testing.assert_allclose(found, strip_of(whole, free.slots["result"], part), rtol=1e-13)


def once(scan: Scan) -> Function:
    return replace(scan, loops=False).function()


@pytest.mark.parametrize("name", ["pow", "mask", "solve", "contract", "layer_norm"])
def test_the_axes_beside_those_of_an_operation_are_free(name):
    """So that the test above has something to try."""
    scans = [
        Scan("s", ScanKind.WHOLE, (), (), (), (Assign(leaf("z", "output", e.axes), e),), (), 1) for e in EXAMPLES[name]
    ]
    assert any(free_axis(s) for s in scans)


def test_the_size_of_a_dim_stays_that_of_the_whole():
    scan = scan_of(b.div(READ, b.size(D1)), GROWN)
    made = postorder(a.value for a in free_axis(scan).cut(scan).block.assigns)
    assert [e.arg for e in made if e.op == "size"] == [D1]
