"""Costs: against the formulas of the literature, counts made from arrays, and runs of the printed text."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from math import prod
from typing import Any

import numpy as np
import pytest
import sympy

import tttc
from tests.helpers import dims_of
from tttc.ir import build as b
from tttc.ir import cost
from tttc.ir.expr import TOKENS, Axis, Expr, leaf, postorder
from tttc.ir.names import own
from tttc.ir.program import S_AXIS, T_AXIS, Assign, Block, Program
from tttc.library import GLA, TTTMLP, GatedDeltaNet, GatedThreeLayer, LaCT, LinearAttention, Titans, TTTLinear

T, C, n = cost.TOKENS, cost.CHUNK, cost.EVERY
D, F = map(cost.dim, "DF")


@cache
def program(variant: type[tttc.Variant]) -> Program:
    """Compiled for widths in use: where a state is tiny, another order of its products is cheaper."""
    return tttc.compile(variant, dims_of(variant, 64)).stages.program


def cubic(formula: sympy.Expr) -> sympy.Expr:
    """The terms that are a product of three sizes: those of products of two matrices."""
    terms = sympy.expand(formula).as_ordered_terms()
    return sympy.Add(*(t for t in terms if sympy.Poly(t, C, D, F).total_degree() == 3))


# -- the formulas of the literature ------------------------------------------------------------------------------------


def test_forward_of_a_linear_learner_is_the_known_formula() -> None:
    """6 b dk dv + 2 b^2 (dk + dv), and 2 b dv for the bias: the rates of the chunk times its gradients."""
    found = cost.scan_cost(program(TTTLinear).scans[0]).work.contraction
    assert sympy.expand(found - (6 * C * D**2 + 2 * C**2 * (D + D) + 2 * C * D)) == 0


def test_forward_of_a_two_layer_learner_is_the_known_formula() -> None:
    """56 b f^2 + 20 b^2 f with a hidden width of 4 f, and 2 b (f + 4 f) for the two biases."""
    found = cost.scan_cost(program(TTTMLP).scans[0]).work.contraction.subs(F, 4 * D)
    assert sympy.expand(found - (56 * C * D**2 + 20 * C**2 * D + 2 * C * 5 * D)) == 0


@pytest.mark.parametrize("variant", [TTTLinear, TTTMLP, LinearAttention, GatedThreeLayer])
def test_backward_takes_two_products_for_each_of_the_forward(variant: type[tttc.Variant]) -> None:
    compiled = program(variant)
    forward = cost.scan_cost(compiled.scans[0]).work.contraction
    backward = cost.adjoint_cost(compiled.adjoints[0]).backward.work.contraction
    assert cubic(forward) != 0
    assert cubic(backward) == sympy.expand(2 * cubic(forward))


def test_forward_of_the_gated_delta_rule_counted_by_hand() -> None:
    """Line by line of the listing: the Gram matrix and its system, the rows read through the weights, what is handed
    on.
    """
    found = cost.scan_cost(program(GatedDeltaNet).scans[0]).work
    gram, solve, read, hand_on = 2 * C**2 * D, C**2 * D, 2 * C * D**2, 2 * C * D**2
    through_k, through_q = read, read + gram + 2 * C**2 * D  # k @ W; q @ W, q @ k.T, (...) @ u
    assert sympy.expand(found.contraction - (gram + solve + through_k + through_q + hand_on)) == 0
    products = C + C**2  # cumprod, segprod
    system = 2 * C**2 + 2 * C * D  # tril(P, -1) * lr * gram; k scaled, minus v
    reading = 2 * C**2 + 2 * C * D  # P * lr * gram; q scaled, the difference
    handing_on = C + C * D + 2 * D**2  # last row of P * lr, times u; a * W, the difference
    assert sympy.expand(found.elementwise - (products + system + reading + handing_on)) == 0


def test_decays_of_channels_counted_by_hand() -> None:
    """Products for each pair of tokens and each channel, times k, and read by q: all of them C * C * D."""
    found = cost.scan_cost(program(GLA).scans[0]).work
    pairs = C**2 * D
    assert (
        sympy.expand(found.contraction - (2 * pairs + 2 * C**2 * D + 4 * C * D**2)) == 0
    )  # q.(P k), @ v; q @ W, k.T @ v
    # segprod, P * k; cumprod, q * a, the sum, the last row of P times k; a * W, the sum
    assert sympy.expand(found.elementwise - (2 * pairs + 4 * C * D + 2 * D**2)) == 0


# -- independent counts ------------------------------------------------------------------------------------------------


def count_from_arrays(roots: list[Expr], sizes: Mapping[str, int]) -> int:
    """FLOPs of the contractions under `roots`: what NumPy's own einsum planner says of arrays of these sizes."""
    total = 0
    for e in postorder(roots):
        if e.op != "contract" or not e.arg:
            continue
        names = {a: chr(ord("a") + i) for i, a in enumerate(dict.fromkeys(a for s in e.src for a in s.axes))}
        spec = ",".join("".join(names[a] for a in s.axes) for s in e.src) + "->" + "".join(names[a] for a in e.axes)
        arrays = [np.empty([sizes[a.size] for a in s.axes]) for s in e.src]
        _, report = np.einsum_path(spec, *arrays, optimize=False)
        total += round(float(report.split("Naive FLOP count:")[1].split()[0]))
    return total


