"""A linear recurrence as one node of the operator for it. Each batch element and head is a sequence of its own to it:
q_num_heads = kv_num_heads = 1.

    S_t = exp(decay_t) * S_{t-1} + rate_t * outer(k_t, v_t - k_t @ (exp(decay_t) * S_{t-1}));  z_t = q_t @ S_t

It takes the logarithms of decays, which a negative one has not: calls with such a decay, or with none of a token, run
the loop over chunks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from tttc.backends.onnx.loop import block, call, loop_functions, made, part_of, where
from tttc.backends.onnx.lowering import Lowering
from tttc.backends.onnx.ops import RECURRENCE
from tttc.ir.expr import Expr, leaves
from tttc.ir.linear_recurrence import LinearRecurrence, linear_recurrence
from tttc.ir.names import marked, own
from tttc.ir.program import T_AXIS, Scan, ScanKind, ScanProgram
from tttc.ir.reading import vectorize_over_tokens

SCAN_FORM = "scan"
THEN = "all'then"  # the part of the graph that has tokens
LEAST_DECAY = 1.17549435e-38  # of float32: what a decay of zero is as a logarithm


class OnnxOperator(NamedTuple):
    """The operator of a domain, and what a model that has it imports."""

    node: str
    imports: str


OPERATORS = {
    "com.microsoft": OnnxOperator(f"com.microsoft.{RECURRENCE}", '"" : 26, "com.microsoft" : 1, "tttc" : 1'),
    "ai.onnx": OnnxOperator(RECURRENCE, '"" : 27, "tttc" : 1'),
}


def recurrence_of(scan: Scan, program: ScanProgram) -> LinearRecurrence | None:
    """The rule of a scan of whole sequences, where it is one that the operator has."""
    found = linear_recurrence(program) if scan.kind is ScanKind.WHOLE else None
    if found is None or (found.decay is not None and found.decay.op == "const" and found.decay.arg < 0):
        return None
    given = {p.variable.name for p in scan.params}
    needed = [x for x in (found.query, found.key, found.value, found.decay, found.rate, found.output) if x is not None]
    return found if {e.name for e in leaves(needed)} - {found.read.name} <= given else None


def operator_functions(scan: Scan, program: ScanProgram, rule: LinearRecurrence, linear: str) -> list[str]:
    """The scan as a function around the operator, and what that calls where it cannot be run."""
    T, none, some = (marked(own(word)) for word in ("T", "none", "some"))
    lines = [
        f"{T} = Shape <start = 1, end = 2> ({marked(scan.sequence[0].name)})",
        f"{none} = Constant <value = int64[1] {{0}}> ()",
    ]
    condition, loop, otherwise = f"Greater ({T}, {none})", [], None
    if rule.decay is not None and rule.decay.op != "const":
        by_chunks = replace(scan, name=f"{scan.name}_by_chunks")
        loop, otherwise = loop_functions(by_chunks, program), [call(by_chunks.name, scan, "all'else", "", "")]
        checks = Lowering(scan.params, program.dims, None, "check_")
        known = checks.node("GreaterOrEqual", checks(_at_tokens(rule.decay)), checks.number(0.0))
        wrong = checks.node("ReduceSum", checks.node("Cast", checks.node("Not", known), to=1), keepdims=0)
        right = checks.node("Equal", wrong, checks.number(0.0))
        lines += [*checks.lines, f"{some} = {condition}"]
        condition = f"And ({some}, {right})"
    run = _Operated(scan, program, rule).lines(linear)
    lines += where(condition, "all", scan, program.dims, run, otherwise=otherwise)
    lines += (f"{made(e)} = Identity ({part_of(e, 'all')})" for e in scan.results)
    return [block(scan.name, [marked(p.name) for p in scan.params], [made(e) for e in scan.results], lines), *loop]


class _Operated:
    """The nodes around the operator, for all tokens: arrays [N, T, ...]."""

    def __init__(self, scan: Scan, program: ScanProgram, rule: LinearRecurrence) -> None:
        self.scan, self.rule = scan, rule
        self.lowering = Lowering(scan.params, program.dims, None)
        self.decay = None if rule.decay is None else _at_tokens(rule.decay)

    def lines(self, linear: str) -> list[str]:
        """They make what the branch of the function returns that has tokens."""
        rule, lowering = self.rule, self.lowering
        keys, order = (T_AXIS, rule.key_axis), (rule.key_axis, rule.value_axis)
        given = [lowering.filled(_at_tokens(x), keys) for x in (rule.query, rule.key)]
        given.append(lowering.filled(_at_tokens(rule.value), (T_AXIS, rule.value_axis)))
        state = lowering.transposed(marked(rule.state.name), rule.state.axes, order)
        given.append(lowering.node("Unsqueeze", state, lowering.integers(1)))
        if self.decay is not None or rule.rate is not None:
            given.append("" if self.decay is None else self._logarithm(self.decay))
        if rule.rate is not None:
            given.append(self._each(_at_tokens(rule.rate)))
        z, after = (marked(own(x)) for x in ("read_by_all", "state_after"))
        name = f"{'gated' * (self.decay is not None)}_{'delta' * (rule.rate is not None)}".strip("_") or "linear"
        attributes = f'kv_num_heads = 1, q_num_heads = 1, scale = 1.0, update_rule = "{name}"'
        lowering.lines.append(f"{z}, {after} = {OPERATORS[linear].node} <{attributes}> ({', '.join(given)})")
        z, after = (lowering.node("Cast", x, to=1) for x in (z, after))  # ONNX cannot infer what others' operators make
        self._returned(z, lowering.node("Squeeze", after, lowering.integers(1)))
        return lowering.lines

    def _returned(self, z: str, state: str) -> None:
        """What is made of what tokens read, and the state in the order of its axes."""
        rule, lowering = self.rule, self.lowering
        (output,), (update,) = self.scan.outputs, self.scan.updates
        lowering.known[_at_tokens(rule.read)] = z
        state = lowering.transposed(state, (rule.key_axis, rule.value_axis), rule.state.axes)
        lowering.lines.append(f"{part_of(update.target, THEN)} = Identity ({state})")
        lowering.named(_at_tokens(rule.output), part_of(output.target, THEN), output.target.axes)

    def _each(self, e: Expr) -> str:
        """One number for each token, [N, T, 1], or one for each key channel."""
        if self.rule.key_axis in e.axes:
            return self.lowering.filled(e, (T_AXIS, self.rule.key_axis))
        return self.lowering.node("Unsqueeze", self.lowering.filled(e, (T_AXIS,)), self.lowering.integers(2))

    def _logarithm(self, decay: Expr) -> str:
        return self.lowering.node(
            "Log", self.lowering.node("Max", self._each(decay), self.lowering.number(LEAST_DECAY))
        )


def _at_tokens(e: Expr) -> Expr:
    """An expression of one token at all of them."""
    return vectorize_over_tokens([e], T_AXIS, {})[0]
