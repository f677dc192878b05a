"""A linear recurrence as one node of the operator for it. Each batch element and head is a sequence of its own to it:
q_num_heads = kv_num_heads = 1.

    S_t = exp(decay_t) * S_{t-1} + rate_t * outer(k_t, v_t - k_t @ (exp(decay_t) * S_{t-1}));  z_t = q_t @ S_t

It takes the logarithms of decays, of which a negative one has none. What it carries is sign * S, the sign being that of
all decays so far: the decays of that are without a sign, its queries and keys are sign * q and sign * k.
"""

from __future__ import annotations

from typing import NamedTuple

from tttc.backends.onnx.loop import block, empty, made, part_of, where
from tttc.backends.onnx.lowering import Lowering
from tttc.backends.onnx.ops import RECURRENCE
from tttc.ir import build as b
from tttc.ir.expr import Expr, const, leaves
from tttc.ir.linear_recurrence import LinearRecurrence, linear_recurrence
from tttc.ir.names import marked, own
from tttc.ir.program import T_AXIS, Scan, ScanKind, ScanProgram
from tttc.ir.reading import vectorize_over_tokens

SCAN_FORM = "scan"
THEN = "all'then"  # the part of the graph that has tokens
SMALLEST = 1.17549435e-38  # of float32: what a decay of zero is as a logarithm


class Operator(NamedTuple):
    """The operator of a domain, and what a model that has it imports."""

    node: str
    imports: str


OPERATORS = {
    "com.microsoft": Operator(f"com.microsoft.{RECURRENCE}", '"" : 26, "com.microsoft" : 1, "tttc" : 1'),
    "ai.onnx": Operator(RECURRENCE, '"" : 27, "tttc" : 1'),
}


def recurrence_of(scan: Scan, program: ScanProgram) -> LinearRecurrence | None:
    """The rule of a scan of whole sequences, where it is one that the operator has."""
    found = linear_recurrence(program) if scan.kind is ScanKind.WHOLE else None
    if found is None:
        return None
    given = {p.variable.name for p in scan.params}
    needed = [x for x in (found.query, found.key, found.value, found.decay, found.rate, found.output) if x is not None]
    return found if {e.name for e in leaves(needed)} - {found.read.name} <= given else None


def operator_function(scan: Scan, program: ScanProgram, rule: LinearRecurrence, linear: str) -> str:
    """The scan as a function around the operator; where there are no tokens, it is not run."""
    T, none = marked(own("T")), marked(own("none"))
    lines = [
        f"{T} = Shape <start = 1, end = 2> ({marked(scan.sequence[0].name)})",
        f"{none} = Constant <value = int64[1] {{0}}> ()",
        *(x for a in scan.outputs for x in empty(a.target, scan, program.dims)),
        *where(f"Greater ({T}, {none})", "all", scan, _Operated(scan, program, rule).lines(linear), ""),
        *(f"{made(e)} = Identity ({part_of(e, 'all')})" for e in scan.results),
    ]
    return block(scan.name, [marked(p.name) for p in scan.params], [made(e) for e in scan.results], lines)


class _Operated:
    """The nodes around the operator, for all tokens: arrays [N, T, ...]."""

    def __init__(self, scan: Scan, program: ScanProgram, rule: LinearRecurrence) -> None:
        self.scan, self.rule = scan, rule
        self.lowering = Lowering(scan.params, program.dims, None)
        self.decay = None if rule.decay is None else _at_tokens(rule.decay)
        self.sign = None if self.decay is None else _sign(self.decay)

    def lines(self, linear: str) -> list[str]:
        """They make what the branch of the function returns that has tokens."""
        rule, lowering = self.rule, self.lowering
        keys, order = (T_AXIS, rule.key_axis), (rule.key_axis, rule.value_axis)
        given = [lowering.filled(self._signed(x), keys) for x in (rule.query, rule.key)]
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
        if self.sign is not None:
            state = lowering.node("Mul", state, lowering.aligned(b.last(self.sign, T_AXIS), rule.state.axes))
        lowering.lines.append(f"{part_of(update.target, THEN)} = Identity ({state})")
        lowering.named(_at_tokens(rule.output), part_of(output.target, THEN), output.target.axes)

    def _signed(self, e: Expr) -> Expr:
        return _at_tokens(e) if self.sign is None else b.mul(self.sign, _at_tokens(e))

    def _each(self, e: Expr) -> str:
        """One number for each token, [N, T, 1], or one for each key channel."""
        if self.rule.key_axis in e.axes:
            return self.lowering.filled(e, (T_AXIS, self.rule.key_axis))
        return self.lowering.node("Unsqueeze", self.lowering.filled(e, (T_AXIS,)), self.lowering.integers(2))

    def _logarithm(self, decay: Expr) -> str:
        """Of the decay without its sign."""
        size = self._each(decay if self.sign is None else b.apply("abs", decay))
        return self.lowering.node("Log", self.lowering.node("Max", size, self.lowering.number(SMALLEST)))


def _at_tokens(e: Expr) -> Expr:
    """An expression of one token at all of them."""
    return vectorize_over_tokens([e], T_AXIS, {})[0]


def _sign(decay: Expr) -> Expr | None:
    """The sign of all decays so far, 1 or -1 at every token; None where they have none."""
    if decay.op == "const" and decay.arg >= 0:
        return None
    negative = b.apply("step", b.neg(decay))
    return b.cumprod(b.sub(const(1), b.mul(const(2), negative)), T_AXIS)