@pytest.mark.parametrize("variant", [TTTLinear, TTTMLP, LinearAttention, GatedThreeLayer])
@pytest.mark.parametrize("sizes", [{TOKENS: 4, "D": 3, "F": 5}, {TOKENS: 2, "D": 6, "F": 3}])
def test_contractions_of_both_sweeps_agree_with_numpy(variant: type[tttc.Variant], sizes: dict[str, int]) -> None:
    """Small sizes: the report of NumPy has four digits."""
    for a in program(variant).adjoints:
        costs = cost.adjoint_cost(a)
        forward = [x.value for x in (*a.outputs, *a.forward.assigns)]
        backward = [x.value for x in a.backward.assigns]
        assert cost.evaluate(costs.forward.contraction, sizes) == count_from_arrays(forward, sizes)
        assert cost.evaluate(costs.backward.work.contraction, sizes) == count_from_arrays(backward, sizes)


class Counting(np.ndarray):
    """An array that counts the FLOPs of the matrix products that it takes part in."""

    flops = 0

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **settings: Any) -> Any:
        plain = [np.asarray(x) for x in inputs]
        if ufunc is np.matmul:
            Counting.flops += 2 * plain[0].shape[-1] * prod(plain[0].shape[:-1]) * prod(plain[1].shape[1:])
        settings["out"] = tuple(np.asarray(x) for x in settings["out"]) if settings.get("out") else None
        return np.asarray(getattr(ufunc, method)(*plain, **settings)).view(Counting)


@pytest.mark.parametrize("variant", [TTTLinear, TTTMLP, LinearAttention, Titans])
@pytest.mark.parametrize("stage", ["primal", "dualize", "schedule"])
def test_contractions_of_a_call_agree_with_running_the_printed_text(variant: type[tttc.Variant], stage: str) -> None:
    """The text is executed on arrays that count their own matrix products."""
    dims = dims_of(variant, 3, 5)
    found = tttc.compile(variant, dims, chunk=16).stages[stage].program
    function = found.functions[0]
    scope: dict[str, Any] = {}
    exec(str(found), scope)
    made = {name: scope[name] for name in ("segprod", "zeros")}  # these make arrays, which should count as well
    scope |= {name: lambda *x, make=make: make(*x).view(Counting) for name, make in made.items()}
    arguments = []
    for p in function.params:
        shape = [dims[a.size] for a in p.axes if a.size != TOKENS]
        arguments.append(np.ones([32, *shape] if p.at else shape).view(Counting))
    Counting.flops = 0
    scope[function.name](*arguments)
    formula = cost.function_work(function).contraction
    assert Counting.flops > 0
    assert cost.evaluate(formula, {**dims, own("T"): 32}, cost.lengths_of(function)) == Counting.flops


# -- the rules of counting ---------------------------------------------------------------------------------------------

D_AXIS, F_AXIS = Axis("D", "D"), Axis("F", "F")
X = leaf("x", "token", (T_AXIS, D_AXIS), "c")
Y = leaf("y", "token", (S_AXIS, D_AXIS), "c")
W = leaf("W", "state", (D_AXIS, F_AXIS))
V = leaf("V", "state", (F_AXIS, D_AXIS))
ALPHA = leaf("alpha", "gate", (T_AXIS,), "c")


@pytest.mark.parametrize(
    ("e", "contraction", "elementwise"),
    [
        (b.contract((X, W), (D_AXIS,)), 2 * C * D * F, 0),
        (b.contract((X, Y), (D_AXIS,)), 2 * C**2 * D, 0),
        (b.mask(b.contract((X, Y), (D_AXIS,)), T_AXIS, S_AXIS), 2 * C**2 * D, 0),  # both halves are counted
        (b.contract((leaf("g", "gate", (T_AXIS,), "c"), leaf("h", "gate", (S_AXIS,), "c")), ()), 0, C**2),
        (b.apply("gelu", X), 0, C * D),
        (b.add(X, leaf("b", "state", (D_AXIS,))), 0, C * D),
        (b.total(X, (D_AXIS,)), 0, C * D),
        (b.broadcast(b.const(0), (D_AXIS, F_AXIS)), 0, 0),
        (b.add(b.apply("gelu", X), b.apply("gelu", X)), 0, 2 * C * D),  # shared: computed once
        (b.segprod(ALPHA, T_AXIS, S_AXIS), 0, C**2),  # an entry is that of the row above times a decay
        (b.segprod(X, T_AXIS, S_AXIS), 0, C**2 * D),  # for each channel
        (b.cumprod(ALPHA, T_AXIS), 0, C),
        (b.cumprod(X, T_AXIS), 0, C * D),
        (b.shift(ALPHA, T_AXIS), 0, 0),
        (b.shift_back(X, T_AXIS), 0, 0),
        (b.solve(b.segprod(ALPHA, T_AXIS, S_AXIS), X, T_AXIS, S_AXIS), C**2 * D, C**2),
        (b.solve(b.segprod(ALPHA, T_AXIS, S_AXIS), ALPHA, T_AXIS, S_AXIS), C**2, C**2),
    ],
)
def test_one_operation(e: Expr, contraction: sympy.Expr, elementwise: sympy.Expr) -> None:
    found = cost.work([e])
    assert sympy.expand(found.contraction - contraction) == 0
    assert sympy.expand(found.elementwise - elementwise) == 0


def test_a_solve_costs_what_substitution_does() -> None:
    """By hand for 4 tokens and 3 columns: x[t] -= N[t, s] * x[s] for 0 + 1 + 2 + 3 pairs, and 4 diagonal entries."""
    solve = b.solve(b.segprod(ALPHA, T_AXIS, S_AXIS), X, T_AXIS, S_AXIS)
    assert cost.node_work(solve).contraction.subs({C: 4, D: 3}) == (2 * (0 + 1 + 2 + 3) + 4) * 3


def test_a_composite_costs_what_it_consists_of() -> None:
    gamma, beta = leaf("gamma", "param", (D_AXIS,)), leaf("beta", "param", (D_AXIS,))
    whole = Expr("layer_norm", (X, gamma, beta), (D_AXIS, 1e-6))
    # on [C, D]: mean, centre, square, mean, times rsqrt, gamma, beta; on [C]: + eps, rsqrt
    assert sympy.expand(cost.work([whole]).elementwise - (7 * C * D + 2 * C)) == 0


# -- chunks ------------------------------------------------------------------------------------------------------------


def test_traffic_state_and_intermediate_of_a_chunk() -> None:
    found = cost.scan_cost(program(TTTMLP).scans[0])
    assert sympy.expand(found.read - (3 * C * D + 2 * C)) == 0  # q, k, v, lr, tau
    assert found.written == C * D
    assert sympy.expand(found.carry - (2 * D * F + D + F)) == 0
    assert found.fixed == 2 * D  # gamma, beta
    assert found.largest.subs({C: 16, D: 64, F: 256}) == 16 * 256  # no [D, F] beside the state itself
    assert found.traffic(False).subs({C: 1, D: 1, F: 1}) == 6


@pytest.mark.parametrize(
    ("variant", "depth"),
    [
        (TTTLinear, 2),
        (TTTMLP, 4),
        (GatedThreeLayer, 6),
        (LinearAttention, 0),
        (GLA, 0),
        (GatedDeltaNet, 3),
        (Titans, 4),
    ],
)
def test_dependent_contractions_of_a_chunk(variant: type[tttc.Variant], depth: int) -> None:
    """k @ W1, x @ W2, back through W2, k.T @ g: two for each layer; none where no gradient reads the weights; a system
    to be solved is one more.
    """
    compiled = program(variant)
    found = cost.scan_cost(compiled.scans[0])
    assert found.depth == depth
    assert found.critical_path() == sympy.expand(depth * T / C)
    assert cost.adjoint_cost(compiled.adjoints[0]).backward.depth == depth
    assert (found.sequential.contraction != 0) == (depth != 0)


def test_a_chain_that_ends_in_a_variable_nobody_reads_does_not_grow() -> None:
    """Each turn reads W on its way to V by two contractions, but no turn waits for V."""
    onward = b.add(V, b.contract((b.contract((X, W), (D_AXIS,)), X), (T_AXIS,)))
    assert cost.chain_growth({"W": W, "V": onward}) == 0
    assert cost.chain_growth({"W": onward, "V": onward}) == 2  # now the next turn reads it


def test_variables_that_feed_each_other_share_their_chain() -> None:
    """V from W by two contractions, W from V by none: two for every two turns."""
    turned = b.contract((b.contract((X, W), (D_AXIS,)), X), (T_AXIS,))
    assert cost.chain_growth({"W": b.rename(V, {}), "V": turned}) == 1
    assert cost.chain_growth({"W": V, "V": b.apply("tanh", W)}) == 0


def test_the_tiles_of_a_mini_batch_share_its_weights() -> None:
    """LaCT: the gradients take two contractions, S = S + k.T @ d one, and each step of Muon three; the tiles add up."""
    stages = tttc.compile(LaCT.replace(mini_batch=64), {"D": 8, "F": 8}, chunk=16).stages
    scans = {s.name: s for s in stages.program.scans}
    assert cost.pieces_depth(scans["la_ct_open"], scans["la_ct_close"]) == (2 + 5 * 3, 0)


def test_the_tiles_of_online_gradients_wait_for_one_another() -> None:
    """k @ W, the system, k.T @ u: for the first tile from W, for the others from what the tiles before have added."""
    stages = tttc.compile(GatedDeltaNet.replace(mini_batch=64, read="start"), {"D": 8}, chunk=16).stages
    scans = {s.name: s for s in stages.program.scans}
    assert cost.pieces_depth(scans["gated_delta_net_open"], scans["gated_delta_net_close"]) == (3, 3)


def test_memory_of_a_backward() -> None:
    costs = cost.adjoint_cost(program(LinearAttention).adjoints[0])
    assert sympy.expand(costs.residuals - (C**2 + D**2)) == 0  # A and the weights that came in
    assert sympy.expand(costs.memory() - (T / (C * n) * D**2 + n * (C**2 + D**2))) == 0
    assert sympy.expand(costs.memory(sympy.S.Zero) - T / C * (C**2 + D**2)) == 0


def test_tiles_and_mini_batches_are_weighed_by_how_often_they_run() -> None:
    stages = tttc.compile(TTTLinear.replace(mini_batch="all"), {"D": 3}, chunk=8).stages
    tile, close, _ = (cost.scan_cost(s).work.flops for s in stages.program.scans)
    scheduled = stages["schedule"].program
    found = cost.function_work(scheduled.functions[0]).flops
    assert sympy.expand(found - (T / C * tile + T / cost.MINI_BATCH * close)) == 0
    assert cost.lengths_of(scheduled.functions[0]) == {C: 8, cost.MINI_BATCH: T}


def test_a_block_without_a_carry_has_no_critical_path() -> None:
    block = Block((Assign(leaf("z", "output", (T_AXIS, F_AXIS), "c"), b.contract((X, W), (D_AXIS,))),))
    found = cost.chunk_cost(block, ())
    assert (found.depth, found.carry, found.fixed) == (0, 0, D * F)
